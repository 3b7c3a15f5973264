"""Beside what forks bring along: ControlNet and IP-Adapter with tiny weights, StyleAlign, MultiDiffusion.

``NEIGHBOURS_DIR`` names a folder of checkouts; the weights are in one beside it, whose name ends in ``-tiny``.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from client import DEFAULTS, Client, Picture, encode_image
from conftest import EXTENSIONS, ServerFactory
from installations import Installation
from test_forks_webui import counted, largest, sharing_nothing
from test_generation import BOTH, difference, guided, state

FORKS = ("forge", "reforge", "neo")
PAG = {"pag_scale": 3.0}
NULL = {"pag_scale": 20.0}
"""Changes nothing where the map has one token: attention over it is the identity."""
HINT = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)

pytestmark = pytest.mark.only_on(*FORKS)


@pytest.fixture(scope="module")
def beside(start_server: ServerFactory, installation: Installation) -> Client:
    """A fork with the tiny weights."""
    folder = os.environ.get("NEIGHBOURS_DIR")
    if not folder or installation.name not in FORKS:
        pytest.skip("NEIGHBOURS_DIR does not name a folder of checkouts")
    arguments = ("--controlnet-dir", f"{folder}-tiny")
    return start_server("built-in", extensions=EXTENSIONS, arguments=arguments).client


def scripts(own: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A request with what is built in and, if there are settings, guidance."""
    return {"alwayson_scripts": {**own, **(guided(**settings)["alwayson_scripts"] if settings else {})}}


def unit(client: Client, model: str, module: str = "None") -> dict[str, Any]:
    """One unit of ControlNet; ``model`` is the beginning of its name."""
    models = client.call("/controlnet/model_list")["model_list"]
    name = next(found for found in models if found.startswith(model))
    image = encode_image(HINT)
    return {"controlnet": {"args": [{"enabled": True, "model": name, "module": module, "image": image}]}}


def known(client: Client, title: str) -> str:
    """The script's title in small letters, where the fork has it."""
    if title not in client.call("/sdapi/v1/scripts")["txt2img"]:
        pytest.skip(f"it has no {title}")
    return title


def picture(client: Client, own: dict[str, Any], settings: dict[str, Any] | None = None, **payload: Any) -> Picture:
    """The first picture: ControlNet adds its hint."""
    return client.txt2img(**scripts(own, **(settings or {})), **payload).images[0]


def assert_guided_and_then_not(client: Client, own: dict[str, Any], settings: dict[str, Any]) -> None:
    """Off, on, off again; and on with extra rows that share nothing."""
    client.txt2img(**scripts(own))  # a fork's first one may differ by itself
    off, left = picture(client, own), state(client)["leftovers"]  # MultiDiffusion leaves what it has put on
    on = picture(client, own, settings)
    assert difference(on, off) > 0.3
    assert np.array_equal(picture(client, own), off)
    with sharing_nothing(client):
        assert largest(picture(client, own, settings), on) <= 1
    assert state(client)["leftovers"] == left


@pytest.mark.parametrize("model", ["control_tiny_sd15", "control_tiny_shuffle", "t2iadapter"])
@pytest.mark.parametrize("settings", [PAG, BOTH], ids=str)
def test_controlnet(beside: Client, model: str, settings: dict[str, Any]) -> None:
    beside.load_checkpoint("sd1")
    own = unit(beside, model)
    assert difference(picture(beside, own), picture(beside, {})) > 1
    assert_guided_and_then_not(beside, own, settings)


def test_controlnet_of_sdxl(beside: Client) -> None:
    beside.load_checkpoint("sdxl")
    assert_guided_and_then_not(beside, unit(beside, "control_tiny_sdxl"), BOTH)


def test_controlnets_cost(beside: Client) -> None:
    """It runs for the host's rows alone, and once more for the picture that SAG makes."""
    beside.load_checkpoint("sd1")
    own = unit(beside, "control_tiny_sd15")
    off = counted(beside, **scripts(own))
    assert state(beside)["control_calls"] == [2]
    assert round(counted(beside, **scripts(own, **PAG)) / off, 2) <= 1.21
    assert (state(beside)["calls"], state(beside)["control_calls"]) == ([3], [2])
    assert counted(beside, **scripts(own, **BOTH)) / off <= 1.86
    assert (state(beside)["calls"], state(beside)["control_calls"]) == ([3, 1], [2, 1])


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
def test_ip_adapter(beside: Client, checkpoint: str) -> None:
    """It replaces cross-attentions, and reads there which rows are conditional."""
    beside.load_checkpoint(checkpoint)
    own = unit(beside, f"ip-adapter_tiny_{'sd15' if checkpoint == 'sd1' else 'sdxl'}", "an embedding")
    if beside.request("/sdapi/v1/txt2img", DEFAULTS | scripts(own)).status != 200:
        pytest.skip("it fails by itself on a CPU")
    assert difference(picture(beside, own), picture(beside, {})) > 1
    assert_guided_and_then_not(beside, own, BOTH)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_style_align(beside: Client, strength: float) -> None:
    """Pictures of a batch look at each other: so do the host's rows, and extra rows make a call of their own."""
    beside.load_checkpoint("sd1")
    own = {known(beside, "stylealign integrated"): {"args": [True, strength]}}
    plain, off = (beside.txt2img(batch_size=2, **scripts(which)).images for which in ({}, own))
    assert difference(off[-1], plain[-1]) > 0.3
    on = beside.txt2img(batch_size=2, **scripts(own, **BOTH)).images
    assert state(beside)["calls"] == [4, 2, 2] * 4
    assert difference(on[-1], off[-1]) > 0.3
    assert np.array_equal(beside.txt2img(batch_size=2, **scripts(own)).images[-1], off[-1])


def multi_diffusion(client: Client, method: str, at_once: int) -> dict[str, Any]:
    """Tiles of 64 pixels, which overlap by 32."""
    return {known(client, "multidiffusion integrated"): {"args": [True, method, 64, 64, 32, at_once]}}


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers"])
@pytest.mark.parametrize("at_once", [1, 4])
def test_multi_diffusion(beside: Client, method: str, at_once: int) -> None:
    """PAG works in tiles; in the middle of one of 64 pixels there is one token, and PAG does nothing."""
    beside.load_checkpoint("sd1")
    own = multi_diffusion(beside, method, at_once)
    off = picture(beside, own)
    assert difference(off, picture(beside, {})) > 1
    assert largest(picture(beside, own, NULL), off) <= 1
    assert_guided_and_then_not(beside, own, {**PAG, "pag_blocks": "output.3-5"})
    refused = beside.request("/sdapi/v1/txt2img", DEFAULTS | scripts(own, **BOTH))
    assert refused.status == 422
    assert "beside MultiDiffusion Integrated" in refused.body["detail"]
    whole = {title: {"args": [True, method, 256, 256, 32, at_once]} for title in own}
    assert difference(picture(beside, whole, BOTH), picture(beside, whole)) > 0.3  # a picture of one tile

