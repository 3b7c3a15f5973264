"""A WebUI, started anew for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from double import Host, running


@pytest.fixture
def host() -> Iterator[Host]:
    """A freshly started double of the WebUI with the extension in it."""
    with running() as host:
        yield host
