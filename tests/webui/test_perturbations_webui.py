"""Every perturbation and every n-th step in each WebUI, and SEG beside another extension's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from client import Client
from conftest import EXTENSIONS, ServerFactory
from test_forks_webui import counted, largest
from test_generation import BOTH, difference, guided, load_known, state

SEG = {"pag_scale": 3.0, "pag_perturbation": "blurred queries"}
SSG = {"pag_scale": 3.0, "pag_perturbation": "swapped tokens", "pag_swap": 0.3}
WAYS = [SEG, {**SEG, "pag_query_blur": 1.5}, SSG]
IDS = ["SEG", "SEG of width 1.5", "SSG"]
WIDE = {"width": 192, "height": 128}
"""The map of the middle block is then no square."""
OTHER = "sd-perturbed-attention"


@pytest.fixture(autouse=True)
def _sd1(client: Client) -> None:
    client.load_checkpoint("sd1")


@pytest.mark.parametrize("settings", WAYS, ids=IDS)
@pytest.mark.parametrize("checkpoint", ["sd1", "sd2-v", "sdxl"])
@pytest.mark.parametrize("blocks", ["middle", "output.3-5"])
def test_every_perturbation(
    checkpoint: str, settings: dict[str, Any], blocks: str, client: Client, installation: Any
) -> None:
    """Off, on, off; rows that share what ran before them give the picture of rows that share nothing."""
    load_known(client, checkpoint, installation.name)
    off = client.txt2img(**WIDE)
    on = client.txt2img(**WIDE, **guided(**settings, pag_blocks=blocks))
    assert state(client)["calls"] == [3] * 4
    assert difference(on.image, off.image) > 0.1
    assert f"PAG perturbation: {settings['pag_perturbation']}" in on.infotext
    client.call("/probe/plain_rows/1", {})
    try:
        plain = client.txt2img(**WIDE, **guided(**settings, pag_blocks=blocks))
    finally:
        client.call("/probe/plain_rows/0", {})
    assert largest(on.image, plain.image) <= 1
    assert largest(client.txt2img(**WIDE).image, off.image) == 0


@pytest.mark.parametrize("settings", [SEG, SSG], ids=["SEG", "SSG"])
def test_no_perturbation_costs_more_than_pag(settings: dict[str, Any], client: Client) -> None:
    off = counted(client)
    assert counted(client, **guided(**settings)) / off <= 1.36


def test_blurred_queries_of_one_token_are_the_queries(client: Client) -> None:
    """The middle block's map has one token there."""
    small = {"width": 64, "height": 64}
    off = client.txt2img(**small).image
    assert largest(client.txt2img(**small, **guided(**{**SEG, "pag_scale": 20.0})).image, off) <= 1


def test_every_second_step(client: Client) -> None:
    """Counted by the sampler's own steps, from the picture's first on; each feature by its own."""
    cases = [
        ({"pag_scale": 3.0, "pag_every": 2}, [3, 2, 3, 2]),
        ({"sag_scale": 0.75, "sag_every": 2}, [2, 1, 2, 2, 1, 2]),
        ({**BOTH, "pag_every": 2, "sag_every": 4}, [3, 1, 2, 3, 2]),
        ({"pag_scale": 3.0, "pag_every": 2, "pag_start": 0.25}, [2, 2, 3, 2]),
    ]
    off = client.txt2img()
    for settings, calls in cases:
        on = client.txt2img(**guided(**settings))
        assert state(client)["calls"] == calls, settings
        assert difference(on.image, off.image) > 0.02
    # Heun calls its denoiser twice a step, but for the last
    client.txt2img(sampler_name="Heun", **guided(pag_scale=3.0, pag_every=2))
    assert state(client)["calls"] == [3, 3, 2, 2, 3, 3, 2]


@pytest.mark.only_on("forge", "reforge")
@pytest.mark.parametrize("shape", [{}, WIDE], ids=["square", "wide"])
def test_equal_to_another_extensions_seg(start_server: ServerFactory, shape: dict[str, int]) -> None:
    """sd-perturbed-attention 904319b, with the mean of the queries in the middle block; in ``NEIGHBOURS_DIR``."""
    other = Path(os.environ.get("NEIGHBOURS_DIR") or "nowhere") / OTHER
    if not other.is_dir():
        pytest.skip(f"NEIGHBOURS_DIR has no {OTHER}")
    client = start_server(f"other-{len(shape)}", extensions={**EXTENSIONS, OTHER: other}).client
    theirs = {"smoothed energy guidance": {"args": [
        True, 3.0, 0.0, "full", -1.0, "middle", 0, "", False, 7.0, 3.0, 0.0, "full", -1.0, -1.0, -1.0,
    ]}}
    off = client.txt2img(**shape).image
    expected = client.txt2img(**shape, alwayson_scripts=theirs).image
    assert difference(expected, off) > 0.1
    assert largest(client.txt2img(**shape, **guided(**SEG)).image, expected) <= 1
