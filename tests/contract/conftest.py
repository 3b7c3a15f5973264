"""A WebUI, started anew for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "webui/probe"))

from double import Host, running


@pytest.fixture
def host() -> Iterator[Host]:
    """A freshly started double of the WebUI with the extension in it."""
    with running() as host:
        yield host
