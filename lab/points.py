"""What ``evaluate`` measures: the default set and the sweeps, each point one way of making pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from sag_pag.demo.model import OWN_DEFAULTS, PAG_SCALE
from sag_pag.demo.sampling import Recipe, noise_levels
from sag_pag.settings import BLURRED, PARAMETERS, Settings, Value, implied_by

Mode = Literal["unconditional", "captioned", "captioned, CFG 3"]
MODES: tuple[Mode, ...] = ("unconditional", "captioned", "captioned, CFG 3")
SWEPT_MODES: tuple[Mode, ...] = ("unconditional", "captioned, CFG 3")
Feature = Literal["sag", "pag"]
FEATURES: tuple[Feature, ...] = ("sag", "pag")
Part = Literal["sag", "pag", "cfg"]
PARTS: tuple[Part, ...] = (*FEATURES, "cfg")
DEFAULT = "default"
"""The name of the default set beside those of the sweeps."""


@dataclass(frozen=True)
class Point:
    """One way of making pictures: ``label`` tells it from the sweep's others, ``x`` is its place on an axis."""

    sweep: str
    label: str
    mode: Mode
    recipe: Recipe
    x: float | None = None

    @property
    def captioned(self) -> bool:
        return self.mode != "unconditional"

    @property
    def mixed(self) -> bool:
        """Whether it is of a map of mixes with CFG."""
        return self.sweep in (MIX, BEST_MIX)

    @property
    def baseline(self) -> Point:
        """The same from noise on and without guidance; in a map of mixes with CFG, CFG alone at its best."""
        if self.mixed:
            return _mixed(BEST_CFG, "CFG alone", {}, sweep=self.sweep, steps=self.recipe.steps)
        recipe = replace(self.recipe, settings=Settings(), begin=0.0)
        return replace(self, label="from noise alone" if self.recipe.begin else "none", recipe=recipe, x=0.0)

    def alone(self, feature: Feature) -> Point:
        """The same with the other feature switched off."""
        switches = {f"{name}_enabled": name == feature for name in FEATURES}
        return replace(self, recipe=replace(self.recipe, settings=self.recipe.settings.with_values(switches)))

    @property
    def parts(self) -> dict[Part, Point]:
        """What a mix is made of: each of both methods alone; in a map of mixes with CFG, CFG alone at its scale."""
        settings = self.recipe.settings
        if self.mixed and settings.enabled:
            return {"cfg": _mixed(self.recipe.cfg, "CFG alone", {}, sweep=self.sweep, steps=self.recipe.steps)}
        both = settings.sag_enabled and settings.pag_enabled
        return {feature: self.alone(feature) for feature in FEATURES} if both else {}

    def key(self, *, judged: str, group_size: int, bf16: bool) -> str:
        """A short name for resuming: of the weights, and of all in the recipe that has an effect. Not of the code."""
        recipe = {**asdict(self.recipe), "settings": self.recipe.settings.infotext()}
        about = json.dumps([judged, group_size, bf16, self.captioned, recipe], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()[:16]


PANEL_PAG_SCALE = Settings().pag_scale
"""The extension's own default."""


def _recipe(mode: Mode, values: dict[str, object], *, steps: int) -> Recipe:
    settings = Settings().with_values({**OWN_DEFAULTS, **implied_by(values), **values})
    return Recipe(settings=settings, cfg=3.0 if mode == "captioned, CFG 3" else 1.0, steps=steps)


def _switched_on(*features: Feature) -> dict[str, object]:
    return {f"{feature}_enabled": True for feature in features}


_GRID: dict[str, dict[str, object]] = {
    "SAG": _switched_on("sag"),
    f"PAG {PAG_SCALE:g}": _switched_on("pag"),
    f"SAG+PAG {PAG_SCALE:g}": _switched_on("sag", "pag"),
}
"""What the grid shows beside no guidance."""


def default_points(steps: int = 20) -> list[Point]:
    """No guidance, SAG, PAG and both, and PAG at the extension's own default scale, in every mode."""
    panel: dict[str, object] = {"pag_scale": PANEL_PAG_SCALE}
    variants: dict[str, dict[str, object]] = {"none": {}, **_GRID, f"PAG {PANEL_PAG_SCALE:g}": panel}
    return [
        Point(DEFAULT, label, mode, _recipe(mode, values, steps=steps))
        for mode in MODES
        for label, values in variants.items()
    ]


INPUT_BLOCK = "input.1"
"""Where PAG gains at the extension's own scale, which is too strong for the middle block of this model."""
_SCALARS: dict[str, tuple[str, tuple[float, ...], dict[str, Value]]] = {
    "pag-scale": ("pag_scale", (0.5, 1.0, 2.0, 3.0, 4.0, 6.0), {}),
    "pag-input-scale": ("pag_scale", (0.5, 1.0, 2.0, 3.0, 5.0), {"pag_blocks": INPUT_BLOCK}),
    "pag-input-start": (
        "pag_start", (0.0, 0.1, 0.15, 0.25, 0.35, 0.5), {"pag_blocks": INPUT_BLOCK, "pag_scale": PANEL_PAG_SCALE},
    ),
    "sag-scale": ("sag_scale", (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), {}),
    "sag-threshold": ("sag_threshold", (0.0, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6), {}),
    "sag-sigma": ("sag_blur_sigma", (0.5, 1.0, 1.5, 2.0, 3.0, 5.0), {}),
}  # fmt: skip
"""What is swept, its values, and what else is not as by default."""

_BLOCKS = (
    INPUT_BLOCK,
    "middle",
    "output.0",
    "output.1",
    "input.1, middle",
    "middle, output.0",
    "input.1, middle, output.0-1",
)
_RANGES = ((0.0, 0.25), (0.0, 0.5), (0.0, 0.75), (0.25, 0.5), (0.25, 0.75), (0.25, 1.0), (0.5, 1.0))
_BEGINS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Where the model goes on from drawn pictures under noise, unguided: from which noise level on is it right?"""

_IN_INPUT_BLOCK: dict[str, object] = {"pag_scale": PANEL_PAG_SCALE, "pag_blocks": INPUT_BLOCK}
_PAG_LATER: dict[str, object] = {**_IN_INPUT_BLOCK, "pag_start": 0.15}
_PAG_LATER_NAME = f"PAG {PANEL_PAG_SCALE:g} ({INPUT_BLOCK}, 0.15 to 1)"
_SAG_LATER: dict[str, object] = {"sag_start": 0.25}
_SAG_LATER_NAME = "SAG (0.25 to 1)"
_CHOSEN: dict[Mode, dict[str, dict[str, object]]] = {
    "unconditional": {
        **_GRID,
        "PAG 1 (0 to 0.25)": {"pag_scale": 1.0, "pag_end": 0.25},
        f"PAG {PAG_SCALE:g} ({INPUT_BLOCK} and middle)": {"pag_blocks": f"{INPUT_BLOCK}, middle"},
        _PAG_LATER_NAME: _PAG_LATER,
        _SAG_LATER_NAME: _SAG_LATER,
        f"{_SAG_LATER_NAME} + PAG {PAG_SCALE:g}": {**_SAG_LATER, "pag_scale": PAG_SCALE},
        f"{_SAG_LATER_NAME} + {_PAG_LATER_NAME}": {**_SAG_LATER, **_PAG_LATER},
    },
    "captioned": {**_GRID, _PAG_LATER_NAME: _PAG_LATER, _SAG_LATER_NAME: _SAG_LATER},
    "captioned, CFG 3": {
        **_GRID, _PAG_LATER_NAME: _PAG_LATER, f"PAG {PANEL_PAG_SCALE:g} ({INPUT_BLOCK})": _IN_INPUT_BLOCK,
    },
}  # fmt: skip
"""What the grid shows, and the best of the other sweeps, for seeds that they were not chosen on."""

MIX = "mix"
BEST_CFG = 2.0
"""Of CFG alone, as the map of mixes shows."""
_MIXED_CFG = (1.0, 1.5, 2.0, 3.0)
_SEG: dict[str, object] = {"pag_perturbation": BLURRED}
_MIXED: dict[str, tuple[str, tuple[float, ...], dict[str, object]]] = {
    "SAG": ("sag_scale", (0.375, 0.75), {}),
    "PAG": ("pag_scale", (0.25, 0.5), {}),
    "SEG": ("pag_scale", (0.5, 1.0), _SEG),
}
"""What is mixed with CFG: a method's scale, its values, and what else it needs."""

BEST_MIX = "best-mix"
_BEST_MIXES = ("CFG alone, CFG 2", "PAG 0.5, CFG 1.5", "SAG 0.75, CFG 2")
"""The best of the map, for seeds that they were not chosen on."""

CHOSEN = "chosen"
SWEEPS = (*_SCALARS, "pag-blocks", "sag-block", "range", "cost", "begin", MIX, BEST_MIX, CHOSEN)
ON_FIRST_SEEDS = (DEFAULT, *(sweep for sweep in SWEEPS if sweep not in (BEST_MIX, CHOSEN)))
"""Measured on the first groups of seeds; what was chosen there is for others."""
_IN_ALL_MODES = ("pag-input-start", CHOSEN)


def axis_title(sweep: str) -> str:
    """What ``Point.x`` is in a sweep whose points have one."""
    if sweep not in _SCALARS:
        return "noise level that it goes on from"
    name, _, others = _SCALARS[sweep]
    kept = [f"{PARAMETERS[other].infotext} {PARAMETERS[other].format(value)}" for other, value in others.items()]
    return PARAMETERS[name].infotext + (f" ({', '.join(kept)})" if kept else "")


def sweep_points(sweep: str, *, modes: Sequence[Mode] = (), steps: int = 20) -> list[Point]:
    """The points of one sweep, each mode's unguided one first. Raises ``ValueError`` for an unknown sweep.

    Without ``modes`` in those that the sweep is made for.
    """
    if sweep == MIX:
        return mixes(steps)
    if sweep == BEST_MIX:
        return [replace(point, sweep=BEST_MIX) for point in mixes(steps) if point.label in _BEST_MIXES]
    points: list[Point] = []
    for mode in modes or (MODES if sweep in _IN_ALL_MODES else SWEPT_MODES):
        added = _begins(mode, steps) if sweep == "begin" else [
            Point(sweep, label, mode, _recipe(mode, values, steps=steps), x)
            for label, values, x in _variants(sweep, mode)
        ]
        points += [added[0].baseline, *added]
    return points


def _mixed(cfg: float, label: str, values: dict[str, object], *, sweep: str = MIX, steps: int) -> Point:
    recipe = replace(_recipe("captioned", values, steps=steps), cfg=cfg)
    return Point(sweep, f"{label}, CFG {cfg:g}", "captioned", recipe, cfg)


def mixes(steps: int = 20) -> list[Point]:
    """CFG alone, its best first, then every method at some scales with some CFG scales."""
    alone = [_mixed(cfg, "CFG alone", {}, steps=steps) for cfg in (BEST_CFG, *_MIXED_CFG)]
    return [*dict.fromkeys(alone), *(
        _mixed(cfg, f"{method} {scale:g}", {**others, name: scale}, steps=steps)
        for method, (name, scales, others) in _MIXED.items() for scale in scales for cfg in _MIXED_CFG
    )]


def _begins(mode: Mode, steps: int) -> list[Point]:
    found = []
    for begin in _BEGINS:
        level = noise_levels(steps, begin)[0]
        recipe = replace(_recipe(mode, {}, steps=steps), begin=begin)
        found.append(Point("begin", f"from noise level {level:.1f}", mode, recipe, level))
    return found


def _variants(sweep: str, mode: Mode) -> list[tuple[str, dict[str, object], float | None]]:
    if sweep in _SCALARS:
        name, values, others = _SCALARS[sweep]
        return [(f"{value:g}", {**others, name: value}, value) for value in values]
    if sweep == "pag-blocks":
        return [
            (f"PAG {scale:g}, {blocks}", {"pag_scale": scale, "pag_blocks": blocks}, None)
            for scale in (PAG_SCALE, PANEL_PAG_SCALE)
            for blocks in _BLOCKS
        ]
    if sweep == "sag-block":
        return [(block, {"sag_block": block}, None) for block in _BLOCKS if "," not in block]
    if sweep == "range":
        limited = [(f"PAG {scale:g}", "pag", {"pag_scale": scale}) for scale in (1.0, PANEL_PAG_SCALE)]
        return [
            (f"{label}, {start:g} to {end:g}", {**values, f"{feature}_start": start, f"{feature}_end": end}, None)
            for label, feature, values in (*limited, ("SAG", "sag", {}))
            for start, end in _RANGES
        ]
    if sweep == "cost":
        variants: list[tuple[str, dict[str, object], float | None]] = []
        methods: dict[str, tuple[Feature, ...]] = {"PAG": ("pag",), "SAG": ("sag",), "SAG+PAG": FEATURES}
        for label, features in methods.items():
            enabled = _switched_on(*features)
            variants += [
                (f"{label}, every {every}", {**enabled, **{f"{feature}_every": every for feature in features}}, None)
                for every in (1, 2, 3, 4)
            ]
            for start, end in ((0.0, 0.5), (0.25, 0.75)):
                limits = {f"{feature}_start": start for feature in features}
                limits |= {f"{feature}_end": end for feature in features}
                variants.append((f"{label}, {start:g} to {end:g}", {**enabled, **limits}, None))
        return variants
    if sweep == CHOSEN:
        return [(label, values, None) for label, values in _CHOSEN[mode].items()]
    raise ValueError(f"unknown sweep {sweep!r}; known are {', '.join(SWEEPS)}")
