"""Real extensions in the real WebUI: ``WEBUI_DIR`` names the one, ``NEIGHBOURS_DIR`` a folder with the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "webui"))
sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from installations import Installation, NoWebUIError


@pytest.fixture(scope="session")
def webui_installation() -> Installation:
    """The WebUI to test in."""
    try:
        return Installation.find()
    except NoWebUIError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def neighbours_folder() -> Path:
    """Where the extensions are."""
    folder = os.environ.get("NEIGHBOURS_DIR")
    if not folder:
        pytest.skip("NEIGHBOURS_DIR does not name a folder of checkouts")
    return Path(folder)
