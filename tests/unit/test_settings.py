"""The one definition of the parameters: order, checks, parsing, what naming one implies."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sag_pag.engine.perturbations import PERTURBATIONS
from sag_pag.settings import (
    FEATURES,
    HIRES_PASSES,
    PARAMETERS,
    PERTURBATION_NAMES,
    RESCALE_MODES,
    SWITCHES,
    Parameter,
    SettingError,
    Settings,
)

ORDER = (  # the positional order of the API: append only
    "sag_enabled", "sag_scale", "sag_threshold", "sag_blur_sigma", "sag_block", "sag_start", "sag_end",
    "pag_enabled", "pag_scale", "pag_blocks", "pag_start", "pag_end", "pag_fade",
    "rescale", "rescale_mode", "hires_pass", "hires_own_scales", "hires_sag_scale", "hires_pag_scale", "sag_show",
    "pag_perturbation", "pag_query_blur", "pag_swap", "pag_every", "sag_every",
)
DEFAULTS = (
    False, 0.75, 1.0, 1.0, "middle", 0.0, 1.0,
    False, 3.0, "middle", 0.0, 1.0, False,
    0.0, "full", "both passes", False, 0.75, 3.0, False,
    "identity", 100.0, 0.1, 1, 1,
)
FLOATS = [p for p in PARAMETERS.values() if p.kind == "float"]
INTS = [p for p in PARAMETERS.values() if p.kind == "int"]
BOOLS = [p for p in PARAMETERS.values() if p.kind == "bool"]
TEXTS = [p for p in PARAMETERS.values() if p.kind in ("choice", "blocks")]


def name_of(parameter: Parameter) -> str:
    return parameter.name


each_float = pytest.mark.parametrize("parameter", FLOATS, ids=name_of)
each_int = pytest.mark.parametrize("parameter", INTS, ids=name_of)
each_bool = pytest.mark.parametrize("parameter", BOOLS, ids=name_of)
each_text = pytest.mark.parametrize("parameter", TEXTS, ids=name_of)
each_parameter = pytest.mark.parametrize("parameter", PARAMETERS.values(), ids=name_of)


def refused(parameter: Parameter, value: Any) -> None:
    """The error names the field, the value and what is allowed."""
    with pytest.raises(SettingError) as raised:
        parameter.check(value)
    assert raised.value.field == parameter.name
    assert raised.value.value is value
    assert raised.value.allowed == parameter.allowed
    for part in (parameter.name, repr(value), parameter.allowed):
        assert part in str(raised.value)


def test_positional_order_is_public() -> None:
    assert tuple(PARAMETERS) == ORDER
    assert tuple(field.name for field in dataclasses.fields(Settings)) == ORDER
    assert Settings().values() == DEFAULTS


@each_parameter
def test_definition_is_complete(parameter: Parameter) -> None:
    assert parameter.check(parameter.default) == parameter.default
    for text in (parameter.label, parameter.help, parameter.infotext):
        assert text
        assert text == text.strip()
    if parameter.is_number:
        steps = (float(parameter.default) - parameter.minimum) / parameter.step
        assert math.isclose(steps, round(steps), abs_tol=1e-6)  # the slider can stand at the default
    if parameter.kind == "choice":
        assert parameter.default in parameter.choices


def test_labels_are_told_apart() -> None:
    """The host keeps people's own defaults and ranges by label: two sliders of one label would share them."""
    labels = [parameter.label for parameter in PARAMETERS.values()]
    assert len(set(labels)) == len(labels)


def test_infotext_keys_are_told_apart_and_can_be_read() -> None:
    keys = [parameter.infotext for parameter in PARAMETERS.values()]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert len(key) >= 2
        assert key[0].isalnum()
        assert all(letter.isalnum() or letter in "_ -/" for letter in key)


def test_choices() -> None:
    assert RESCALE_MODES == ("full", "partial", "snf")
    assert HIRES_PASSES == ("both passes", "first pass", "hires pass")
    assert PERTURBATION_NAMES == ("identity", "blurred queries", "swapped tokens") == tuple(PERTURBATIONS)


@each_float
def test_numbers(parameter: Parameter) -> None:
    low, high = parameter.minimum, parameter.maximum
    for inside in (low, high, (low + high) / 2):
        assert parameter.check(inside) == inside
    if low <= 1 <= high:
        assert isinstance(parameter.check(1), float)
    outside = (low - 1e-9, high + 1e-3, -1, 10**9, math.inf, -math.inf, math.nan)
    for bad in (*outside, True, False, "1", "", None, [1.0], {"a": 1}, 1j, b"1"):
        refused(parameter, bad)


