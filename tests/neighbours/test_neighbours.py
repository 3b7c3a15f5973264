"""Every row of the table: null, tiny, off again, the picture's text, refusals. Writes ``docs/neighbours.csv``.

Where the map has one token identity attention is attention and an empty mask is none: guidance must do nothing there.
At a scale near 0 the picture must be the unguided one: what differs, our calls have done to the host's.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installations import Installation
from neighbour_cases import CASES, COMMITS, CONTROLNET, Case
from neighbours_table import FIELDS, FILE, write_table
from server import REPOSITORY, Server, ensure_checkpoints, running_server

TITLE = "Self-Attention & Perturbed-Attention Guidance"
NULL = {"pag": {"pag_enabled": True, "pag_scale": 20}, "sag": {"sag_enabled": True, "sag_scale": 5, "sag_threshold": 3}}
TINY = {
    "pag": {"pag_enabled": True, "pag_scale": 1e-6},
    "sag": {"sag_enabled": True, "sag_scale": 1e-6, "sag_threshold": 0},
}
LEVEL = 1
"""Of 255, by which a picture may differ."""

Start = Callable[[str], Server]


@pytest.fixture(scope="session")
def server_with(
    webui_installation: Installation, neighbours_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """A WebUI with one neighbour in it; the one before is stopped."""
    checkpoints = ensure_checkpoints(webui_installation)
    running: dict[str, Server] = {}
    stack = contextlib.ExitStack()

    def start(folder: str) -> Server:
        if folder not in running:
            stack.close()
            running.clear()
            extensions = {"sag-pag": REPOSITORY, "probe": REPOSITORY / "tests/webui/probe"}
            if folder:
                extensions[folder] = neighbours_folder / folder
            data = tmp_path_factory.mktemp("neighbour")
            (data / "ui-config.json").write_text("{}", encoding="utf-8")  # NegPiP reads it when it is loaded
            arguments = ["--controlnet-dir", f"{neighbours_folder}-tiny"] if folder == CONTROLNET else []
            running[folder] = stack.enter_context(running_server(
                webui_installation, checkpoints=checkpoints, data_folder=data, extensions=extensions,
                arguments=arguments,
            ))
        return running[folder]

    with stack:
        yield start


@pytest.fixture(scope="session")
def rows() -> Iterator[list[dict[str, str]]]:
    """The table's rows; rows of cases that did not run stay as they are."""
    made: list[dict[str, str]] = []
    yield made
    if made:
        write_table(made)


def _named(case: Case, server: Server) -> dict[str, Any]:
    """The case's arguments with the models' whole names."""
    scripts = {name: {"args": list(value["args"])} for name, value in case.scripts.items()}
    for unit in scripts.get("controlnet", {}).get("args", []):
        models = server.client.call("/controlnet/model_list")["model_list"]
        unit["model"] = next((model for model in models if model.startswith(unit["model"])), "None")
    return scripts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_beside(case: Case, server_with: Start, rows: list[dict[str, str]]) -> None:
    server = server_with(case.folder)
    scripts = _named(case, server)

    def made(settings: dict[str, Any] | None, *, expect: int = 200) -> Any:
        own = {TITLE: {"args": [settings]}} if settings else {}
        payload = {"width": 64, "height": 64, "alwayson_scripts": {**scripts, **own}, **case.payload}
        return server.client.txt2img(expect=expect, **payload)

    def difference(first: Any, second: Any) -> int:
        pictures = [made.images[0].astype(int) for made in (first, second)]  # ControlNet adds its hint
        return int(np.abs(pictures[0] - pictures[1]).max())

    with server.client.options(**case.options):
        made(None)  # a neighbour's first picture may differ by itself
        off = made(None)
        calls = server.client.call("/probe/state")["calls"]
        row = {"neighbour": case.name, "commit": COMMITS.get(case.folder, ""), "off": _each(calls, off)}
        for feature in ("pag", "sag"):
            if feature == case.refused:
                refused = made(TINY[feature], expect=422)
                assert refused.body["body"]["neighbour"]
                row |= {f"{feature}_null": "refused", f"{feature}_tiny": "refused", feature: "refused"}
                continue
            null, tiny = made(NULL[feature]), made(TINY[feature])
            row[feature] = _each(server.client.call("/probe/state")["calls"], tiny)
            row[f"{feature}_null"] = str(difference(null, off)) if case.null else "–"
            row[f"{feature}_tiny"] = str(difference(tiny, off))
            assert f"{feature.upper()}: True" in tiny.infotext
            assert ("SAG/PAG note" in tiny.infotext) == case.noted
            assert not case.null or difference(null, off) <= LEVEL
            assert difference(tiny, off) <= LEVEL
        assert difference(made(None), off) == 0
    rows.append({**dict.fromkeys(FIELDS, ""), **row})


def _each(calls: list[int], generation: Any) -> str:
    """The rows of the U-Net calls of one step, in the middle of the run, as far as steps can be told apart."""
    steps = int(generation.info["infotexts"][0].split("Steps: ")[1].split(",")[0])
    per = len(calls) // steps
    return "+".join(map(str, calls[-per:])) if per else ""


def test_the_table_is_that_of_the_results() -> None:
    """What is shown in the docs is what the CSV holds."""
    from neighbours_table import PAGE, table

    with FILE.open(encoding="utf-8", newline="") as file:
        assert table(list(csv.DictReader(file))) in PAGE.read_text(encoding="utf-8")
