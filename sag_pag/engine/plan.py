"""What one step does: scales at its place in the run, and the blocks of the model that runs it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from sag_pag.engine.blocks import AttentionSite, BlockNameError, Topology
from sag_pag.engine.topology import check_names
from sag_pag.settings import BLOCKS_OF, FEATURES, PARAMETERS, SettingError, Settings, Switchable

HiresPass = Literal["first pass", "hires pass"]
Scales = Mapping[Switchable, float]
"""The scale of each feature in a step; 0 where it does nothing."""


@dataclass(frozen=True)
class StepPlan:
    """What one step does. A scale of 0 means that the feature does nothing in this step."""

    sag_scale: float
    pag_scale: float
    read: AttentionSite | None
    perturbed: tuple[AttentionSite, ...]
    settings: Settings


@dataclass(frozen=True)
class ChosenBlocks:
    """The blocks that settings choose on one model.

    ``sites`` by feature, without those that the model does not have; ``unknown`` are the names and ranges of which it
    has nothing; ``standing_in`` is the block that stands in for a list that nobody need have typed. A feature that the
    model's family can't do has no sites, and is in ``refused`` with the reason.
    """

    sites: Mapping[Switchable, tuple[AttentionSite, ...]]
    unknown: Mapping[Switchable, tuple[str, ...]]
    standing_in: Mapping[Switchable, str]
    refused: Mapping[Switchable, str]


def choose_blocks(settings: Settings, topology: Topology) -> ChosenBlocks:
    """What the settings' block lists choose on this model. Worked out once a run and model."""
    refused = {feature: reason for feature in FEATURES if (reason := refusal(feature, settings, topology))}
    texts = {feature: str(getattr(settings, BLOCKS_OF[feature])) for feature in FEATURES if feature not in refused}
    stands = {feature: topology.stand_in(text) for feature, text in texts.items()}
    none = dict.fromkeys(refused, ())
    return ChosenBlocks(
        sites={**none, **{feature: topology.resolve_known(text) for feature, text in texts.items()}},
        unknown={**none, **{feature: tuple(topology.unknown(text)) for feature, text in texts.items()}},
        standing_in={feature: sites[0].block_name for feature, sites in stands.items() if sites},
        refused=refused,
    )


def refusal(feature: Switchable, settings: Settings, topology: Topology) -> str | None:
    """Why this model's family can't do what the settings ask of a feature; ``None`` if it can."""
    if reason := topology.refuses(f"{feature}_enabled", True):
        return reason
    way = settings.pag_perturbation
    reason = topology.refuses("pag_perturbation", way) if feature == "pag" else None
    return f"{way} are {reason}" if reason else None


def check_blocks(settings: Settings, topology: Topology | None) -> None:
    """Raises ``SettingError`` if a feature that is on names no block, or blocks that ``topology`` does not have.

    Without a topology only the form of the names is checked.
    """
    for feature in FEATURES:
        if getattr(settings, f"{feature}_enabled"):
            check_blocks_of(feature, settings, topology)


def check_blocks_of(feature: Switchable, settings: Settings, topology: Topology | None) -> None:
    """Raises ``SettingError`` as :func:`check_blocks` does, for one feature whether it is on or not.

    Also for a perturbation that the model's family does not have. Of a feature that it does not have at all, which is
    no setting's fault, only the form of the names is checked.
    """
    name = BLOCKS_OF[feature]
    if topology is not None and topology.refuses(f"{feature}_enabled", True):
        topology = None
    if topology is not None and feature == "pag":
        way = settings.pag_perturbation
        if reason := topology.refuses("pag_perturbation", way):
            usable = " or ".join(repr(choice) for choice in topology.perturbations)
            raise SettingError("pag_perturbation", way, f"{usable} on this model; {way} are {reason}")
    text = str(getattr(settings, name))
    allowed = topology.describe() if topology is not None else PARAMETERS[name].allowed
    if not text.strip(", "):
        raise SettingError(name, text, allowed)
    sites: tuple[AttentionSite, ...] = ()
    try:
        if topology is None:
            check_names(text)
        else:
            sites = topology.resolve(text)
    except BlockNameError as error:
        raise SettingError(name, error.unknown, error.allowed, meant=error.meant) from error
    if name == "sag_block" and ("," in text or len({site.block_name for site in sites}) > 1):
        raise SettingError(name, text, f"one block{f' of {topology.describe()}' if topology else ''}")


def guides_pass(settings: Settings, hires: HiresPass | None) -> bool:
    """Whether this pass of hires. fix is to be guided; ``None`` where a picture is made without it."""
    return hires is None or settings.hires_pass in ("both passes", hires)


def scales_at(settings: Settings, *, progress: float, number: int = 0, hires: HiresPass | None = None) -> Scales:
    """The features' scales at ``progress`` (0 noise, 1 picture; ``(999 - timestep) / 1000``), whatever the model.

    ``number`` is that of the sampler's step in its pass, from 0 on. ``hires`` is the pass of hires. fix, ``None`` where
    the picture is made without it.
    """
    if not guides_pass(settings, hires):
        return dict.fromkeys(FEATURES, 0.0)
    own = hires == "hires pass" and settings.hires_own_scales
    scales: dict[Switchable, float] = {}
    for feature in FEATURES:
        on, start, end, every = (
            getattr(settings, f"{feature}_{name}") for name in ("enabled", "start", "end", "every")
        )
        scale: float = getattr(settings, f"hires_{feature}_scale" if own else f"{feature}_scale")
        scales[feature] = scale if on and start <= progress <= end and number % every == 0 else 0.0
    if not settings.sag_blur_sigma:
        scales["sag"] = 0.0
    if settings.pag_fade and settings.pag_end > settings.pag_start:
        scales["pag"] *= (settings.pag_end - progress) / (settings.pag_end - settings.pag_start)
    return scales


def asks_for(feature: Switchable, settings: Settings, passes: Collection[HiresPass | None]) -> bool:
    """Whether a feature is to do something in one of these passes of hires. fix, once a step lies in its range."""
    start: float = getattr(settings, f"{feature}_start")
    return any(scales_at(settings, progress=start, hires=hires)[feature] for hires in passes)


def plan_step(settings: Settings, chosen: ChosenBlocks, scales: Scales) -> StepPlan | None:
    """What to do in a step with these scales on the model that ``chosen`` is of, or ``None`` for nothing."""
    sag_scale, pag_scale = (scales[feature] if chosen.sites[feature] else 0.0 for feature in ("sag", "pag"))
    if not sag_scale and not pag_scale:
        return None
    read = chosen.sites["sag"][0] if chosen.sites["sag"] else None
    return StepPlan(sag_scale, pag_scale, read, chosen.sites["pag"], settings)


def plan_at(
    settings: Settings, topology: Topology, *, progress: float, hires: HiresPass | None = None
) -> StepPlan | None:
    """What to do in a single step at ``progress``, or ``None`` for nothing."""
    return plan_step(settings, choose_blocks(settings, topology), scales_at(settings, progress=progress, hires=hires))