@each_int
def test_whole_numbers(parameter: Parameter) -> None:
    for inside in (parameter.minimum, parameter.maximum, 2, 2.0):
        checked = parameter.check(inside)
        assert (checked, type(checked)) == (inside, int)
    assert parameter.parse(" 2 ") == parameter.parse("2.0") == 2
    for bad in (0, parameter.maximum + 1, 2.5, -1, 10**400, math.inf, math.nan, True, "2", None):
        refused(parameter, bad)


def test_a_number_too_large_for_a_float() -> None:
    """JSON knows integers of any size."""
    for bad in (10**400, -(10**400)):
        refused(PARAMETERS["sag_scale"], bad)


@each_bool
def test_booleans(parameter: Parameter) -> None:
    assert parameter.check(True) is True
    assert parameter.check(False) is False
    for bad in (0, 1, 1.0, "True", "False", "", None, [], math.nan):
        refused(parameter, bad)


@each_text
def test_texts(parameter: Parameter) -> None:
    for bad in (True, 1, 1.5, None, ["middle"], b"middle", ("full",)):
        refused(parameter, bad)
    if parameter.kind == "choice":
        for bad in ("", "FULL", "full ", "both", "middle"):
            refused(parameter, bad)


@each_float
@given(data=st.data())
def test_numbers_survive_infotext(parameter: Parameter, data: st.DataObject) -> None:
    value = data.draw(st.floats(parameter.minimum, parameter.maximum))
    assert parameter.parse(parameter.format(value)) == value


@each_parameter
def test_every_default_survives_infotext(parameter: Parameter) -> None:
    assert parameter.parse(f" {parameter.format(parameter.default)} ") == parameter.default


@each_bool
def test_booleans_survive_infotext(parameter: Parameter) -> None:
    for value in (True, False):
        assert parameter.parse(parameter.format(value)) is value
    for text in ("yes", "1", "0", "", "Tru"):
        with pytest.raises(SettingError):
            parameter.parse(text)


@each_float
def test_texts_that_are_no_numbers(parameter: Parameter) -> None:
    for text in ("", "a", "nan", "inf", "1e999", "-1", "1,5", "0x1"):
        with pytest.raises(SettingError, match=parameter.name) as raised:
            parameter.parse(text)
        assert raised.value.allowed == parameter.allowed


@pytest.mark.parametrize("count", range(len(ORDER) + 1))
def test_short_lists_take_defaults(count: int) -> None:
    changed = [not v if isinstance(v, bool) else v / 2 if isinstance(v, float) else v for v in DEFAULTS]
    settings = Settings.from_list(changed[:count])
    assert settings.values() == (*changed[:count], *DEFAULTS[count:])


def test_a_list_that_is_too_long() -> None:
    with pytest.raises(SettingError, match=r"args: '26 values' can't be used; allowed: at most 25 values"):
        Settings.from_list([*DEFAULTS, 1])


@pytest.mark.parametrize("name", ORDER)
def test_errors_name_the_field(name: str) -> None:
    position, on = ORDER.index(name), {**dict.fromkeys(SWITCHES, True), "hires_own_scales": True}
    on |= dict([PARAMETERS[name].only_for] if PARAMETERS[name].only_for else [])
    values = [on.get(other, default) for other, default in zip(ORDER, DEFAULTS, strict=True)]
    for bad in ([], object(), *([] if name in SWITCHES else [None])):
        with pytest.raises(SettingError) as from_list:
            Settings.from_list([*values[:position], bad, *values[position + 1 :]])
        with pytest.raises(SettingError) as from_dict:
            Settings.from_dict({**on, name: bad})
        assert from_list.value.field == from_dict.value.field == name
        assert from_list.value.value is from_dict.value.value is bad
        assert from_list.value.allowed == PARAMETERS[name].allowed


@pytest.mark.parametrize("bad", [None, 99.0, "much", -1])
@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_off_is_not_checked(feature: str, bad: object) -> None:
    """A value that can't be used, or an emptied field, of something that does nothing."""
    other = "pag" if feature == "sag" else "sag"
    for values in (
        {f"{feature}_enabled": False, f"{feature}_scale": bad, f"{other}_enabled": True},
        {f"{feature}_enabled": False, f"{feature}_scale": bad},
        {f"{feature}_enabled": False, f"{feature}_start": bad, "rescale": bad, "hires_own_scales": bad},
        {f"{other}_enabled": True, f"{feature}_enabled": False, "hires_own_scales": False, "hires_sag_scale": bad},
    ):
        expected = Settings(**{f"{other}_enabled": values.get(f"{other}_enabled", False)})
        assert Settings.from_dict(values) == expected
        by_position = [values.get(name, default) for name, default in zip(ORDER, DEFAULTS, strict=True)]
        assert Settings.from_list(by_position) == expected
    with pytest.raises(SettingError):
        Settings.from_dict({f"{feature}_scale": bad})
    with pytest.raises(SettingError):
        Settings.from_dict({f"{feature}_enabled": True, "rescale": bad})


