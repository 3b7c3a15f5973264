"""The ground the other tests stand on: every checkpoint loads, and makes pictures that can tell right from wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from client import Client, Generation
from layouts import KINDS


def generate(client: Client, kind: str, **payload: Any) -> Generation:
    """A picture from nothing, or, as InstructPix2Pix has no txt2img in the WebUI, from a gradient."""
    if KINDS[kind].in_channels != 8:
        return client.txt2img(**payload)
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    init = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=-1)
    return client.img2img(init_images=[init], denoising_strength=1.0, **payload)


OF_SOME = {"sd1-pix2pix": ("a1111",), "sd2": ("a1111", "forge", "reforge"), "sd2-v": ("a1111", "forge", "reforge")}
"""Kinds of model that not every WebUI can run, with or without us."""


def kinds() -> list[Any]:
    """Every kind of model, marked with where it runs."""
    marks = {kind: [pytest.mark.only_on(*hosts)] for kind, hosts in OF_SOME.items()}
    return [pytest.param(kind, marks=marks.get(kind, [])) for kind in KINDS]


@pytest.mark.parametrize("kind", kinds())
def test_pictures_vary(plain_client: Client, kind: str) -> None:
    """Neither constant nor saturated, different where the request is, and the same where it is the same."""
    plain_client.load_checkpoint(kind)
    first = generate(plain_client, kind, seed=1)
    assert first.info["sd_model_name"] == kind
    assert first.image.shape == (128, 128, 3)
    assert first.image.std() > 20, "constant"
    assert np.isin(first.image, (0, 255)).mean() < 0.2, "saturated"
    for change in ({"seed": 2}, {"prompt": "a red house"}, {"negative_prompt": "blurry"}, {"cfg_scale": 3.0}):
        other = generate(plain_client, kind, **change)
        assert np.abs(other.image.astype(int) - first.image).mean() > 1, change
    assert np.array_equal(generate(plain_client, kind, seed=1).image, first.image), "not reproducible"
