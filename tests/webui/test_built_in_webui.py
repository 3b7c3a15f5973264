"""Beside what forks bring along: ControlNet and IP-Adapter with tiny weights, StyleAlign, MultiDiffusion.

``NEIGHBOURS_DIR`` names a folder of checkouts; ControlNet's weights are in one beside it, whose name ends in ``-tiny``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import DEFAULTS, Client, Picture, encode_image
from conftest import EXTENSIONS, ServerFactory
from installations import Installation
from test_forks_webui import counted, largest, sharing_nothing
from test_generation import BOTH, difference, guided, state

FORKS = ("forge", "reforge", "neo", "classic")
PAG = {"pag_scale": 3.0}
NULL = {"pag_scale": 20.0}
"""Changes nothing where the map has one token: attention over it is the identity."""
HINT = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)

pytestmark = pytest.mark.only_on(*FORKS)


def write_ip_adapter(file: Path, *, widths: list[int], context: int) -> None:
    """Random weights of an IP-Adapter, as a safetensors file: it makes four tokens of ``context`` channels of an
    embedding of 48, and keys and values of them for cross-attentions of these ``widths``.

    In half precision: forks on a processor can't use weights that they need not convert.
    """
    generator = np.random.default_rng(3)

    def drawn(*shape: int) -> np.ndarray[Any, Any]:
        return (generator.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float16)

    weights = {
        "image_proj.proj.weight": drawn(4 * context, 48), "image_proj.proj.bias": np.zeros(4 * context, np.float16),
        "image_proj.norm.weight": np.ones(context, np.float16), "image_proj.norm.bias": np.zeros(context, np.float16),
    }
    for number, width in enumerate(widths):
        weights |= {f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight": drawn(width, context) for part in "kv"}
    header, end = dict[str, Any](), 0
    for name, values in weights.items():
        header[name] = {"dtype": "F16", "shape": values.shape, "data_offsets": (end, end := end + values.nbytes)}
    encoded = json.dumps(header).encode()
    content = [len(encoded).to_bytes(8, "little"), encoded, *(values.tobytes() for values in weights.values())]
    file.write_bytes(b"".join(content))


@pytest.fixture(scope="module")
def beside(
    start_server: ServerFactory, installation: Installation, tmp_path_factory: pytest.TempPathFactory
) -> Client:
    """A fork with the tiny weights."""
    folder = os.environ.get("NEIGHBOURS_DIR")
    if not folder or installation.name not in FORKS:
        pytest.skip("NEIGHBOURS_DIR does not name a folder of checkouts")
    models = tmp_path_factory.mktemp("controlnet")
    for found in Path(f"{folder}-tiny").iterdir():
        if not found.name.startswith("ip-adapter"):
            (models / found.name).symlink_to(found)
    # forks count input, output and middle blocks; SDXL's adapter is known by its 2048 channels, its blocks are counted
    # as deep as they are in the real model
    sd1 = [32, 32, 64, 64, *[128] * 5, *[64] * 3, *[32] * 3, 128]
    sdxl = [*[64] * 4, *[128] * 50, *[64] * 6, *[128] * 10]
    write_ip_adapter(models / "ip-adapter_tiny_sd1.safetensors", widths=sd1, context=64)
    write_ip_adapter(models / "ip-adapter_tiny_sdxl.safetensors", widths=sdxl, context=2048)
    arguments = ("--controlnet-dir", str(models))
    return start_server("built-in", extensions=EXTENSIONS, arguments=arguments).client


def scripts(own: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A request with what is built in and, if there are settings, guidance."""
    return {"alwayson_scripts": {**own, **(guided(**settings)["alwayson_scripts"] if settings else {})}}


def unit(client: Client, model: str, module: str = "None") -> dict[str, Any]:
    """One unit of ControlNet; ``model`` is the beginning of its name."""
    models = client.call("/controlnet/model_list")["model_list"]
    name = next(found for found in models if f"{found} ".startswith(model))  # some add a space and a checksum
    image = encode_image(HINT)
    return {"controlnet": {"args": [{"enabled": True, "model": name, "module": module, "image": image}]}}


def has(client: Client, title: str, tab: str = "txt2img") -> bool:
    """Whether the fork has the script of that title, in small letters."""
    return title in client.call("/sdapi/v1/scripts")[tab]


