"""The spaces that samplers' denoisers predict in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Space(Protocol):
    """The space that a sampler's denoiser predicts in. ``sigma`` is what the denoiser gets, ``(rows,)``."""

    def denoised(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """The prediction ``out`` at ``x`` as a picture x0."""

    def renoised(self, x: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
        """``x`` after its x0 has changed by ``change``, the predicted noise being the same."""

    def sag_direction(self, out: Tensor, degraded_out: Tensor, change: Tensor) -> Tensor:
        """What SAG's scale multiplies, in this space: eps(x) - eps(x degraded), or its x0 equivalent."""

    def predicted(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """What the model itself predicted where the denoiser gave ``out``: the noise, or v."""


class SigmaSpace:
    """k-diffusion: ``x = x0 + sigma * eps``, the denoiser gives x0. ``velocity``: the model itself predicts v."""

    def __init__(self, *, velocity: bool = False) -> None:
        self.velocity = velocity

    def denoised(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        return out

    def renoised(self, x: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
        return x + change

    def sag_direction(self, out: Tensor, degraded_out: Tensor, change: Tensor) -> Tensor:
        return (out + change) - degraded_out

    def predicted(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        if self.velocity:
            return (x / (1 + s**2) - out) * (1 + s**2).sqrt() / s
        return (x - out) / s


class TimestepSpace:
    """DDPM: ``x = sqrt(a) * x0 + sqrt(1 - a) * eps``, the denoiser gives eps and gets the timestep as ``sigma``.

    ``alphas_cumprod`` is ``a`` by timestep; between two timesteps (UniPC) ``log a`` is interpolated. ``velocity``: the
    model itself predicts v.
    """

    def __init__(self, alphas_cumprod: Tensor, *, velocity: bool = False) -> None:
        self.velocity = velocity
        self.log_alphas = alphas_cumprod.cpu().double().log()  # there is no float64 on some devices

    def _alpha(self, timestep: Tensor, like: Tensor) -> Tensor:
        t = timestep.cpu().double().clamp(0, len(self.log_alphas) - 1)
        below = t.floor().long()
        above = (below + 1).clamp_max(len(self.log_alphas) - 1)
        log_alpha = torch.lerp(self.log_alphas[below], self.log_alphas[above], t - below)
        return log_alpha.exp().to(like)[:, None, None, None]

    def denoised(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        a = self._alpha(sigma, x)
        return (x - (1 - a).sqrt() * out) / a.sqrt()

    def renoised(self, x: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
        return x + self._alpha(sigma, x).sqrt() * change

    def sag_direction(self, out: Tensor, degraded_out: Tensor, change: Tensor) -> Tensor:
        return out - degraded_out

    def predicted(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        if not self.velocity:
            return out
        a = self._alpha(sigma, x)
        return (out - (1 - a).sqrt() * x) / a.sqrt()
