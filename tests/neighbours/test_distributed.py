"""stable-diffusion-webui-distributed: a master and a worker, the latter with our extension or without."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Generation
from installations import Installation
from PIL import Image
from real_hosts import LEVEL, OURS, difference, ours, started
from server import Server

FOLDER = "stable-diffusion-webui-distributed"
PAG = {"pag_enabled": True, "pag_scale": 3}
SHOWN = {"sag_enabled": True, "sag_scale": 1, "sag_show": True}


def config(worker: Server) -> dict[str, Any]:
    """Both are as fast as each other, and neither need be tried for how fast it is."""
    port = int(worker.url.rsplit(":", 1)[1])
    benchmark = {"prompt": "a cat", "negative_prompt": "", "steps": 4, "width": 128, "height": 128, "batch_size": 1}
    return {
        "workers": [
            {"master": {"avg_ipm": 60.0, "master": True, "address": "localhost", "port": 7860, "state": 1}},
            {"other": {"avg_ipm": 60.0, "address": "127.0.0.1", "port": port, "state": 1}},
        ],
        "benchmark_payload": benchmark, "job_timeout": 30, "complement_production": False,
    }


@pytest.fixture(scope="module", params=["a worker with it", "a worker without it"])
def both(
    request: pytest.FixtureRequest, webui_installation: Installation, neighbours_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, Server, bool]]:
    """The master, the worker, and whether that has our extension."""
    has_ours = request.param == "a worker with it"
    folder = tmp_path_factory.mktemp("distributed")
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(started(
            webui_installation, neighbours_folder, folder / "worker", extensions=OURS if has_ours else {},
        ))
        file = folder / "distributed-config.json"
        file.write_text(json.dumps(config(worker)), encoding="utf-8")
        master = stack.enter_context(started(
            webui_installation, neighbours_folder, folder / "master", folders=[FOLDER],
            arguments=["--distributed-config", str(file)],
        ))
        yield master, worker, has_ours


def made(server: Server, settings: dict[str, Any] | None, **payload: Any) -> Generation:
    """Pictures that are saved come with a grid, without which the master takes one picture's text for another's."""
    return server.client.txt2img(alwayson_scripts=ours(settings), save_images=True, **payload)


def saved(server: Server) -> dict[Path, str]:
    """The files that a WebUI has saved, with their texts."""
    texts = {}
    for file in sorted((server.data_folder / "outputs").rglob("*.png")):
        with Image.open(file) as image:
            texts[file] = str(image.info.get("parameters", ""))
    return texts


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if "*** Error" in line or "Traceback" in line]


def is_claimed(texts: Iterable[str], what: str) -> list[bool]:
    return [what in text for text in texts]


def test_a_picture_says_what_it_was_guided_with_where_it_was_made(both: tuple[Server, Server, bool]) -> None:
    """The master's files say nothing of guidance for a worker's pictures; the gallery has the worker's own texts."""
    master, worker, has_ours = both
    mark, before = master.log_mark(), saved(master)
    guided = made(master, PAG, batch_size=4)
    files = [text for file, text in saved(master).items() if file not in before and "grid" not in file.name]
    grid, *texts = guided.info["infotexts"]
    assert "PAG" not in grid
    assert is_claimed(texts, "PAG: True") == [True, True, has_ours, has_ours]
    assert is_claimed(texts, "Worker Label: other") == [False, False, True, True]
    assert is_claimed(files, "PAG: True") == [True, True, False, False]
    assert not any(is_claimed([*texts, *files], "note"))
    assert errors(master.log(mark)) == []
    alone = made(worker, PAG if has_ours else None, seed=3, batch_size=2)
    plain = made(worker, None, seed=3, batch_size=2)
    for number in range(2):
        pictures = (kept.astype(int) for kept in (guided.images[3 + number], alone.images[1 + number]))
        assert np.abs(next(pictures) - next(pictures)).max() <= LEVEL
    assert has_ours == (difference(alone, plain, 1) > LEVEL)


@pytest.mark.parametrize(("size", "batches"), [(4, 1), (2, 2)], ids=["one batch", "two batches"])
def test_what_sag_saw(both: tuple[Server, Server, bool], size: int, batches: int) -> None:
    """The master shows what it saw of its own pictures, with their texts."""
    master, _, _ = both
    mark = master.log_mark()
    shown = made(master, SHOWN, batch_size=size, n_iter=batches)
    assert errors(master.log(mark)) == []
    texts = shown.info["infotexts"][1:]
    sheets = [text for text in texts if "SAG sheet" in text and "Worker Label" not in text]
    assert [text.split("Seed: ")[1][0] for text in sheets] == ["1", "2"]
    assert is_claimed(sheets, "SAG: True") == [True, True]


def test_off_on_off(both: tuple[Server, Server, bool]) -> None:
    master, _, _ = both
    first, _, third = (made(master, settings, batch_size=2) for settings in (None, PAG, None))
    assert all(np.array_equal(a, b) for a, b in zip(first.images, third.images, strict=True))
    assert not any(is_claimed(third.info["infotexts"], "PAG"))