def picture(client: Client, own: dict[str, Any], settings: dict[str, Any] | None = None, **payload: Any) -> Picture:
    """The first picture: ControlNet adds its hint. With ``init_images`` it is made from these."""
    make = client.img2img if "init_images" in payload else client.txt2img
    return make(**scripts(own, **(settings or {})), **payload).images[0]


def assert_guided_and_then_not(
    client: Client, own: dict[str, Any], settings: dict[str, Any], **payload: Any
) -> None:
    """Off, on, off again; and on with extra rows that share nothing."""
    picture(client, own, **payload)  # a fork's first one may differ by itself
    off, left = picture(client, own, **payload), state(client)["leftovers"]  # MultiDiffusion leaves what it has put on
    on = picture(client, own, settings, **payload)
    assert difference(on, off) > 0.3
    assert np.array_equal(picture(client, own, **payload), off)
    with sharing_nothing(client):
        assert largest(picture(client, own, settings, **payload), on) <= 1
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
@pytest.mark.parametrize("settings", [PAG, {"sag_scale": 0.75}, BOTH], ids=str)
def test_ip_adapter(beside: Client, checkpoint: str, settings: dict[str, Any]) -> None:
    """It replaces cross-attentions, and reads there which rows are conditional."""
    beside.load_checkpoint(checkpoint)
    own = unit(beside, f"ip-adapter_tiny_{checkpoint} ", "an embedding")
    assert difference(picture(beside, own), picture(beside, {})) > 1
    assert_guided_and_then_not(beside, own, settings)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_style_align(beside: Client, strength: float) -> None:
    """Pictures of a batch look at each other: so do the host's rows, and extra rows make a call of their own."""
    if not has(beside, "stylealign integrated"):
        pytest.skip("it has no StyleAlign")
    beside.load_checkpoint("sd1")
    own = {"stylealign integrated": {"args": [True, strength]}}
    plain, off = (beside.txt2img(batch_size=2, **scripts(which)).images for which in ({}, own))
    assert difference(off[-1], plain[-1]) > 0.3
    on = beside.txt2img(batch_size=2, **scripts(own, **BOTH)).images
    assert state(beside)["calls"] == [4, 2, 2] * 4
    assert difference(on[-1], off[-1]) > 0.3
    assert np.array_equal(beside.txt2img(batch_size=2, **scripts(own)).images[-1], off[-1])


MULTI_DIFFUSION = "multidiffusion integrated"


def tiles(method: str, size: int, at_once: int) -> dict[str, Any]:
    """Tiles of ``size`` pixels, which overlap by 32."""
    return {MULTI_DIFFUSION: {"args": [True, method, size, size, 32, at_once]}}


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers"])
@pytest.mark.parametrize("at_once", [1, 4])
def test_multi_diffusion(beside: Client, method: str, at_once: int) -> None:
    """PAG works in tiles; in the middle of one of 64 pixels there is one token, and PAG does nothing. Neo has it in
    img2img only.
    """
    in_both = has(beside, MULTI_DIFFUSION)
    if not in_both and not has(beside, MULTI_DIFFUSION, "img2img"):
        pytest.skip("it has no MultiDiffusion")
    tab, request = "txt2img", dict[str, Any]()
    if not in_both:
        tab, request = "img2img", {"init_images": [encode_image(HINT)], "denoising_strength": 0.8, "steps": 6}
    beside.load_checkpoint("sd1")
    own, whole = tiles(method, 64, at_once), tiles(method, 256, at_once)
    off = picture(beside, own, **request)
    assert difference(off, picture(beside, {}, **request)) > 1
    assert largest(picture(beside, own, NULL, **request), off) <= 1
    assert_guided_and_then_not(beside, own, {**PAG, "pag_blocks": "output.3-5"}, **request)
    refused = beside.request(f"/sdapi/v1/{tab}", DEFAULTS | request | scripts(own, **BOTH))
    assert refused.status == 422
    assert "beside MultiDiffusion Integrated" in refused.body["detail"]
    in_one = [picture(beside, whole, settings, **request) for settings in (BOTH, None)]
    assert difference(*in_one) > 0.3  # a picture of one tile
