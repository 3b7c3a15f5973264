"""The WebUIs' own soft inpainting, which blends by the noise level: guidance weighs what the prediction weighs."""

from __future__ import annotations

from typing import Any

import numpy as np
from client import Client
from test_generation import BOTH, NOISE, difference, guided

GREY = np.full((128, 128), 128, np.uint8)
STRONG = {"sag_scale": 2.0, "pag_scale": 20.0}


def inpainted(client: Client, *, exponent: float, **settings: Any) -> Any:
    """A mask that is half everywhere counts as its power to ``exponent``."""
    soft = {"Soft Inpainting": {"args": [True, 0.0, exponent, 4, 0, 0.001, 2]}}
    scripts = {**soft, **(guided(**settings)["alwayson_scripts"] if settings else {})}
    made = client.img2img(
        init_images=[NOISE], mask=GREY, mask_blur=0, inpainting_fill=1, denoising_strength=0.8, steps=6,
        alwayson_scripts=scripts,
    )
    assert "Soft inpainting enabled: True" in made.infotext
    return made.image


def test_guidance_weighs_what_the_prediction_weighs(client: Client) -> None:
    client.load_checkpoint("sd1")
    inpainted(client, exponent=0.0)  # Forge's first one differs from later ones by itself
    off, on = (inpainted(client, exponent=0.0, **which) for which in ({}, BOTH))
    assert difference(on, off) > 0.5
    off = inpainted(client, exponent=8.0)
    assert difference(inpainted(client, exponent=8.0, **STRONG), off) < 0.1
    assert np.array_equal(inpainted(client, exponent=8.0), off)
