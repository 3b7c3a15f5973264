"""What forks have of their own to hold ours to, and what is the same in every WebUI: shared rows, counted costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client import Client, Picture
from test_generation import BOTH, difference, guided, load_known, state


def largest(a: Picture, b: Picture) -> int:
    """The largest difference in levels of 255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def built_in(title: str, *args: Any) -> dict[str, Any]:
    """The request's part that switches a script of the fork's own on."""
    return {"alwayson_scripts": {title: {"args": [True, *args]}}}


OWN_PAG = built_in("perturbedattentionguidance integrated", 3.0, 0.0, 0.0, 1.0)
OWN_SAG = {
    "forge": built_in("selfattentionguidance integrated (sd 1.x, sd 2.x, sdxl)", 0.75, 1.0, 1.0),
    "reforge": built_in("selfattentionguidance integrated", 0.75, 1.0, 1.0),
}


@pytest.mark.only_on("forge")
@pytest.mark.parametrize("checkpoint", ["sd1", "sd2-v"])
def test_equal_to_forges_own_pag(checkpoint: str, client: Client) -> None:
    """It works in the middle block, as ours does by default."""
    client.load_checkpoint(checkpoint)
    off, theirs = client.txt2img().image, client.txt2img(**OWN_PAG).image
    assert difference(theirs, off) > 0.3
    assert largest(client.txt2img(**guided(pag_scale=3.0)).image, theirs) <= 1


@pytest.mark.only_on(*OWN_SAG)
@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
def test_equal_to_the_forks_own_sag(checkpoint: str, client: Client, installation: Any) -> None:
    client.load_checkpoint(checkpoint)
    off, theirs = client.txt2img().image, client.txt2img(**OWN_SAG[installation.name]).image
    assert difference(theirs, off) > 0.3
    block = "middle.0"
    assert largest(client.txt2img(**guided(sag_scale=0.75, sag_block=block)).image, theirs) <= 1


@pytest.mark.only_on("forge", "reforge")
def test_beside_the_forks_own(client: Client, installation: Any) -> None:
    """Both guidances are added, whichever is whose: half of a scale here and half there is the whole."""
    client.load_checkpoint("sd1")
    title, own = next(iter(OWN_SAG[installation.name]["alwayson_scripts"].items()))
    args = [True, 0.25, *own["args"][2:]]
    whole = client.txt2img(**guided(sag_scale=0.75)).image
    scripts = {**guided(sag_scale=0.5)["alwayson_scripts"], title: {"args": args}}
    assert largest(client.txt2img(alwayson_scripts=scripts).image, whole) <= 1
    if installation.name == "forge":
        whole = client.txt2img(**guided(pag_scale=4.5)).image
        scripts = {**guided(pag_scale=1.5)["alwayson_scripts"], **OWN_PAG["alwayson_scripts"]}
        assert largest(client.txt2img(alwayson_scripts=scripts).image, whole) <= 1


@contextlib.contextmanager
def sharing_nothing(client: Client) -> Iterator[None]:
    """Extra rows run through the whole U-Net."""
    client.call("/probe/plain_rows/1", {})
    try:
        yield
    finally:
        client.call("/probe/plain_rows/0", {})


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
@pytest.mark.parametrize("blocks", ["middle", "output.3-5"])
def test_the_shared_prefix_gives_the_same_picture(
    checkpoint: str, blocks: str, client: Client, installation: Any
) -> None:
    """As extra rows that run through the whole U-Net."""
    load_known(client, checkpoint, installation.name)
    settings = BOTH if blocks == "middle" else {"pag_scale": 3.0}  # SAG reads in what else is shared
    shared = client.txt2img(**guided(**settings, pag_blocks=blocks)).image
    with sharing_nothing(client):
        plain = client.txt2img(**guided(**settings, pag_blocks=blocks)).image
    assert largest(shared, plain) <= 1


def counted(client: Client, **request: Any) -> int:
    """Floating-point operations of all U-Net calls of a picture."""
    client.call("/probe/count/1", {})
    client.txt2img(steps=1, **request)
    operations: int = client.call("/probe/count/0", {})["counted"]
    return operations


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl"])
def test_counted_costs(checkpoint: str, client: Client, installation: Any) -> None:
    load_known(client, checkpoint, installation.name)
    off = counted(client)
    assert counted(client, **guided(pag_scale=3.0)) / off <= 1.35
    assert round(counted(client, **guided(sag_scale=0.75)) / off, 2) == 1.50
    assert counted(client, **guided(**BOTH)) / off <= 1.86


@pytest.mark.only_on("forge", "reforge", "neo", "classic")
def test_no_cfg_has_one_row(client: Client) -> None:
    client.load_checkpoint("sd1")
    off = client.txt2img(cfg_scale=1.0).image
    on = client.txt2img(cfg_scale=1.0, **guided(**BOTH)).image
    assert state(client)["calls"] == [2, 1] * 4
    assert difference(on, off) > 0.5


@pytest.mark.only_on("forge", "reforge")
@pytest.mark.parametrize("title", ["freeu integrated (sd 1.x, sd 2.x, sdxl)", "freeu integrated"])
def test_beside_freeu(title: str, client: Client) -> None:
    client.load_checkpoint("sd1")
    known = client.call("/sdapi/v1/scripts")["txt2img"]
    if title not in known:
        pytest.skip("another fork's title")
    freeu = built_in(title, 1.01, 1.02, 0.99, 0.95, 0.0, 1.0)["alwayson_scripts"]
    off = client.txt2img(alwayson_scripts=freeu).image
    on = client.txt2img(alwayson_scripts={**freeu, **guided(**BOTH)["alwayson_scripts"]}).image
    assert difference(on, off) > 0.5
    with sharing_nothing(client):
        plain = client.txt2img(alwayson_scripts={**freeu, **guided(**BOTH)["alwayson_scripts"]}).image
    assert largest(on, plain) <= 1
