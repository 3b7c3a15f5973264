"""Where guidance points, seen in one step: ``python -m sag_pag.demo.directions`` writes a table and a picture of it.

A drawn picture gets noise, the model predicts the picture, and guidance at scale 1 moves that prediction. How large is
the move beside what the prediction misses of the picture, and does it point there? The picture shows what guidance
leads away from: the prediction that PAG's identity attention or SAG's blurred input gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sag_pag.demo import data
from sag_pag.demo.grid import labelled_rows
from sag_pag.demo.layers import fused_attention
from sag_pag.demo.metrics import Estimate
from sag_pag.demo.model import DemoModel, load
from sag_pag.demo.pages import write_part
from sag_pag.demo.sampling import GuidedDenoiser, Recipe, noise_levels
from sag_pag.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "demo-evaluation.md"
BEGIN, END = "<!-- directions -->", "<!-- end of directions -->"
GUIDANCE = {
    "PAG": Settings(pag_enabled=True, pag_scale=1.0),
    "SAG": Settings(sag_enabled=True, sag_scale=1.0),
}
BEGINS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the way from noise to picture at which it is measured."""
SEED = 6 * 10**6


@dataclass(frozen=True)
class Direction:
    """Of many pictures: the move's size over the miss's, and the cosine of the angle between them."""

    size: float
    cosine: Estimate


@dataclass(frozen=True)
class Predictions:
    """Drawn pictures ``(B, 3, 64, 64)``, their latents, and what is predicted of them unguided and by each guidance."""

    drawn: Tensor
    latent: Tensor
    plain: Tensor
    guided: Mapping[str, Tensor]


@torch.no_grad()
def predict(model: DemoModel, *, sigma: float, count: int, seed: int = SEED) -> Predictions:
    """Unconditional predictions at noise level ``sigma``, at scale 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = data.render(data.draw_scenes(count, generator))
    latent = model.first_stage_model.encode(drawn)
    x = latent + sigma * torch.randn(latent.shape, generator=generator)
    empty = model.context([""] * count)

    def predicted(settings: Settings) -> Tensor:
        return GuidedDenoiser(model, Recipe(settings=settings), context=empty, empty=empty)(x, sigma)

    with fused_attention():
        guided = {name: predicted(settings) for name, settings in GUIDANCE.items()}
        return Predictions(drawn, latent, predicted(Settings()), guided)


def directions(model: DemoModel, *, sigma: float, count: int, batch: int = 50) -> dict[str, Direction]:
    """How each guidance moves unconditional predictions at noise level ``sigma``."""
    parts = [
        predict(model, sigma=sigma, count=min(batch, count - first), seed=SEED + first)
        for first in range(0, count, batch)
    ]
    misses = torch.cat([(part.latent - part.plain).flatten(1) for part in parts])
    return {
        name: compared(torch.cat([(part.guided[name] - part.plain).flatten(1) for part in parts]), misses)
        for name in GUIDANCE
    }


def compared(moves: Tensor, misses: Tensor) -> Direction:
    """From one row a picture."""
    cosines = torch.cosine_similarity(moves, misses)
    margin = 1.96 * cosines.std().item() / math.sqrt(len(cosines))
    return Direction((moves.norm() / misses.norm()).item(), Estimate(cosines.mean().item(), margin))


def table(model: DemoModel, *, count: int = 400, begins: Sequence[float] = BEGINS) -> str:
    """The Markdown table."""
    lines = ["| noise level | guidance | move at scale 1, over what is missed | cosine |", "| --- | --- | --- | --- |"]
    for begin in begins:
        sigma = noise_levels(20, begin)[0]
        for name, found in directions(model, sigma=sigma, count=count).items():
            cosine = f"{found.cosine.value:+.3f} ± {found.cosine.margin:.3f}"
            lines.append(f"| {sigma:.2f} | {name} | {found.size:.2f} | {cosine} |")
    return "\n".join(lines)


@torch.no_grad()
def degraded(model: DemoModel, *, sigma: float, count: int) -> dict[str, Tensor]:
    """Drawn pictures ``(count, 3, 64, 64)``, what is predicted of them without a caption, and the degraded predictions.

    At scale 1 guidance gives ``plain + (plain - degraded)``, from which the engine's degraded prediction follows.
    """
    found = predict(model, sigma=sigma, count=count)
    shown = {"predicted": found.plain}
    shown |= {f"degraded by {name}": 2 * found.plain - guided for name, guided in found.guided.items()}
    return {"drawn": found.drawn} | {name: model.first_stage_model.decode(value) for name, value in shown.items()}


def draw_degraded(model: DemoModel, *, begin: float = 0.25, count: int = 8) -> Image.Image:
    """The picture: a row of each kind."""
    return labelled_rows(degraded(model, sigma=noise_levels(20, begin)[0], count=count))


def main() -> None:
    """Replaces the table between the two marks in the docs, and the picture beside."""
    model = load()
    write_part(PAGE, BEGIN, END, table(model))
    draw_degraded(model).save(PAGE.with_suffix("") / "degraded.png")


if __name__ == "__main__":
    main()
