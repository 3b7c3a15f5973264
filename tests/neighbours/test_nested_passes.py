"""ADetailer paints over what it has found in a picture, in a generation of its own inside that of the picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Generation
from installations import Installation
from real_hosts import LEVEL, OURS, PROBE, TINY, difference, ours, started
from server import REPOSITORY, Server

PAG = {"pag_enabled": True, "pag_scale": 3}
SHOWN = {"sag_enabled": True, "sag_scale": 1, "sag_show": True}
BOX = {"ad_model": "mediapipe_face_full", "ad_denoising_strength": 0.75}
STEPS = 4
NESTED = 4
"""Steps of ADetailer's own generation: the WebUI makes one more than their share at this denoising strength."""
LISTED, LEFT_OUT = {"ad_script_names": "sag_pag_script"}, {"ad_script_names": ""}


@pytest.fixture(scope="module")
def webui(
    webui_installation: Installation, neighbours_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    extensions = {**OURS, **PROBE, "detector": REPOSITORY / "tests/neighbours/detector"}
    data = tmp_path_factory.mktemp("nested")
    with started(
        webui_installation, neighbours_folder, data, folders=["adetailer"], extensions=extensions,
        arguments=["--ad-no-huggingface"],
    ) as server:
        yield server


def detected(**more: Any) -> dict[str, Any]:
    return {"ADetailer": {"args": [True, False, {**BOX, **more}]}}


def made(webui: Server, settings: dict[str, Any] | None, **payload: Any) -> Generation:
    return webui.client.txt2img(**payload, steps=STEPS, alwayson_scripts={**detected(), **ours(settings)})


def calls(webui: Server) -> list[int]:
    """The rows of the last picture's calls of the U-Net; those of the nested generation too."""
    rows: list[int] = webui.client.call("/probe/state")["calls"]
    return rows


def above_the_box(generation: Generation) -> Any:
    """What ADetailer leaves alone."""
    return generation.image[: len(generation.image) // 8]


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if "*** Error" in line or "Traceback" in line]


@pytest.mark.parametrize(("scripts", "rows"), [(LISTED, 3), (LEFT_OUT, 2)], ids=["in its list", "left out"])
def test_the_nested_pass_is_guided_if_our_script_is_in_its_list(webui: Server, scripts: Any, rows: int) -> None:
    mark = webui.log_mark()
    alone = webui.client.txt2img(steps=STEPS, alwayson_scripts=ours(PAG))
    with webui.client.options(**scripts):
        off = made(webui, None)
        assert calls(webui) == [2] * (STEPS + NESTED)
        guided = made(webui, PAG)
        assert calls(webui) == [3] * STEPS + [rows] * NESTED
        assert "PAG: True" in guided.infotext
        assert "note" not in guided.infotext
        assert np.array_equal(above_the_box(guided), above_the_box(alone))
        assert not np.array_equal(guided.image, alone.image)
        assert difference(made(webui, TINY["pag"]), off) <= LEVEL
        assert difference(made(webui, TINY["sag"]), off) <= LEVEL
        assert difference(made(webui, None), off) == 0
    assert errors(webui.log(mark)) == []


@pytest.mark.parametrize("scripts", [LISTED, LEFT_OUT], ids=["in its list", "left out"])
def test_a_model_that_can_not_be_guided(webui: Server, scripts: Any) -> None:
    """ADetailer has all scripts process a copy after it, which shares the metadata: the note stays, no claim comes."""
    with webui.client.options(sd_unet="Other", **scripts):
        texts = made(webui, PAG, batch_size=2).info["infotexts"]
    assert ["PAG: True" in text for text in texts] == [False, False]
    assert ["not applied, the U-Net Other" in text for text in texts] == [True, True]
    assert "note" not in made(webui, PAG).infotext


def test_another_checkpoint_in_the_nested_pass(webui: Server) -> None:
    with webui.client.options(**LISTED):
        scripts = detected(ad_use_checkpoint=True, ad_checkpoint="sdxl.safetensors")
        guided = webui.client.txt2img(steps=STEPS, alwayson_scripts={**scripts, **ours(PAG)}, batch_size=2)
        plain = webui.client.txt2img(steps=STEPS, alwayson_scripts=ours(PAG), batch_size=2)
    assert ["PAG: True" in text for text in guided.info["infotexts"]] == [True, True]
    assert all(np.array_equal(a[:16], b[:16]) for a, b in zip(guided.images, plain.images, strict=True))


def test_what_sag_saw_is_shown_once_for_each_picture(webui: Server) -> None:
    mark = webui.log_mark()
    with webui.client.options(**LISTED):
        shown = made(webui, SHOWN, batch_size=2, n_iter=2)
    assert len(shown.images) == 8
    assert errors(webui.log(mark)) == []
