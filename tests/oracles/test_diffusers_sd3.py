"""PAG in SD3 against diffusers' own pipeline on the same weights, step by step at the same latents.

The transformer is the small one of ``mmdit``, converted by diffusers itself.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers_side import largest_error
from mmdit import MMDiT, Shape, redrawn
from torch import Tensor

from sag_pag.engine.plan import plan_at
from sag_pag.engine.rows import StepRows
from sag_pag.engine.spaces import SigmaSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import topology_of
from sag_pag.settings import Settings

pytest.importorskip("diffusers", reason="diffusers is not installed: its SD3 pipeline is NOT compared with the engine")
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = Shape(depth=6, sinusoids=256)
MANY = Shape(depth=14, sinusoids=256)
TEXT, STEPS = 9, 4
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
precisions = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
cfg = pytest.mark.parametrize("cfg_scale", [5.0, 1.0], ids=["CFG", "no CFG"])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def ours(shape: Shape, *, dtype: torch.dtype) -> MMDiT:
    return redrawn(shape, seed=4, dtype=dtype)


def their_transformer(shape: Shape, *, dtype: torch.dtype) -> Any:
    """diffusers' transformer with the same weights, loaded strictly."""
    convert = importlib.import_module("diffusers.loaders.single_file_utils")
    made = importlib.import_module("diffusers").SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=shape.latents, num_layers=shape.depth, attention_head_dim=shape.head,
        num_attention_heads=shape.depth, joint_attention_dim=shape.context, caption_projection_dim=shape.width,
        pooled_projection_dim=shape.pooled, pos_embed_max_size=shape.grid,
    )
    weights = dict(ours(shape, dtype=dtype).state_dict())  # its own dict: conversion takes entries out
    made.load_state_dict(convert.convert_sd3_transformer_checkpoint_to_diffusers(weights))
    return made.eval().requires_grad_(False).to(dtype)


def their_pipeline(shape: Shape, *, layers: list[str], dtype: torch.dtype) -> Any:
    """diffusers' pipeline, without text encoders and VAE."""
    diffusers = importlib.import_module("diffusers")
    empty = dict.fromkeys((
        "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
    ))
    pipe = diffusers.StableDiffusion3PAGPipeline(
        transformer=their_transformer(shape, dtype=dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), pag_applied_layers=layers, **empty,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Recorded:
    """One step of the pipeline: the guided velocity that its scheduler got, and at which latents."""

    velocity: Tensor
    timestep: float
    latents: Tensor


@dataclass(frozen=True)
class Prompts:
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]

    @classmethod
    def drawn(cls, shape: Shape, *, images: int, dtype: torch.dtype) -> Prompts:
        generator = torch.Generator().manual_seed(7)
        made = [
            {
                "crossattn": torch.randn(images, TEXT, shape.context, generator=generator).to(dtype),
                "vector": torch.randn(images, shape.pooled, generator=generator).to(dtype),
            }
            for _ in range(2)
        ]
        return cls(*made)

    @property
    def for_diffusers(self) -> dict[str, Tensor]:
        return {
            "prompt_embeds": self.cond["crossattn"], "pooled_prompt_embeds": self.cond["vector"],
            "negative_prompt_embeds": self.uncond["crossattn"], "negative_pooled_prompt_embeds": self.uncond["vector"],
        }


