"""Sampling from the demo model with the engine's guidance: what the WebUI does in a step, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sag_pag.demo.autoencoder import FACTOR, LATENT_CHANNELS
from sag_pag.demo.model import DemoModel
from sag_pag.demo.schedule import TIMESTEPS, sigma_of, timestep_of
from sag_pag.engine.calls import Denoiser
from sag_pag.engine.plan import choose_blocks, plan_step, scales_at
from sag_pag.engine.rows import StepRows
from sag_pag.engine.spaces import SigmaSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

Denoise = Callable[[Tensor, float], Tensor]
"""``x`` at a noise level to the guided prediction of x0."""
OnStep = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """How to make pictures. ``cfg`` 1 is without CFG.

    ``begin`` is the share of the steps that is left out because the pictures are there already, as in img2img.
    """

    settings: Settings = field(default_factory=Settings)
    cfg: float = 1.0
    steps: int = 20
    sampler: str = "euler"
    begin: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")
        if not 0 <= self.begin < 1:
            raise ValueError("begin must be at least 0 and below 1")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; known are {', '.join(SAMPLERS)}")
        self.settings.check_order()


def parse_seeds(text: str, *, most: int) -> list[int]:
    """``1-4,9`` as 1, 2, 3, 4, 9. Raises ``ValueError`` for anything else, for none and for more than ``most``."""
    ranges = []
    for part in text.split(","):
        first, _, last = (number.strip() for number in part.partition("-"))
        if not first.isdecimal() or not (last or first).isdecimal() or max(len(first), len(last)) > 18:
            raise ValueError(f"{text!r} are no seeds; write them like 1-4,9")
        ranges.append(range(int(first), int(last or first) + 1))
    count = sum(len(seeds) for seeds in ranges)
    if not 0 < count <= most:
        raise ValueError(f"{text!r} are {count} seeds; 1 to {most} can be shown")
    return [seed for seeds in ranges for seed in seeds]


def noise_of(seeds: Sequence[int], *, size: int) -> Tensor:
    """Standard normal latents ``(B, 8, size/4, size/4)``; a seed gives the same one in any batch."""
    shape = (LATENT_CHANNELS, size // FACTOR, size // FACTOR)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def noise_levels(steps: int, begin: float = 0.0) -> list[float]:
    """``steps + 1`` falling noise levels: equally spaced timesteps from the noisiest on, then 0; from ``begin`` on."""
    timesteps = torch.linspace(TIMESTEPS - 1, 0, steps + 1, dtype=torch.float64)[:-1]
    return [*sigma_of(timesteps).tolist(), 0.0][round(begin * steps) :]


class GuidedDenoiser:
    """The model with CFG and with the engine's guidance, as ``CFGDenoiser`` is in the WebUI.

    ``context`` and ``empty`` are ``(B, 7, 64)``: the captions' and the empty caption's. Without CFG the captions' rows
    are the only ones, and an unconditional picture is one whose caption is empty.
    """

    def __init__(self, model: DemoModel, recipe: Recipe, *, context: Tensor, empty: Tensor) -> None:
        self.denoise: Denoiser = model.denoise
        self.recipe = recipe
        self.topology = UNetTopology(model.unet)
        self.images = len(context)
        self.cond = context if recipe.cfg == 1 else torch.cat((context, empty))
        self.rows = StepRows.plain(self.images)
        self.chosen = choose_blocks(recipe.settings, self.topology)
        self.calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        rows = x if self.recipe.cfg == 1 else torch.cat((x, x))
        levels = x.new_full((len(rows),), sigma)
        progress = (TIMESTEPS - 1 - timestep_of(torch.tensor(sigma)).item()) / TIMESTEPS
        settings = self.recipe.settings
        plan = plan_step(settings, self.chosen, scales_at(settings, progress=progress, number=self.calls))
        self.calls += 1
        if plan is None:
            return self._combined(self.denoise(rows, levels, cond=self.cond))
        step = GuidedStep(plan, topology=self.topology, rows=self.rows, space=SigmaSpace())
        carried = self.rows.rows[: len(rows)]
        combined = self._combined(step(self.denoise, rows, levels, cond=self.cond, rows=carried))
        step.finish()
        return step.apply(combined)

    def _combined(self, out: Tensor) -> Tensor:
        if self.recipe.cfg == 1:
            return out
        cond, uncond = torch.split(out, self.images)
        return torch.lerp(uncond, cond, self.recipe.cfg)


def _euler(denoise: Denoise, x: Tensor, levels: list[float]) -> Iterator[Tensor]:
    """Euler's method in sigma (Karras et al., arXiv 2206.00364); DDIM without noise is the same thing."""
    for sigma, following in pairwise(levels):
        x0 = denoise(x, sigma)
        x = x0 + (x - x0) * (following / sigma)
        yield x


def _heun(denoise: Denoise, x: Tensor, levels: list[float]) -> Iterator[Tensor]:
    """Heun's method (Karras et al., algorithm 1): two predictions a step."""
    for sigma, following in pairwise(levels):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + slope * (following - sigma)
        if following:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + slope * (following - sigma)
        yield x


def _dpmpp_2m(denoise: Denoise, x: Tensor, levels: list[float]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2) in sigma; the last step is first order."""
    previous: tuple[float, Tensor] | None = None
    for sigma, following in pairwise(levels):
        x0 = denoise(x, sigma)
        target = x0
        if previous is not None and following:
            before, x0_before = previous
            step, last = (torch.tensor([sigma / following, before / sigma], dtype=torch.float64)).log().tolist()
            target = x0 + (x0 - x0_before) * (step / (2 * last))
        x = target + (x - target) * (following / sigma)
        previous = sigma, x0
        yield x


SAMPLERS: dict[str, Callable[[Denoise, Tensor, list[float]], Iterator[Tensor]]] = {
    "euler": _euler,
    "heun": _heun,
    "dpm++2m": _dpmpp_2m,
}


@torch.no_grad()
def sample(
    model: DemoModel,
    captions: Sequence[str],
    *,
    seeds: Sequence[int],
    recipe: Recipe,
    size: int = 64,
    drawn: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents ``(B, 8, size/4, size/4)`` of one picture for each caption and seed.

    ``drawn`` are latents of pictures to begin from (the noise is added to them), which a recipe with ``begin`` needs.
    Raises ``CaptionError`` for a caption that the model cannot read, ``ValueError`` for unequal numbers of both.
    """
    if recipe.begin and drawn is None:
        raise ValueError("nothing to begin from")
    if len(captions) != len(seeds):
        raise ValueError(f"{len(captions)} captions for {len(seeds)} seeds")
    context, empty = model.context(captions), model.context([""] * len(captions))
    denoise = GuidedDenoiser(model, recipe, context=context, empty=empty)
    levels = noise_levels(recipe.steps, recipe.begin)
    x = noise_of(seeds, size=size).to(context) * levels[0]
    if drawn is not None:
        x += drawn
    for following in SAMPLERS[recipe.sampler](denoise, x, levels):
        x = following
        if on_step is not None:
            on_step()
    return x


def count_gigaflops(model: DemoModel, caption: str, *, recipe: Recipe, size: int = 64) -> float:
    """Floating-point operations of one picture, counted, in billions."""
    drawn = noise_of([0], size=size) if recipe.begin else None
    with FlopCounterMode(display=False) as counter:
        sample(model, [caption], seeds=[0], recipe=recipe, size=size, drawn=drawn)
    return float(counter.get_total_flops()) / 1e9