def test_values_by_name_with_gaps() -> None:
    """As programs pass them that know the names: None is what is not named."""
    named = {"pag_scale": 2.0, "pag_blocks": "input.4"}
    assert Settings.from_list([named.get(name) for name in ORDER]) == Settings.from_dict(named)
    assert Settings.from_list([None] * len(ORDER)) == Settings()


def test_a_dict_goes_before_what_follows_it() -> None:
    """The WebUI fills a list up with the values that it has; those of a pasted text are not the defaults."""
    filled = [{"pag_scale": 2.0}, *DEFAULTS[1:]]
    filled[ORDER.index("pag_end")] = 0.5
    filled[ORDER.index("sag_scale")] = 99
    assert Settings.from_list(filled) == Settings(pag_enabled=True, pag_scale=2.0, pag_end=0.5)
    filled[ORDER.index("pag_start")] = "late"
    with pytest.raises(SettingError, match="pag_start"):
        Settings.from_list(filled)


@pytest.mark.parametrize("values", [[{}, 2**70], [False, 2**70], [False, -(2**64)]])
def test_numbers_that_no_answer_can_hold(values: list[object]) -> None:
    with pytest.raises(SettingError, match="args"):
        Settings.from_list(values)


def test_a_list_of_blocks_has_an_end() -> None:
    every = ", ".join(f"output.{block}.{depth}" for block in range(3) for depth in range(10)) + ", " + ", ".join(
        f"input.{block}.{depth}" for block in (4, 5, 7, 8) for depth in range(10)
    )
    assert Settings(pag_blocks=every).pag_blocks == every
    with pytest.raises(SettingError, match=r"pag_blocks.*at most 2000 characters"):
        Settings(pag_blocks="output.3-5, " * 200)


@pytest.mark.parametrize("bad", ["scale", "SAG scale", "", "sag_scale ", "Sag_scale", 1, None])
def test_unknown_names(bad: object) -> None:
    with pytest.raises(SettingError) as raised:
        Settings.from_dict({"sag_scale": 1.0, bad: 2})
    assert raised.value.field == str(bad)
    assert raised.value.value == 2
    assert all(name in raised.value.allowed for name in ORDER)


def test_a_dict_in_first_place_stands_for_all() -> None:
    padded = [{"pag_scale": 2, "rescale": 0.5}, *DEFAULTS[1:]]
    expected = Settings(pag_enabled=True, pag_scale=2.0, rescale=0.5)
    assert Settings.from_list(padded) == Settings.from_list(padded[:1]) == expected
    assert Settings.from_list([{}]) == Settings()


@pytest.mark.parametrize("name", [n for n in ORDER if n.startswith(("sag_", "pag_")) and not n.endswith("_enabled")])
def test_naming_a_parameter_switches_its_feature_on(name: str) -> None:
    feature = name[:3]
    settings = Settings.from_dict({name: PARAMETERS[name].default})
    chosen = dict([PARAMETERS[name].only_for] if PARAMETERS[name].only_for else [])
    assert settings == Settings(**{f"{feature}_enabled": True, **chosen})
    assert not Settings.from_dict({name: PARAMETERS[name].default, f"{feature}_enabled": False}).enabled


@pytest.mark.parametrize("name", ["rescale", "rescale_mode", "hires_pass"])
def test_what_both_share_switches_nothing_on(name: str) -> None:
    assert not Settings.from_dict({name: PARAMETERS[name].default}).enabled


def test_a_dict_from_json() -> None:
    sent = json.loads('{"sag_enabled": true, "sag_scale": 1, "pag_blocks": "  input.4,\\n output.3-5 "}')
    settings = Settings.from_dict(sent)
    assert settings.sag_scale == 1.0
    assert settings.pag_blocks == "input.4, output.3-5"
    assert settings.sag_enabled
    assert settings.pag_enabled


def test_a_range_that_ends_before_it_starts() -> None:
    for feature in ("sag", "pag"):
        backwards = Settings(**{f"{feature}_enabled": True, f"{feature}_start": 0.6, f"{feature}_end": 0.5})
        with pytest.raises(SettingError, match=rf"{feature}_start: 0\.6 .* up to {feature}_end, here 0\.5"):
            backwards.check_order()
        Settings(**{f"{feature}_start": 0.5, f"{feature}_end": 0.5}).check_order()


@pytest.mark.parametrize("feature", ["sag", "pag"])
def test_what_is_off_may_be_backwards(feature: str) -> None:
    """A slider left somewhere odd under a checkbox that is off is no reason to refuse a picture."""
    Settings(**{f"{feature}_start": 0.9, f"{feature}_end": 0.1}).check_order()


def test_values_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().sag_scale = 2.0  # type: ignore[misc]
    with pytest.raises(SettingError, match="rescale: 2"):
        Settings().with_values({"rescale": 2})
    assert Settings().with_values({"rescale": 1}).rescale == 1.0
