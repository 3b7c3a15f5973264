"""The HTTP routes ``/sag-pag/v1/…``, beside the WebUI's own API and guarded by the same credentials."""

from __future__ import annotations

from secrets import compare_digest
from typing import Any, Optional, Union

from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from sag_pag import hosts
from sag_pag.engine.blocks import AttentionSite
from sag_pag.engine.cost import cost_of
from sag_pag.engine.model_cost import ModelCost
from sag_pag.hosts.interface import UnguidableModelError
from sag_pag.settings import PARAMETERS, Parameter
from sag_pag.webui.presets import STORE, PresetError

PREFIX = "/sag-pag/v1"

# Annotations in the old spelling: pydantic evaluates them at run time. Strict types: pydantic 1 would make True of 1.0.
ParameterValue = Union[StrictBool, StrictInt, StrictFloat, StrictStr]  # noqa: UP007


def _pixels() -> Any:
    """One for each parameter: FastAPI writes the parameter's name into it."""
    return Query(512, ge=64, le=8192, description="Of the picture that the costs are for, in pixels")


class Block(BaseModel):
    """A block that holds self-attention."""

    name: str = Field(description="As in block lists: input.N, middle or output.N; joint.N of SD3")
    part: str = Field(description="input, middle or output; joint of SD3")
    transformer_blocks: list[str] = Field(description="The names of the transformer blocks in it")
    downscale: int = Field(description="Latent pixels per side of a token: 1, 2, 4 or 8")
    heads: int = Field(description="Attention heads of each self-attention")
    channels: int = Field(description="Channels of each token")
    resolution: list[int] = Field(description="Width and height of the block's feature map in tokens")
    pag_cost: float = Field(description="Operations of a CFG step with PAG in this block, over those without")
    sag_cost: Optional[float] = Field(  # noqa: UP045
        description="Operations of a CFG step with SAG that reads this block, over those without; null on SD3, which "
        "has no SAG"
    )


class Blocks(BaseModel):
    """The loaded model's blocks, in the order in which they run."""

    checkpoint: str = Field(description="The loaded checkpoint")
    blocks: list[Block]


class PresetItem(BaseModel):
    """Named values; parameters that it does not name have their defaults."""

    name: str
    built_in: bool
    description: str
    values: dict[str, ParameterValue]


class Presets(BaseModel):
    """Built-in presets, then the user's own."""

    presets: list[PresetItem]
    problem: Optional[str] = Field(  # noqa: UP045
        default=None, description="What was wrong with the file of the user's own, and where it has been put"
    )


class ParameterItem(BaseModel):
    """One parameter, at its place in the positional list of the script's arguments."""

    position: int
    name: str
    feature: str = Field(description="sag, pag, or both for what they share")
    type: str = Field(description="bool, float, int, choice, or blocks for a list of block names")
    default: ParameterValue
    minimum: Optional[float] = Field(default=None, description="Of a number")  # noqa: UP045
    maximum: Optional[float] = Field(default=None, description="Of a number")  # noqa: UP045
    step: Optional[float] = Field(default=None, description="Of a number's slider")  # noqa: UP045
    choices: Optional[list[str]] = Field(default=None, description="Of a choice")  # noqa: UP045
    label: str
    help: str
    infotext: str = Field(description="The key in a picture's metadata")


class Schema(BaseModel):
    """Every parameter, in positional order."""

    parameters: list[ParameterItem]


def describe_block(cost: ModelCost, sites: list[AttentionSite]) -> Block:
    """One block, from its self-attentions."""
    first, topology = sites[0], cost.topology
    height, width = cost.map_sizes[first]
    reads = not topology.refuses("sag_enabled", True)
    return Block(
        name=first.block_name, part=first.part, transformer_blocks=[site.name for site in sites],
        downscale=topology.downscale(first), heads=first.heads, channels=first.channels,
        resolution=[width, height], pag_cost=cost.perturbing_alone(tuple(sites)),
        sag_cost=cost.reading_alone(first) if reads else None,
    )


def blocks(width: int = _pixels(), height: int = _pixels()) -> Blocks:
    """The blocks of the loaded model whose self-attention can be guided, for pictures of ``width`` and ``height``.

    Status 409 where there are none.
    """
    host = hosts.current()
    try:
        topology = host.topology()
    except UnguidableModelError as error:
        raise HTTPException(status_code=409, detail=str(error)) from error
    cost = cost_of(topology, (height // 8, width // 8))
    by_name: dict[str, list[AttentionSite]] = {name: [] for name in topology.block_names()}
    for site in topology.sites:
        by_name[site.block_name].append(site)
    return Blocks(
        checkpoint=host.checkpoint(),
        blocks=[describe_block(cost, sites) for sites in by_name.values()],
    )


def presets() -> Presets:
    """All presets with their values. Status 500 where the file of the user's own can't be read."""
    try:
        found, problem = STORE.look()
    except PresetError as error:
        raise HTTPException(status_code=500, detail=str(error)) from error
    items = [
        PresetItem(name=p.name, built_in=p.built_in, description=p.description, values=dict(p.values)) for p in found
    ]
    return Presets(presets=items, problem=problem)


def schema() -> Schema:
    """Every parameter: what ``alwayson_scripts`` takes, as names or as positions."""
    return Schema(parameters=[_item(position, p) for position, p in enumerate(PARAMETERS.values())])


def _item(position: int, parameter: Parameter) -> ParameterItem:
    number = parameter.is_number
    return ParameterItem(
        position=position, name=parameter.name, feature=parameter.feature, type=parameter.kind,
        default=parameter.default, minimum=parameter.minimum if number else None,
        maximum=parameter.maximum if number else None, step=parameter.step if number else None,
        choices=list(parameter.choices) if parameter.kind == "choice" else None, label=parameter.label,
        help=parameter.help, infotext=parameter.infotext,
    )


def check_credentials(credentials: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - fastapi's way
    """What the WebUI does for its own routes with ``--api-auth``."""
    known = dict(pair.split(":") for pair in shared.cmd_opts.api_auth.split(","))
    expected = known.get(credentials.username)
    if expected is None or not compare_digest(credentials.password.encode(), expected.encode()):
        raise HTTPException(
            status_code=401, detail="Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
        )


def add_routes(_demo: Any, app: FastAPI) -> None:
    """Adds the routes where the WebUI has an API, that is with ``--api`` or ``--nowebui``."""
    if not (shared.cmd_opts.api or shared.cmd_opts.nowebui):
        return
    guards = [Depends(check_credentials)] if shared.cmd_opts.api_auth else []
    for route, model in ((blocks, Blocks), (presets, Presets), (schema, Schema)):
        app.add_api_route(
            f"{PREFIX}/{route.__name__}", route, methods=["GET"], response_model=model, dependencies=guards,
            tags=["Self-Attention & Perturbed-Attention Guidance"],
        )
