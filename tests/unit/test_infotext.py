"""From settings to a picture's metadata and back through a reader that behaves as the WebUI's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sag_pag.settings import FEATURES, PARAMETERS, Settings, completed

OTHERS = {"Steps": "20", "Sampler": "Euler a", "CFG scale": "7", "Size": "512x640"}
BLOCKS = st.lists(
    st.sampled_from(["middle", "input.4", "output.3-5", "middle.0", "up.block_1.attentions_0", "d2.2-9"]), min_size=1
).map(", ".join)


def write(fields: dict[str, str]) -> str:
    """The metadata's last line: values with a comma, a colon or a line break become JSON strings."""
    return ", ".join(
        f"{key}: {json.dumps(value, ensure_ascii=False) if set(value) & set(',:' + chr(10)) else value}"
        for key, value in fields.items()
    )


def read(line: str) -> dict[str, str]:
    """The line's fields: a value is a quoted string or all up to the next comma; an empty one is lost.

    ``512x640`` becomes two fields, as for the picture's size.
    """
    fields: dict[str, str] = {}
    rest = line
    while rest:
        key = re.match(r"\s*([^\W][\w /-]+):\s*", rest)
        if key is None:
            rest = rest[1:]
            continue
        rest = rest[key.end() :]
        quoted = re.match(r'("(?:[^"\\]|\\.)+")(?:,|$)', rest)
        plain = re.match(r"([^,]*)(?:,|$)", rest)
        found = quoted or plain
        assert found is not None
        rest = rest[found.end() :]
        value = json.loads(found[1]) if quoted else found[1]
        if size := re.fullmatch(r"(\d+)x(\d+)", value):
            fields[f"{key[1]}-1"], fields[f"{key[1]}-2"] = size.groups()
        elif value:
            fields[key[1]] = value
    return fields


def paste(line: str, standing: Settings) -> Settings:
    """The controls after "Read generation parameters": what the text does not say stays as it is."""
    fields = read(line)
    named = {p.name: p.parse(fields[p.infotext]) for p in PARAMETERS.values() if p.infotext in fields}
    return standing.with_values(completed(named))


@st.composite
def any_settings(draw: st.DrawFn) -> Settings:
    values: dict[str, Any] = {}
    for parameter in PARAMETERS.values():
        strategy: st.SearchStrategy[Any] = {
            "bool": st.booleans(),
            "float": st.floats(parameter.minimum, parameter.maximum),
            "int": st.integers(int(parameter.minimum), int(parameter.maximum)),
            "choice": st.sampled_from(parameter.choices or ("",)),
            "blocks": BLOCKS,
        }[parameter.kind]
        values[parameter.name] = draw(strategy | st.just(parameter.default))
    return Settings(**values)


def relevant(settings: Settings) -> dict[str, Any]:
    """The values that have any effect: those of the features that are on."""
    return {
        p.name: getattr(settings, p.name)
        for p in PARAMETERS.values()
        if p.name.endswith("_enabled") or (
            (settings.enabled if p.feature == "both" else getattr(settings, f"{p.feature}_enabled"))
            and (p.only_for is None or getattr(settings, p.only_for[0]) == p.only_for[1])
        )
    }


def test_the_reader_reads_as_the_webui_does() -> None:
    line = 'Steps: 20, Size: 512x640, A/B c: "x, \\"y\\": z", Empty: , Model: a b, Note: "not, this"'
    expected = {"Steps": "20", "Size-1": "512", "Size-2": "640", "A/B c": 'x, "y": z', "Model": "a b"}
    assert read(line) == {**expected, "Note": "not, this"}


@given(settings=any_settings(), standing=any_settings())
def test_round_trip(settings: Settings, standing: Settings) -> None:
    """Whatever the controls showed before, pasting makes them show what made the picture."""
    line = write({**OTHERS, **settings.infotext()})
    assert relevant(paste(line, standing)) == relevant(settings)


@given(settings=any_settings())
def test_what_a_text_names_is_kept(settings: Settings) -> None:
    named = {p.name: p.parse(text) for p in PARAMETERS.values() if (text := settings.infotext().get(p.infotext))}
    assert completed(named).items() >= named.items()


@pytest.mark.parametrize("feature", FEATURES)
def test_fields_without_the_switch_are_of_another_program(feature: str) -> None:
    """One that writes our very names, but no switch: it was on."""
    assert getattr(paste(f"Steps: 2, {feature.upper()} scale: 2", Settings()), f"{feature}_enabled")
    off = paste(f"Steps: 2, {feature.upper()}: False, {feature.upper()} scale: 2", Settings())
    assert not off.enabled
    assert not paste("Steps: 2, SAG/PAG rescale: 0.5", Settings()).enabled


def test_nothing_is_written_when_off() -> None:
    off = Settings(sag_scale=2.0, pag_blocks="input.4", rescale=0.7, rescale_mode="snf", hires_own_scales=True)
    assert off.infotext() == {}


def test_what_is_written() -> None:
    assert Settings(sag_enabled=True).infotext() == {"SAG": "True", "SAG scale": "0.75"}
    assert Settings(pag_enabled=True).infotext() == {"PAG": "True", "PAG scale": "3"}
    much = Settings(pag_enabled=True, pag_fade=True, pag_end=0.5, sag_scale=2.0, rescale=0.2, pag_blocks="d2.2-9, m0")
    assert much.infotext() == {
        "PAG": "True", "PAG scale": "3", "PAG blocks": "d2.2-9, m0", "PAG end": "0.5", "PAG fade": "True",
        "SAG/PAG rescale": "0.2",
    }
    assert "False" not in Settings(sag_enabled=True, pag_enabled=True).infotext().values()


def test_pasting_a_foreign_text_switches_both_off_and_leaves_the_rest() -> None:
    standing = Settings(sag_enabled=True, pag_enabled=True, sag_scale=2.0, pag_scale=1.0, rescale=0.5)
    assert paste(write(OTHERS), standing) == standing.with_values({"sag_enabled": False, "pag_enabled": False})
    assert completed({}) == {"sag_enabled": False, "pag_enabled": False}


@pytest.mark.parametrize("feature", FEATURES)
def test_naming_a_feature_restores_its_defaults(feature: str) -> None:
    standing = Settings(
        sag_scale=2.0, sag_block="input.4", sag_end=0.5, pag_scale=1.0, pag_fade=True, rescale=0.5,
        rescale_mode="snf", hires_pass="hires pass", hires_own_scales=True,
    )
    pasted = paste(write({**OTHERS, feature.upper(): "True"}), standing)
    assert relevant(pasted) == relevant(Settings(**{f"{feature}_enabled": True}))
    other = "pag" if feature == "sag" else "sag"
    assert getattr(pasted, f"{other}_scale") == getattr(standing, f"{other}_scale")


def test_a_text_that_says_off_is_off() -> None:
    assert not paste("Steps: 2, SAG: False, PAG: False", Settings(sag_enabled=True, pag_enabled=True)).enabled
