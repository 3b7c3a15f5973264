"""What guidance leads away from, as a picture.

A drawn picture gets noise and the model predicts the picture: as it is, with PAG's identity attention in one block or
another, and from SAG's blurred input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lab import data
from lab.points import INPUT_BLOCK
from sag_pag.demo.grid import font, to_image
from sag_pag.demo.layers import fused_attention
from sag_pag.demo.model import DemoModel
from sag_pag.demo.sampling import GuidedDenoiser, Recipe, noise_levels
from sag_pag.settings import Settings

SEED = 6 * 10**6


@torch.no_grad()
def degraded(model: DemoModel, *, sigma: float, count: int) -> dict[str, Tensor]:
    """Drawn pictures ``(count, 3, 64, 64)``, what is predicted of them at noise level ``sigma`` without a caption, and
    the degraded predictions that the engine makes.
    """
    generator = torch.Generator().manual_seed(SEED)
    drawn = data.render(data.draw_scenes(count, generator))
    latent = model.first_stage_model.encode(drawn)
    x = latent + sigma * torch.randn(latent.shape, generator=generator)
    empty = model.context([""] * count)
    predictions: list[Tensor] = []

    def recorded(x: Tensor, sigma: Tensor, *, cond: Tensor) -> Tensor:
        predictions.append(model.denoise(x, sigma, cond=cond))
        return predictions[-1]

    def last_rows(settings: Settings) -> Tensor:
        """PAG's perturbed rows ride behind the host's, SAG makes a call of its own after the host's."""
        denoise = GuidedDenoiser(model, Recipe(settings=settings), context=empty, empty=empty)
        denoise.denoise = recorded
        denoise(x, sigma)
        return predictions[-1][-count:]

    with fused_attention():
        latents = {
            "PAG, middle block": last_rows(Settings(pag_enabled=True)),
            f"PAG, {INPUT_BLOCK}": last_rows(Settings(pag_enabled=True, pag_blocks=INPUT_BLOCK)),
            "SAG": last_rows(Settings(sag_enabled=True)),
        }
    latents = {"predicted": predictions[0][:count], **latents}
    return {"drawn": drawn} | {name: model.first_stage_model.decode(value) for name, value in latents.items()}


def labelled_rows(rows: Mapping[str, Tensor], *, zoom: int = 2) -> Image.Image:
    """Rows of pictures ``(B, 3, H, W)``, each with its name at the left."""
    count, _, height, width = next(iter(rows.values())).shape
    gap, left = 6, 150
    down, right = height * zoom + gap, width * zoom + gap
    image = Image.new("RGB", (left + count * right, len(rows) * down), "white")
    pen, letters = ImageDraw.Draw(image), font(15)
    for row, (label, pictures) in enumerate(rows.items()):
        pen.text((2 * gap, row * down + height * zoom // 2 - 10), label, fill="black", font=letters)
        for column, picture in enumerate(pictures):
            image.paste(to_image(picture, zoom), (left + column * right, row * down))
    return image


def draw_degraded(model: DemoModel, *, begin: float = 0.25, count: int = 8) -> Image.Image:
    """The picture: a row of each kind."""
    return labelled_rows(degraded(model, sigma=noise_levels(20, begin)[0], count=count))
