"""Pictures of what SAG sees: its mask over the finished picture, and its attention map as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sag_pag.engine.plan import HiresPass
from sag_pag.webui import texts

POINTS = 4
"""How many points of the run are shown."""

View = tuple[str, Tensor, Tensor]
"""Where in the run it is, attention ``(height, width)`` of the feature map with mean 1, mask of the latent."""


def where(progress: float, hires: HiresPass | None) -> str:
    """Where in the run a step is, in words."""
    return texts.PASSES[hires] + texts.PERCENT.format(progress)


_MASKED = np.array([255, 96, 0])
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
_HOTTEST = 3.0
"""Attention, relative to the average, that is drawn brightest."""
_CELL, _LINE, _GAP = 256, 24, 6


def chosen_points(views: Sequence[View]) -> list[View]:
    """The first, the last and others evenly between them, none twice."""
    count = min(POINTS, len(views))
    return [views[round(index * (len(views) - 1) / max(count - 1, 1))] for index in range(count)]


def show(picture: Image.Image, views: Sequence[View]) -> Image.Image:
    """One picture of all: a column for each of some points of the run, the mask above, the heat map below."""
    points = chosen_points(views)
    scale = _CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    width, height = size[0] + _GAP, size[1] + _GAP
    sheet = Image.new("RGB", (len(points) * width + _GAP, 3 * _LINE + 2 * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()

    def write(text: str, left: int, top: int) -> None:
        draw.text((left, top + _LINE // 3), text, fill="black", font=font)

    upper, lower = 2 * _LINE, 3 * _LINE + height
    write(texts.SEEN_MASK, _GAP, 0)
    write(texts.SEEN_ATTENTION, _GAP, lower - _LINE)
    for column, (place, attention, mask) in enumerate(points):
        left = _GAP + column * width
        write(place, left, upper - _LINE)
        sheet.paste(overlay(small, mask), (left, upper))
        sheet.paste(heat_map(attention, size), (left, lower))
    return sheet


def overlay(picture: Image.Image, mask: Tensor) -> Image.Image:
    """The picture, coloured where the mask is 1."""
    sized = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    pixels = np.asarray(picture).astype(float)
    covered = (np.asarray(sized) > 0)[..., None]
    return Image.fromarray(np.where(covered, 0.5 * pixels + 0.5 * _MASKED, pixels).astype(np.uint8))


def heat_map(attention: Tensor, size: tuple[int, int]) -> Image.Image:
    """Attention in colours from black (none) over violet and orange to yellow (three times the average)."""
    level = attention.double().clamp(0, _HOTTEST).numpy() / _HOTTEST * (len(_HEAT) - 1)
    colours = np.stack([np.interp(level, np.arange(len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    return Image.fromarray(colours.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
