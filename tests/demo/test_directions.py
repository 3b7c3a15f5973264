"""Where guidance points: sizes and angles that are known, and a table of all noise levels."""

from __future__ import annotations

import math

import pytest
import torch

from sag_pag.demo import data
from sag_pag.demo.directions import SEED, compared, degraded, draw_degraded, table
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


@torch.no_grad()
def test_degraded_predictions() -> None:
    """PAG's is what the model says with the middle block's attention map replaced by the identity."""
    model = load()
    shown = degraded(model, sigma=2.0, count=2)
    assert list(shown) == ["drawn", "predicted", "degraded by PAG", "degraded by SAG"]
    assert all(pictures.shape == (2, 3, 64, 64) for pictures in shown.values())
    generator = torch.Generator().manual_seed(SEED)
    latent = model.first_stage_model.encode(data.render(data.draw_scenes(2, generator)))
    x = latent + 2 * torch.randn(latent.shape, generator=generator)
    attention = model.unet.middle_block[1].transformer_blocks[0].attn1
    attention.forward = lambda x, context=None, mask=None: attention.to_out(attention.to_v(x))
    perturbed = model.denoise(x, torch.full((2,), 2.0), cond=model.context(["", ""]))
    torch.testing.assert_close(shown["degraded by PAG"], model.first_stage_model.decode(perturbed), rtol=0, atol=1e-4)
    assert (shown["degraded by PAG"] - shown["predicted"]).abs().mean() > 0.01
    assert draw_degraded(model, count=3).size == (150 + 3 * 134, 4 * 134)
