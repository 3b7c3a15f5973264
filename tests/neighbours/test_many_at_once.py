"""Many neighbours in one WebUI, first with nothing of them switched on, then several at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Generation
from fitted import fitted
from installations import Installation
from neighbour_cases import CONTROLNET, unit
from real_hosts import LEVEL, NULL, OURS, PROBE, TINY, difference, ours, started
from server import Server

FOLDERS = (
    CONTROLNET, "sd-dynamic-thresholding", "sd-webui-cads", "sd-webui-freeu", "sd-webui-lora-block-weight",
    "prompt-fusion-extension", "sd-webui-agent-scheduler",
)
FREE_U = {"enable": True, "version": "1", "stage_infos": [
    {"backbone_factor": 1.4, "skip_factor": 0.9}, {"backbone_factor": 1.6, "skip_factor": 0.2},
]}
"""Its second version divides nought by nought where a feature map has one place, as in the null test."""
ACTIVE = {"FreeU": {"args": [FREE_U]}}
FIELDS = ("ControlNet 0", "FreeU Stages", "Hypertile U-Net")
CHANGES = {"pag": {"pag_enabled": True, "pag_scale": 3}, "sag": {"sag_enabled": True, "sag_scale": 1}}


@pytest.fixture(scope="module")
def webui(
    webui_installation: Installation, neighbours_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("many")
    extensions = {**OURS, **PROBE, **{name: fitted(neighbours_folder / name, folder / "fitted") for name in FOLDERS}}
    with started(
        webui_installation, neighbours_folder, folder / "data", extensions=extensions,
        arguments=["--controlnet-dir", f"{neighbours_folder}-tiny"],
    ) as server:
        yield server


@pytest.fixture(params=["idle", "three at once"])
def scripts(request: pytest.FixtureRequest, webui: Server) -> Iterator[dict[str, Any]]:
    """The neighbours' part of a request, with the WebUI's options set for it."""
    if request.param == "idle":
        yield {}
        return
    models = webui.client.call("/controlnet/model_list")["model_list"]
    name = next(model for model in models if model.startswith("control_tiny_sd15"))
    webui.client.set_options(hypertile_enable_unet=True)  # with all of these its options are not in the list of options
    yield {**ACTIVE, "controlnet": {"args": [unit(name)]}}
    webui.client.set_options(hypertile_enable_unet=False)


def made(webui: Server, scripts: dict[str, Any], settings: dict[str, Any] | None, **payload: Any) -> Generation:
    size = {"width": 64, "height": 64, **payload}
    return webui.client.txt2img(**size, alwayson_scripts={**scripts, **ours(settings)})


def calls(webui: Server) -> list[int]:
    rows: list[int] = webui.client.call("/probe/state")["calls"]
    return rows


def test_beside_many(webui: Server, scripts: dict[str, Any]) -> None:
    mark = webui.log_mark()
    made(webui, scripts, None)  # a neighbour's first picture may differ by itself
    off = made(webui, scripts, None)
    for field in FIELDS:
        assert (field in off.infotext) == bool(scripts)
    assert (difference(off, made(webui, {}, None)) > LEVEL) == bool(scripts)
    for feature in ("pag", "sag"):
        null, tiny = made(webui, scripts, NULL[feature]), made(webui, scripts, TINY[feature])
        assert difference(null, off) <= LEVEL
        assert difference(tiny, off) <= LEVEL
        assert f"{feature.upper()}: True" in tiny.infotext
        assert "SAG/PAG note" not in tiny.infotext
        for field in FIELDS:
            assert (field in tiny.infotext) == bool(scripts)
    last = made(webui, scripts, None)
    assert difference(last, off) == 0
    assert last.infotext == off.infotext
    assert [line for line in webui.log(mark).splitlines() if "Traceback" in line or "*** Error" in line] == []


def test_guidance_changes_the_picture(webui: Server, scripts: dict[str, Any]) -> None:
    """With all of them idle PAG rides along in the host's call; beside ControlNet it takes a call of its own."""
    large = {"width": 128, "height": 128}
    off = made(webui, scripts, None, **large)
    rows = calls(webui)
    for feature, settings in CHANGES.items():
        assert difference(made(webui, scripts, settings, **large), off) > LEVEL
        own = [2, 1] if scripts or feature == "sag" else [3]
        assert calls(webui) == own * len(rows)
    assert difference(made(webui, scripts, None, **large), off) == 0
