"""Start WebUIs with neighbours in them, for tests that are more than a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from client import Generation
from installations import Installation
from server import REPOSITORY, Server, ensure_checkpoints, running_server

TITLE = "Self-Attention & Perturbed-Attention Guidance"
OURS = {"sag-pag": REPOSITORY}
PROBE = {"probe": REPOSITORY / "tests/webui/probe"}
NULL = {"pag": {"pag_enabled": True, "pag_scale": 20}, "sag": {"sag_enabled": True, "sag_scale": 5, "sag_threshold": 3}}
"""At 64 x 64 pixels these do nothing: the map has one token, and the mask is empty."""
TINY = {
    "pag": {"pag_enabled": True, "pag_scale": 1e-6},
    "sag": {"sag_enabled": True, "sag_scale": 1e-6, "sag_threshold": 0},
}
LEVEL = 1
"""Of 255, by which a picture may differ."""

Started = Callable[..., AbstractContextManager[Server]]


def started(
    installation: Installation, neighbours: Path, data: Path, *, folders: Sequence[str] = (),
    extensions: Mapping[str, Path] = OURS, arguments: Sequence[str] = (), options: Mapping[str, Any] | None = None,
) -> AbstractContextManager[Server]:
    """A WebUI with ``folders`` of ``neighbours`` in it and with ``extensions``, as by default ours."""
    data.mkdir(parents=True, exist_ok=True)
    (data / "ui-config.json").write_text("{}", encoding="utf-8")  # NegPiP reads it when it is loaded
    return running_server(
        installation, checkpoints=ensure_checkpoints(installation), data_folder=data, options=options,
        extensions={**extensions, **{folder: neighbours / folder for folder in folders}}, arguments=arguments,
    )


def ours(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our part of a request's always-on scripts."""
    return {TITLE: {"args": [dict(settings)]}} if settings else {}


def difference(first: Generation, second: Generation, number: int = 0) -> int:
    """The largest difference of two pictures, of 255."""
    pictures = [made.images[number].astype(int) for made in (first, second)]
    return int(np.abs(pictures[0] - pictures[1]).max())
