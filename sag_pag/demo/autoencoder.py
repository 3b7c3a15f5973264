"""The autoencoder between 64x64 pictures and ``(8, 16, 16)`` latents, as Stable Diffusion has one.

Deterministic and tiny. Pictures are folded (2x2 pixels into channels) on the way in and out, so no layer runs at full
size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 64
"""Height and width in pixels of the pictures that the model knows."""
LATENT_CHANNELS = 8
FACTOR = 4
"""Pixels a latent pixel."""

_INNER, _OUTER = 64, 32


class _ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class Autoencoder(nn.Module):
    """Pictures ``(B, 3, H, W)`` in 0 to 1 to latents ``(B, 8, H/4, W/4)`` of unit variance, and back."""

    latent_mean: Tensor
    latent_deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, _OUTER, 3, padding=1),
            _ResBlock(_OUTER),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * _OUTER, _INNER, 1),
            _ResBlock(_INNER),
            nn.Conv2d(_INNER, LATENT_CHANNELS, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, _INNER, 3, padding=1),
            _ResBlock(_INNER),
            _ResBlock(_INNER),
            nn.Conv2d(_INNER, 4 * _OUTER, 3, padding=1),
            nn.PixelShuffle(2),
            _ResBlock(_OUTER),
            nn.SiLU(),
            nn.Conv2d(_OUTER, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("latent_mean", torch.zeros(LATENT_CHANNELS, 1, 1))
        self.register_buffer("latent_deviation", torch.ones(LATENT_CHANNELS, 1, 1))

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents, scaled by the statistics that training has left."""
        out: Tensor = (self.encoder(2 * pictures - 1) - self.latent_mean) / self.latent_deviation
        return out

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures, clamped to 0 to 1."""
        out: Tensor = (self.decoder(latent * self.latent_deviation + self.latent_mean) + 1) / 2
        return out.clamp(0, 1)
