"""The README's parameter table is the one that the definition of the parameters makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lab.readme import parameter_table
from sag_pag.settings import Settings

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_is_up_to_date() -> None:
    """``python -m lab readme`` writes it anew."""
    assert parameter_table() in README


def test_the_payload_is_accepted() -> None:
    payloads = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL)]
    assert payloads
    for payload in payloads:
        for script in payload["alwayson_scripts"].values():
            assert Settings.from_list(script["args"]).enabled
