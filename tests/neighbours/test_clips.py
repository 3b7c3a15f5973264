"""AnimateDiff: a batch's pictures are the frames of a clip, which layers put into the U-Net mix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Generation
from installations import Installation
from real_hosts import LEVEL, NULL, PROBE, TINY, ours, started
from server import REPOSITORY, Server

STRONG = {"pag": {"pag_enabled": True, "pag_scale": 3}, "sag": {"sag_enabled": True, "sag_scale": 1}}
FRAMES = STEPS = 4


@pytest.fixture(scope="module", params=["sag-pag", "zz-sag-pag"])
def webui(
    request: pytest.FixtureRequest, webui_installation: Installation, neighbours_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Our folder's name says whose callback comes first."""
    extensions = {request.param: REPOSITORY, **PROBE, "tiny-motion": REPOSITORY / "tests/neighbours/tiny_motion"}
    data = tmp_path_factory.mktemp("clips")
    with started(
        webui_installation, neighbours_folder, data, folders=["sd-webui-animatediff"], extensions=extensions,
    ) as server:
        yield server


def made(webui: Server, settings: dict[str, Any] | None, *, window: int = FRAMES, **payload: Any) -> Generation:
    clip = {
        "enable": True, "model": "tiny.safetensors", "video_length": FRAMES, "batch_size": window, "format": ["PNG"],
    }
    scripts = {"AnimateDiff": {"args": [clip]}, **ours(settings)}
    return webui.client.txt2img(**{"width": 64, "height": 64, "alwayson_scripts": scripts, **payload})


def apart(first: Generation, second: Generation) -> int:
    """The largest difference of any frame."""
    pairs = zip(first.images, second.images, strict=True)
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


def calls(webui: Server) -> list[int]:
    rows: list[int] = webui.client.call("/probe/state")["calls"]
    return rows


@pytest.fixture(params=[True, False], ids=["batched", "batching off"])
def batched(request: pytest.FixtureRequest, webui: Server) -> Iterator[bool]:
    with webui.client.options(batch_cond_uncond=request.param):
        yield request.param


def test_a_clip_within_its_context(webui: Server, batched: bool) -> None:
    off = made(webui, None)
    assert calls(webui) == ([2 * FRAMES] * STEPS if batched else [FRAMES] * 2 * STEPS)
    assert apart(off, webui.client.txt2img(width=64, height=64, batch_size=FRAMES)) > LEVEL
    for feature in ("pag", "sag"):
        null, tiny = made(webui, NULL[feature]), made(webui, TINY[feature])
        assert apart(null, off) <= LEVEL
        assert apart(tiny, off) <= LEVEL
        assert f"{feature.upper()}: True" in tiny.infotext
        assert "note" not in tiny.infotext
    assert apart(made(webui, None), off) == 0


def test_every_step_is_guided_however_many_calls_make_it(webui: Server) -> None:
    pictures = []
    for together in (True, False):
        with webui.client.options(batch_cond_uncond=together):
            pictures.append(made(webui, STRONG["pag"], width=128, height=128))
            off = made(webui, None, width=128, height=128)
            assert apart(pictures[-1], off) > LEVEL
    assert apart(*pictures) <= LEVEL


@pytest.mark.parametrize("feature", STRONG)
def test_a_clip_longer_than_its_context(webui: Server, feature: str) -> None:
    mark = webui.log_mark()
    refused = made(webui, STRONG[feature], window=FRAMES // 2, expect=422)
    assert refused.body["body"]["neighbour"] == "AnimateDiff"
    assert f"set its context batch size to the number of frames ({FRAMES})" in refused.body["detail"]
    assert "Traceback" not in webui.log(mark)
    off, again = made(webui, None), made(webui, None)
    assert apart(off, again) == 0
