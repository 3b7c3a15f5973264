"""The localisation files hold every text of the page that the WebUI can translate, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sag_pag.engine.joint import NO_SAG
from sag_pag.settings import BLOCKS_OF, PARAMETERS, SettingError
from sag_pag.webui import texts
from sag_pag.webui.presets import BUILT_IN

FOLDER = Path(__file__).parents[2] / "localizations"
SAME_IN_EVERY_LANGUAGE = {"SD 1.5", "SDXL", "SD3"}
"""Names of models."""
WITH_ANOTHER_NAME = {"zh-Hans (Stable)": "zh_CN", "zh-Hans (Testing)": "zh_CN"}
"""Users choose a language by its file's name, and the big localisation packs have different ones for the same."""
NUMBERS = re.compile(r"(?<![a-z])\d+(?:\.\d+)?")
"""Those of words, as in img2img, are none."""
EMOJI = re.compile("[\u2600-\u2712\u2714-\u27bf\U0001f000-\U0001faff]")
"""A text with one is not translated by the WebUI; ✓ (2713) is none."""


def on_the_page() -> Iterator[str]:
    """Every text of the panel, and of the plot's axes, that stands in an element of its own and holds no value."""
    for parameter in PARAMETERS.values():
        yield parameter.label
        yield parameter.help
        yield texts.axis_label(parameter)
        yield from (choice for choice in parameter.choices if choice not in texts.CHOICES)
    for preset in BUILT_IN:
        yield preset.name
        yield preset.description
    for name, value in vars(texts).items():
        if name.isupper() and isinstance(value, (str, dict)):
            shown = [value] if isinstance(value, str) else value.values()
            yield from (part for text in shown if text not in texts.UNTRANSLATED for part in texts.parts(text) if part)
    yield NO_SAG
    for name in BLOCKS_OF.values():
        yield SettingError(name, "", "").for_people


@pytest.fixture(params=["zh_CN", "ja_JP"])
def words(request: pytest.FixtureRequest) -> dict[str, str]:
    found: dict[str, str] = json.loads((FOLDER / f"{request.param}.json").read_text(encoding="utf-8"))
    return found


def test_complete_and_nothing_stale(words: dict[str, str]) -> None:
    wanted = set(on_the_page())
    assert wanted - words.keys() == set()
    assert words.keys() - wanted == set()


def test_everything_is_translated(words: dict[str, str]) -> None:
    assert {key for key, word in words.items() if key == word} == SAME_IN_EVERY_LANGUAGE
    assert all(word and word == word.strip() for word in words.values())


def test_nothing_that_the_webui_passes_over(words: dict[str, str]) -> None:
    assert not [key for key in words if EMOJI.search(key) or re.fullmatch(r"[.\d]+", key) or key != key.strip()]


def test_the_numbers_are_the_same(words: dict[str, str]) -> None:
    """A default or a range that changes in the English text has to change in every language."""
    for key, word in words.items():
        assert sorted(NUMBERS.findall(key)) == sorted(NUMBERS.findall(word)), key


def test_each_language_under_all_its_names() -> None:
    names = {path.stem for path in FOLDER.iterdir()}
    assert names == {"zh_CN", "ja_JP", *WITH_ANOTHER_NAME}
    for name, original in WITH_ANOTHER_NAME.items():
        assert (FOLDER / f"{name}.json").read_bytes() == (FOLDER / f"{original}.json").read_bytes()
