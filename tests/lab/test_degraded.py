"""What guidance leads away from, against predictions made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lab import data
from lab.degraded import SEED, degraded, draw_degraded
from sag_pag import guidance
from sag_pag.demo.model import DemoModel, load
from sag_pag.settings import Settings

SIGMA = 2.0


def noisy(model: DemoModel) -> Tensor:
    """The two pictures that the predictions are of."""
    generator = torch.Generator().manual_seed(SEED)
    latent = model.first_stage_model.encode(data.render(data.draw_scenes(2, generator)))
    return latent + SIGMA * torch.randn(latent.shape, generator=generator)


def predicted(model: DemoModel, x: Tensor) -> Tensor:
    return model.denoise(x, torch.full((2,), SIGMA), cond=model.context(["", ""]))


@pytest.mark.parametrize(("row", "block"), [("PAG, middle block", "middle"), ("PAG, input.1", "input.1")])
@torch.no_grad()
def test_by_pag_the_block_s_attention_is_the_identity(row: str, block: str) -> None:
    model = load()
    shown = degraded(model, sigma=SIGMA, count=2)
    assert list(shown) == ["drawn", "predicted", "PAG, middle block", "PAG, input.1", "SAG"]
    assert all(pictures.shape == (2, 3, 64, 64) for pictures in shown.values())
    transformer = (model.unet.middle_block if block == "middle" else model.unet.input_blocks[1])[1]
    attention = transformer.transformer_blocks[0].attn1
    attention.forward = lambda x, context=None, mask=None: attention.to_out(attention.to_v(x))
    by_hand = model.first_stage_model.decode(predicted(model, noisy(model)))
    torch.testing.assert_close(shown[row], by_hand, rtol=0, atol=1e-4)
    assert (shown[row] - shown["predicted"]).abs().mean() > 0.01


@torch.no_grad()
def test_by_sag_the_input_is_blurred_where_tokens_get_much_attention() -> None:
    model = load()
    shown = degraded(model, sigma=SIGMA, count=2)
    seen: list[Tensor] = []
    attention = model.unet.middle_block[1].transformer_blocks[0].attn1
    with attention.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        x = noisy(model)
        plain = predicted(model, x)
    q, k = (to(seen[0]).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for to in (attention.to_q, attention.to_k))
    received = (q @ k.transpose(-1, -2) * attention.scale).softmax(dim=-1).mean(dim=1).sum(dim=1)
    settings = Settings()
    mask = (received > settings.sag_threshold).view(2, 1, 16, 16)
    blurred = guidance.degrade(plain, mask, sigma=settings.sag_blur_sigma)
    by_hand = model.first_stage_model.decode(predicted(model, x + blurred - plain))
    torch.testing.assert_close(shown["SAG"], by_hand, rtol=0, atol=1e-3)
    assert (shown["SAG"] - shown["predicted"]).abs().mean() > 0.003


def test_the_picture() -> None:
    assert draw_degraded(load(), count=3).size == (150 + 3 * 134, 5 * 134)
