"""The pictures of what SAG sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sag_pag.webui.seen import POINTS, View, chosen_points, heat_map, overlay, show, where


def view(progress: float) -> View:
    return where(progress, None), torch.ones(2, 3), torch.zeros(4, 6)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (20, [0, 6, 13, 19])])
def test_points_are_spread_over_the_run(count: int, expected: list[int]) -> None:
    views = [view(index / count) for index in range(count)]
    assert [views.index(point) for point in chosen_points(views)] == expected
    assert len(expected) <= POINTS


def test_the_overlay_colours_where_the_mask_is() -> None:
    picture = Image.new("RGB", (30, 20), (10, 200, 90))
    mask = torch.zeros(2, 3)
    mask[1, 2] = 1
    pixels = np.asarray(overlay(picture, mask))
    inside = np.zeros((20, 30), dtype=bool)
    inside[10:, 20:] = True
    assert (pixels[~inside] == (10, 200, 90)).all()
    assert (np.abs(pixels[inside].astype(int) - (10, 200, 90)).sum(axis=-1) > 60).all()


def test_the_heat_map_is_brighter_where_there_is_more_attention() -> None:
    attention = torch.tensor([[0.0, 0.5, 1.0], [1.5, 2.5, 9.0]])
    pixels = np.asarray(heat_map(attention, (30, 20)).convert("L")).astype(int)
    brightness = [pixels[row * 10 + 5, column * 10 + 5] for row in range(2) for column in range(3)]
    assert brightness == sorted(brightness)
    assert len(set(brightness)) == 6
    assert brightness[0] < 5


@pytest.mark.parametrize("size", [(512, 512), (768, 320), (64, 200)])
def test_the_sheet_has_a_column_for_each_point(size: tuple[int, int]) -> None:
    picture = Image.effect_noise(size, 60).convert("RGB")
    sheets = [show(picture, [view(i / 10) for i in range(count)]) for count in (1, 2, 9)]
    widths = [sheet.width for sheet in sheets]
    assert widths[1] - widths[0] == (widths[2] - widths[1]) / 2
    assert np.asarray(sheets[0].crop((0, 0, widths[0], 24)).convert("L")).min() < 100, "no label"


def test_a_column_says_which_pass_it_is_of() -> None:
    """Two passes each go from 0 % to 100 % of the way."""
    assert where(0.5, None) == "50% of the way"
    assert where(0.5, "first pass") == "first pass: 50% of the way"
    assert where(0.5, "hires pass") == "hires pass: 50% of the way"