def record(pipe: Any, **arguments: Any) -> list[Recorded]:
    steps: list[Recorded] = []
    original = pipe.scheduler.step

    def step(velocity: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(Recorded(velocity.clone(), float(timestep), sample.clone()))
        return original(velocity, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = step
    pipe(output_type="latent", **arguments)
    return steps


def our_velocity(model: MMDiT, given: Recorded, settings: Settings, *, prompts: Prompts, cfg_scale: float) -> Tensor:
    """The same step by the engine, in x0 as the WebUI's denoiser gives it; without CFG no unconditional rows."""
    images, with_cfg = len(given.latents), cfg_scale > 1
    rows, topology = StepRows.plain(images), topology_of(model)
    plan = plan_at(settings, topology, progress=0.5)
    assert plan is not None

    def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        velocity = model(x, 1000 * sigma, y=cond["vector"], context=cond["crossattn"])
        return x - sigma[:, None, None, None] * velocity

    step = GuidedStep(plan, topology=topology, rows=rows, space=SigmaSpace())
    sources = (prompts.cond, prompts.uncond) if with_cfg else (prompts.cond,)
    cond = {key: torch.cat([source[key] for source in sources]) for key in prompts.cond}
    x = torch.cat([given.latents] * len(sources))
    sigma = given.timestep / 1000
    out = step(denoise, x, torch.full((len(x),), sigma, dtype=x.dtype), cond=cond, rows=rows.rows[: len(x)])
    step.finish()
    conds, unconds = out[:images], out[images:]
    guided = step.apply(unconds + cfg_scale * (conds - unconds) if with_cfg else conds)
    return (given.latents - guided) / sigma


class Comparison:
    """A pipeline's recorded steps, and the engine on the same weights."""

    def __init__(
        self, layers: list[str], *, cfg_scale: float, dtype: torch.dtype, shape: Shape = SHAPE,
        size: tuple[int, int] = (16, 24), images: int = 2, scale: float = 0.7,
    ) -> None:
        self.model, self.cfg_scale = ours(shape, dtype=dtype), cfg_scale
        self.prompts = Prompts.drawn(shape, images=images, dtype=dtype)
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(images, shape.latents, *size, generator=generator).to(dtype)
        self.recorded = record(
            their_pipeline(shape, layers=layers, dtype=dtype), num_inference_steps=STEPS, guidance_scale=cfg_scale,
            pag_scale=scale, latents=latents, height=8 * size[0], width=8 * size[1], **self.prompts.for_diffusers,
        )

    def error(self, blocks: str, *, scale: float = 0.7) -> float:
        settings = Settings(pag_enabled=True, pag_scale=scale, pag_blocks=blocks)
        made = [
            our_velocity(self.model, given, settings, prompts=self.prompts, cfg_scale=self.cfg_scale)
            for given in self.recorded
        ]
        return largest_error(made, [given.velocity for given in self.recorded])


@precisions
@cfg
@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        (["blocks.0"], "blocks.0"), (["blocks.1"], "blocks.1"), (["blocks.3"], "joint.3"), (["blocks.5"], "joint.5"),
        (["blocks.2", "blocks.4"], "blocks.2, blocks.4"), (["transformer_blocks.[1-4]"], "joint.1-4"),
    ],
    ids=str,
)
def test_pag(layers: list[str], blocks: str, cfg_scale: float, dtype: torch.dtype) -> None:
    comparison = Comparison(layers, cfg_scale=cfg_scale, dtype=dtype)
    assert len(comparison.recorded) == STEPS
    assert comparison.error(blocks) < TOLERANCE[dtype]
    assert comparison.error(blocks, scale=0.77) > 10 * TOLERANCE[dtype], "the guidance is too weak to be compared"


@cfg
@pytest.mark.parametrize(("size", "images"), [((24, 16), 1), ((8, 40), 3)], ids=str)
def test_other_sizes(size: tuple[int, int], images: int, cfg_scale: float) -> None:
    comparison = Comparison(["blocks.2"], cfg_scale=cfg_scale, dtype=torch.float32, size=size, images=images, scale=3.0)
    assert comparison.error("joint.2", scale=3.0) < TOLERANCE[torch.float32]


def test_their_blocks_1_is_also_10_to_19() -> None:
    """diffusers searches its layer names for the pattern ``blocks.1``; here it is block 1 alone."""
    comparison = Comparison(["blocks.1"], cfg_scale=5.0, dtype=torch.float32, shape=MANY)
    assert comparison.error("joint.1, joint.10-13") < TOLERANCE[torch.float32]
    assert comparison.error("blocks.1") > 10 * TOLERANCE[torch.float32]
    one = Comparison([r"blocks\.1\."], cfg_scale=5.0, dtype=torch.float32, shape=MANY)
    assert one.error("blocks.1") < TOLERANCE[torch.float32]
