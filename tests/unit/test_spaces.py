"""The same physical situation in the sampler spaces of k-diffusion and DDPM gives the same guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_
from sag_pag.engine.plan import plan_at
from sag_pag.engine.rows import StepRows
from sag_pag.engine.spaces import SigmaSpace, Space, TimestepSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

TINY = UNetKwargs(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(2, 1), context_dim=8, num_heads=2,
)
ROWS = StepRows.plain(2)
BOTH_ON = Settings(sag_enabled=True, pag_enabled=True, sag_threshold=0.9)


def alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def alpha_between(timestep: float) -> float:
    """``log a`` interpolated, as UniPC's noise schedule does."""
    log_alphas = alphas_cumprod().log()
    below = int(timestep)
    above = min(below + 1, 999)
    share = timestep - below
    return float(((1 - share) * log_alphas[below] + share * log_alphas[above]).exp())


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return redraw_(UNetModel(**TINY), seed=3, gain=1.5).double().requires_grad_(False)


@pytest.fixture(autouse=True)
def _float64_weights_compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group norms of the U-Net work in float32, which hides agreement beyond it."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)


def guided(unet: nn.Module, space: Space, predict: Callable[..., Tensor], x: Tensor, sigma: Tensor) -> tuple[Any, ...]:
    topology = UNetTopology(unet)
    plan = plan_at(BOTH_ON, topology, progress=0.5)
    assert plan is not None
    step = GuidedStep(plan, topology=topology, rows=ROWS, space=space)
    context = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = step(predict, x.repeat(2, 1, 1, 1), sigma.repeat(2), cond=context, rows=ROWS.rows)
    step.finish()
    conds, unconds = out.chunk(2)
    combined = unconds + 7 * (conds - unconds)
    return combined, step.delta(), step.apply(combined)


@pytest.mark.parametrize("timestep", [3.0, 421.0, 420.37, 980.5, 999.0])
def test_x0_guidance_is_minus_sigma_times_eps_guidance(unet: nn.Module, timestep: float) -> None:
    a = alpha_between(timestep)
    noise_level = ((1 - a) / a) ** 0.5
    x = torch.randn(2, 4, 10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # DDPM's x

    def eps(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        return unet(x, sigma, context=cond)

    def x0(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        t = torch.full_like(sigma, timestep)
        return x - noise_level * unet(x * a**0.5, t, context=cond)

    t, sigma = torch.full((2,), timestep, dtype=torch.float64), torch.full((2,), noise_level, dtype=torch.float64)
    eps_combined, eps_delta, eps_guided = guided(unet, TimestepSpace(alphas_cumprod()), eps, x, t)
    x0_combined, x0_delta, x0_guided = guided(unet, SigmaSpace(), x0, x / a**0.5, sigma)
    assert x0_delta.abs().mean() > 1e-3 * noise_level

    def as_x0(eps_value: Tensor) -> Tensor:
        return x / a**0.5 - noise_level * eps_value

    tolerance = {"rtol": 1e-6, "atol": 1e-6 * noise_level}
    torch.testing.assert_close(x0_delta, -noise_level * eps_delta, **tolerance)
    torch.testing.assert_close(x0_combined, as_x0(eps_combined), **tolerance)
    torch.testing.assert_close(x0_guided, as_x0(eps_guided), **tolerance)


@given(timestep=st.floats(0, 999))
def test_denoised_and_renoised_are_each_others_inverse(timestep: float) -> None:
    space = TimestepSpace(alphas_cumprod())
    a = torch.tensor(alpha_between(timestep), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    x0, eps, change = (torch.randn(1, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([timestep], dtype=torch.float64)
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    torch.testing.assert_close(space.denoised(x, eps, t), x0, rtol=1e-9, atol=1e-9)
    renoised = space.renoised(x, change, t)
    torch.testing.assert_close(space.denoised(renoised, eps, t), x0 + change, rtol=1e-9, atol=1e-9)


def test_timesteps_beyond_the_schedule_are_its_ends() -> None:
    """UniPC's last time is 0 but for rounding."""
    space = TimestepSpace(alphas_cumprod())
    x, out = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    beyond = space.denoised(x, out, torch.tensor([-1e-4, 999.4]))
    assert torch.equal(beyond, space.denoised(x, out, torch.tensor([0.0, 999.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_and_rows(dtype: torch.dtype) -> None:
    """Each row has its own timestep, and what comes out has the latent's precision."""
    space = TimestepSpace(alphas_cumprod().float())
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(5)).to(dtype)
    t = torch.tensor([100, 900])
    both = space.denoised(x, x / 2, t)
    assert both.dtype == dtype
    assert both.isfinite().all()
    assert torch.equal(both[1:], space.denoised(x[1:], x[1:] / 2, t[1:]))
    assert space.renoised(x, x, t).dtype == dtype
