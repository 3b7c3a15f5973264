"""Where guidance points: sizes and angles that are known, and a table of all noise levels."""

from __future__ import annotations

import math

import pytest
import torch

from sag_pag.demo.directions import compared, table
from sag_pag.demo.model import load


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, 2.0])
def test_size_and_angle(angle: float) -> None:
    misses = torch.eye(6)[:4] * 2
    aside = torch.eye(6)[[5, 5, 5, 5]] * 2
    found = compared(3 * (math.cos(angle) * misses + math.sin(angle) * aside), misses)
    assert found.size == pytest.approx(3)
    assert found.cosine.value == pytest.approx(math.cos(angle), abs=1e-6)
    assert found.cosine.margin < 1e-6


def test_the_interval_is_that_of_a_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    found = compared(torch.randn(900, 50, generator=generator), torch.randn(900, 50, generator=generator))
    assert found.cosine.margin == pytest.approx(1.96 / math.sqrt(50 * 900), rel=0.1)
    assert abs(found.cosine.value) < 2 * found.cosine.margin


def test_the_table() -> None:
    lines = table(load(), count=4, begins=(0.2, 0.5)).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        [" 4.47 ", " PAG "], [" 4.47 ", " SAG "], [" 1.50 ", " PAG "], [" 1.50 ", " SAG "],
    ]  # fmt: skip
