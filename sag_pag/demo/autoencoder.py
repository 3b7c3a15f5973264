"""The autoencoder between 64x64 pictures and ``(8, 16, 16)`` latents, as Stable Diffusion has one.

Deterministic and tiny. Pictures are folded (2x2 pixels into channels) on the way in and out, so no layer runs at full
size. What is added to the latents in training makes the decoder forgive small errors of the diffusion model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sag_pag.demo import data
from sag_pag.demo.progress import Progress

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


def reconstruction_loss(made: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute error of the pixels and of their differences to the right and below, which keeps edges sharp."""
    error = made - pictures
    right, below = error.diff(dim=3), error.diff(dim=2)
    return error.abs().mean() + right.abs().mean() + below.abs().mean()


def train_autoencoder(
    *, steps: int = 3000, batch: int = 32, learning_rate: float = 2e-3, noise: float = 0.25, seed: int = 7, bf16: bool
) -> Autoencoder:
    """Train from scratch on freshly drawn pictures; about ten minutes on one core.

    Between encoder and decoder the latents get a random amount of noise, at most ``noise`` of their deviation.
    """
    torch.manual_seed(seed)
    model = Autoencoder()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    with Progress("autoencoder", steps) as bar:
        for step in range(steps):
            generator = torch.Generator().manual_seed(seed * 10**9 + step)
            pictures = data.render(data.draw_scenes(batch, generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                raw = model.encoder(2 * pictures - 1)
            raw = raw.float()
            mean, deviation = _statistics(raw)
            with torch.no_grad():
                share = min(0.01 + 1 / (step + 1), 1.0)
                model.latent_mean.lerp_(mean, share)
                model.latent_deviation.lerp_(deviation, share)
            amount = noise * torch.rand(batch, 1, 1, 1, generator=generator)
            noisy = raw + amount * deviation * torch.randn(raw.shape, generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                made = (model.decoder(noisy) + 1) / 2
            loss = reconstruction_loss(made.float(), pictures)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            bar.update(step + 1, f"loss {loss.item():.4f}")
    return model.eval().requires_grad_(False)


def _statistics(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, ``(8, 1, 1)`` each."""
    flat = raw.transpose(0, 1).flatten(1)
    return flat.mean(dim=1)[:, None, None], flat.std(dim=1)[:, None, None]
