"""The WebUIs' own soft inpainting, which blends by the noise level: guidance weighs what the prediction weighs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from client import Client
from installations import A1111
from test_generation import BOTH, NOISE, difference, guided

GREY = np.full((128, 128), 128, np.uint8)


def inpainted(client: Client, *, exponent: float, **settings: Any) -> Any:
    """A mask that is half everywhere counts as its power to ``exponent``, and all of the picture is shown."""
    soft = {"Soft Inpainting": {"args": [True, 0.0, exponent, 1, 0, 1e-6, 2]}}
    scripts = {**soft, **(guided(**settings)["alwayson_scripts"] if settings else {})}
    made = client.img2img(
        init_images=[NOISE], mask=GREY, mask_blur=0, inpainting_fill=1, denoising_strength=0.8, steps=6,
        alwayson_scripts=scripts,
    )
    assert "Soft inpainting enabled: True" in made.infotext
    return made.image


@pytest.mark.only_on(A1111, "forge", "reforge", "neo")  # Classic's denoiser blends by the mask alone
def test_guidance_weighs_what_the_prediction_weighs(client: Client) -> None:
    assert "soft inpainting" in client.call("/sdapi/v1/scripts")["img2img"]  # in Forge it needs joblib
    client.call("/probe/processors/8", {})  # with six or fewer those of Forge and reForge change no picture
    client.load_checkpoint("sd1")
    inpainted(client, exponent=0.0)  # Forge's first one differs from later ones by itself
    whole, hardly = (
        difference(inpainted(client, exponent=exponent, **BOTH), inpainted(client, exponent=exponent))
        for exponent in (0.0, 8.0)
    )
    assert whole > 0.5
    assert hardly < 0.01 * whole, f"{hardly} of {whole}"
