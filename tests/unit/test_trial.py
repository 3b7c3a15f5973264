"""A call made once more may come out a little otherwise in half precision; a row taken for another is found out."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_
from sag_pag.engine.calls import Trust, Watch
from sag_pag.engine.spaces import SigmaSpace, Space, TimestepSpace
from sag_pag.engine.trial import try_again

TINY = UNetKwargs(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(2, 1), context_dim=8, num_heads=2,
)
UNET = redraw_(UNetModel(**TINY), seed=3, gain=1.5).requires_grad_(False)
SIGMAS = [14.6146, 3.0, 0.05]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Forward = Callable[..., Tensor]


def in_pieces(attention: Any, piece: Callable[[], int]) -> Forward:
    """Self-attention as where memory is short: the softmax summed over pieces of the keys."""
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        layers = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = (layer(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for layer in layers)
        scores = (query @ key.mT) * query.shape[-1] ** -0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        parts = zip(weights.split(piece(), dim=-1), value.split(piece(), dim=-2), strict=True)
        sums = [(part @ of_values, part.sum(-1, keepdim=True)) for part, of_values in parts]
        total, share = (sum(part) for part in zip(*sums, strict=True))
        out: Tensor = attention.to_out((total / share).transpose(1, 2).flatten(2))  # type: ignore[operator]
        return out

    return forward


class Denoiser:
    """A small U-Net's, in two spaces; the second call is summed in other pieces, or ``wrong``."""

    def __init__(self, dtype: torch.dtype, *, velocity: bool, timesteps: bool, wrong: float = 0.0) -> None:
        self.unet = deepcopy(UNET).to(dtype)
        self.dtype, self.velocity, self.timesteps, self.wrong, self.calls = dtype, velocity, timesteps, wrong, 0
        self.alphas = torch.linspace(0.999, 0.005, 1000)
        for path, module in self.unet.named_modules():
            if path.endswith("attn1"):
                module.forward = in_pieces(module, lambda: 64 if self.calls % 2 else 16)  # type: ignore[method-assign]

    @property
    def space(self) -> Space:
        return TimestepSpace(self.alphas, velocity=self.velocity) if self.timesteps else SigmaSpace(
            velocity=self.velocity
        )

    def network(self, x: Tensor) -> Tensor:
        text = torch.ones(len(x), 5, 8, dtype=self.dtype)
        out: Tensor = self.unet(x.to(self.dtype), torch.full((len(x),), 900.0).to(self.dtype), context=text).float()
        self.calls += 1
        if self.calls == 2 and self.wrong:
            out[1] += self.wrong * out[1].std() * out[1].flip(-1).sign()
        return out

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        if self.timesteps:
            a = self.alphas[sigma.long()][:, None, None, None]
            out = self.network(x)
            return a.sqrt() * out + (1 - a).sqrt() * x if self.velocity else out
        out = self.network(x * (1 + s**2).rsqrt())
        return x / (1 + s**2) - out * s * (1 + s**2).rsqrt() if self.velocity else x - s * out


def tried(denoise: Denoiser, level: float) -> Trust:
    """``level``: a sigma, the same for timesteps."""
    generator, trust = torch.Generator().manual_seed(1), Trust()
    x0, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    if denoise.timesteps:
        a = denoise.alphas
        sigma = (((1 - a) / a).sqrt() - level).abs().argmin()[None].expand(2).float()
        x = a[sigma.long()].sqrt()[:, None, None, None] * x0 + (1 - a[sigma.long()]).sqrt()[:, None, None, None] * noise
    else:
        sigma = torch.full((2,), level)
        x = 0.5 * x0 + level * noise
    out = denoise(x, sigma)
    try_again(
        trust, Watch(), denoise.unet, out, predicted=lambda out: denoise.space.predicted(x, out, sigma),
        call=lambda: denoise(x, sigma),
    )
    assert denoise.calls == 2
    return trust


@pytest.mark.parametrize("timesteps", [False, True], ids=["sigmas", "timesteps"])
@pytest.mark.parametrize("velocity", [False, True], ids=["noise", "v"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summed_in_other_pieces(dtype: torch.dtype, sigma: float, velocity: bool, timesteps: bool) -> None:
    """Rounded otherwise, and the same all the same."""
    denoise = Denoiser(dtype, velocity=velocity, timesteps=timesteps)
    assert tried(denoise, sigma) == Trust(reproduces=True)


@pytest.mark.parametrize("timesteps", [False, True], ids=["sigmas", "timesteps"])
@pytest.mark.parametrize("velocity", [False, True], ids=["noise", "v"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_row(dtype: torch.dtype, sigma: float, velocity: bool, timesteps: bool) -> None:
    """One row that is off by a fifth of what the model predicted, at every noise level and whatever that is."""
    denoise = Denoiser(dtype, velocity=velocity, timesteps=timesteps, wrong=0.2)
    assert tried(denoise, sigma) == Trust(reproduces=False, because="a call made once more gives something else")


def test_full_precision_is_held_to_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tried(Denoiser(torch.float32, velocity=False, timesteps=False, wrong=0.005), 3.0).reproduces
    assert tried(Denoiser(torch.float16, velocity=False, timesteps=False, wrong=0.005), 3.0).reproduces
    monkeypatch.setattr("sag_pag.engine.trial.REPRODUCED", 0.0)
    assert not tried(Denoiser(torch.float32, velocity=False, timesteps=False), 3.0).reproduces


def test_no_number_at_all() -> None:
    """A network that gives none in either call has shown nothing."""
    trust, x = Trust(), torch.full((1, 4, 8, 8), torch.nan)
    try_again(trust, Watch(), nn.Identity(), x, predicted=lambda out: out, call=lambda: x)
    assert trust.reproduces is False
