"""The noise schedule: 1000 timesteps of a cosine schedule, shifted to higher noise.

``x = cos(angle) x0 + sin(angle) eps`` (Nichol & Dhariwal, arXiv 2102.09672; Salimans & Ho, arXiv 2202.00512, appendix
D). The noise level of k-diffusion, ``tan(angle)``, goes from 0.02 to 100: with data of unit variance the last step is
noise for every practical purpose, so sampling can start from pure noise and colours do not drift. It is 1.5 times the
cosine schedule's, because plain areas outlast more noise than detail does (Hoogeboom et al., arXiv 2301.11093).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIMESTEPS = 1000
SIGMA_MIN = 0.02
SIGMA_MAX = 100.0
SHIFT = 1.5

_FIRST, _LAST = math.atan(SIGMA_MIN / SHIFT), math.atan(SIGMA_MAX / SHIFT)


def sigma_of(timestep: Tensor) -> Tensor:
    """The noise level of (fractional) timesteps 0 to 999, float64."""
    return SHIFT * (_FIRST + (_LAST - _FIRST) / (TIMESTEPS - 1) * timestep.double()).tan()


def angle_of(timestep: Tensor) -> Tensor:
    """The angle in radians of (fractional) timesteps 0 to 999, float64."""
    return sigma_of(timestep).atan()


def timestep_of(sigma: Tensor) -> Tensor:
    """The fractional timestep of noise levels: the inverse of :func:`sigma_of`, float64, clamped to 0 to 999."""
    step = ((sigma.double() / SHIFT).atan() - _FIRST) * ((TIMESTEPS - 1) / (_LAST - _FIRST))
    return step.clamp(0, TIMESTEPS - 1)


def alphas_cumprod() -> Tensor:
    """The 1000 squared signal shares of the DDPM parametrisation, ``(1000,)`` float64, falling."""
    return angle_of(torch.arange(TIMESTEPS)).cos().square()
