"""The picture that shows what the guidances do: the same seeds without, with SAG, with PAG and with both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sag_pag.demo.layers import fused_attention
from sag_pag.demo.model import DemoModel
from sag_pag.demo.sampling import Recipe, count_gigaflops, sample
from sag_pag.engine.plan import check_blocks
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

CAPTIONS = (
    "red star on green",
    "yellow moon on black",
    "white heart on red",
    "purple cross on orange",
    "green disc and orange square on blue",
    "red heart and white star on purple",
)
"""What the grid shows unless told otherwise."""

VARIANTS: tuple[tuple[str, dict[str, object]], ...] = (
    ("no guidance", {"sag_enabled": False, "pag_enabled": False}),
    ("SAG", {"sag_enabled": True, "pag_enabled": False}),
    ("PAG", {"sag_enabled": False, "pag_enabled": True}),
    ("SAG + PAG", {"sag_enabled": True, "pag_enabled": True}),
)


_GREY, _BAND = (110, 115, 125), (232, 236, 242)


@dataclass(frozen=True)
class Row:
    """One row of the grid: ``pictures`` is ``(B, 3, H, W)`` RGB in 0 to 1."""

    label: str
    cfg: float
    pictures: Tensor
    seconds_a_step: float
    gigaflops_a_step: float


def make_rows(
    model: DemoModel,
    captions: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: Settings,
    cfg: float,
    steps: int,
    sampler: str,
    size: int = 64,
    on_step: Callable[[], None] | None = None,
) -> list[Row]:
    """The grid's rows: the four variants without CFG, then with it. ``settings`` tells all but what is switched on."""
    rows = []
    for scale in (1.0, cfg) if cfg != 1 else (1.0,):
        for label, switches in VARIANTS:
            recipe = Recipe(settings.with_values(switches), cfg=scale, steps=steps, sampler=sampler)
            cost = gigaflops_a_step(model, captions[0], recipe=recipe, size=size)  # and torch has warmed up
            began = time.perf_counter()
            with fused_attention():
                latent = sample(model, captions, seeds=seeds, recipe=recipe, size=size, on_step=on_step)
            seconds = (time.perf_counter() - began) / steps
            rows.append(Row(label, scale, model.first_stage_model.decode(latent), seconds, cost))
    return rows


def gigaflops_a_step(model: DemoModel, caption: str, *, recipe: Recipe, size: int = 64) -> float:
    """Counted floating-point operations of one picture, by step.

    One step is counted where all cost the same, which is much quicker.
    """
    settings = recipe.settings
    everywhere = settings.sag_start == settings.pag_start == 0 and settings.sag_end == settings.pag_end == 1
    if everywhere and recipe.sampler != "heun":
        recipe = replace(recipe, steps=1)
    return count_gigaflops(model, caption, recipe=recipe, size=size) / recipe.steps


def to_image(picture: Tensor, zoom: int) -> Image.Image:
    """A picture ``(3, H, W)`` in 0 to 1, enlarged."""
    array = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(array)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)


def font(size: int) -> Any:
    """Pillow's own font, in pixels."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def check_settings(model: DemoModel, settings: Settings) -> None:
    """Raises ``SettingError`` if a row could not be made: a range that ends before it starts, an unknown block."""
    everything = settings.with_values(VARIANTS[-1][1])
    everything.check_order()
    check_blocks(everything, UNetTopology(model.unet))


def draw_grid(rows: Sequence[Row], captions: Sequence[str], *, seeds: Sequence[int], zoom: int = 2) -> Image.Image:
    """The labelled grid: a column for each seed, a band of four rows without CFG and one with it."""
    height, width = (side * zoom for side in rows[0].pictures.shape[-2:])
    gap, left, band = 6, 150, 30
    small, large = font(12), font(17)
    image = Image.new("RGB", (left + len(seeds) * (width + gap), 60 + len(rows) * (height + gap + band)), "white")
    pen = ImageDraw.Draw(image)
    columns = [left + index * (width + gap) for index in range(len(seeds))]
    headings = [
        [*_wrapped(caption or "(no caption)", pen=pen, font=small, width=width)[:3], f"seed {seed}"]
        for caption, seed in zip(captions, seeds, strict=True)
    ]
    y = gap + 15 * max(len(lines) for lines in headings)
    for x, lines in zip(columns, headings, strict=True):
        for index, line in enumerate(reversed(lines)):
            pen.text((x, y - 15 * (index + 1)), line, fill=_GREY if index == 0 else "black", font=small)
    y += gap
    costs = relative_costs(rows)
    for index, row in enumerate(rows):
        if index == 0 or row.cfg != rows[index - 1].cfg:
            pen.rectangle((0, y, image.width, y + band - gap), fill=_BAND)
            title = "without CFG" if row.cfg == 1 else f"with CFG {row.cfg:g}"
            pen.text((2 * gap, y + 3), title, fill="black", font=large)
            y += band
        pen.text((2 * gap, y + height // 2 - 20), row.label, fill="black", font=large)
        cost = f"{costs[index][0]:.2f}x the work" if row.label != VARIANTS[0][0] else ""
        pen.text((2 * gap, y + height // 2 + 4), cost, fill=_GREY, font=small)
        for x, picture in zip(columns, row.pictures, strict=True):
            image.paste(to_image(picture, zoom), (x, y))
        y += height + gap
    return image.crop((0, 0, image.width, y))


def _wrapped(text: str, *, pen: ImageDraw.ImageDraw, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def relative_costs(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """For each row what a step takes relative to the same without guidance: counted operations, measured seconds."""
    costs = []
    for row in rows:
        plain = next(other for other in rows if other.cfg == row.cfg and other.label == VARIANTS[0][0])
        counted = row.gigaflops_a_step / plain.gigaflops_a_step
        costs.append((counted, row.seconds_a_step / plain.seconds_a_step))
    return costs


def cost_lines(rows: Sequence[Row]) -> list[str]:
    """For each row the seconds and the counted operations of a step, relative to the same without guidance."""
    lines = []
    for row, (counted, measured) in zip(rows, relative_costs(rows), strict=True):
        mode = "without CFG" if row.cfg == 1 else f"CFG {row.cfg:g}"
        lines.append(
            f"{mode:<12} {row.label:<12} {row.seconds_a_step * 1000:6.0f} ms a step, {measured:.2f}x unguided"
            f" (counted: {row.gigaflops_a_step:.2f} GFLOP a step and picture, {counted:.2f}x)"
        )
    return lines
