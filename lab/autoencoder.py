"""Training of the autoencoder.

What is added to the latents in training makes the decoder forgive small errors of the diffusion model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.data import draw_scenes, render
from sag_pag.demo.autoencoder import Autoencoder
from sag_pag.demo.progress import Progress


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
            pictures = render(draw_scenes(batch, generator))
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
