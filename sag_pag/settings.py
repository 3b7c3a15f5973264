"""The one definition of every parameter.

User interface, API, infotext, X/Y/Z axes and the reference page's table are all made from ``PARAMETERS``. The order of
the fields of ``Settings`` is the positional order of the API and therefore public: append only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

Kind = Literal["bool", "float", "int", "choice", "blocks"]
Feature = Literal["sag", "pag", "both"]
Value = bool | int | float | str

RESCALE_MODES = ("full", "partial", "snf")
IDENTITY, BLURRED, SWAPPED = "identity", "blurred queries", "swapped tokens"
PERTURBATION_NAMES = (IDENTITY, BLURRED, SWAPPED)
WHOLE_MAP = 100.0
"""The width of a blur from which on it is taken for endless."""
HIRES_PASSES = ("both passes", "first pass", "hires pass")
Switchable = Literal["sag", "pag"]
FEATURES: tuple[Switchable, ...] = ("sag", "pag")
BLOCKS_OF: dict[Switchable, str] = {"sag": "sag_block", "pag": "pag_blocks"}
"""The parameter that names a feature's blocks."""
DEFAULT_BLOCKS = "middle"
FIRST_OF_DECODER = "output.0.0-5"
"""SDXL's first transformer blocks after the middle."""
SD3_EXAMPLE = "joint.13"
"""Of SD3-medium's 24 blocks the one in diffusers' example."""
UNTYPED_BLOCKS = (DEFAULT_BLOCKS, FIRST_OF_DECODER, SD3_EXAMPLE)
"""Lists that nobody need have typed, the default's and the built-in presets': on a model that has nothing of one, the
block nearest to it stands in."""
LONGEST_LIST = 2000
"""Characters of a list of blocks; every transformer block of SDXL by its own name takes 900."""
SWITCHES = tuple(f"{feature}_enabled" for feature in FEATURES)
"""The parameters that switch a feature on."""


class SettingError(ValueError):
    """A parameter that can't be used: names the field, what was sent, what is allowed, and what may have been meant.

    As text it is for programs; ``for_people`` says the same on the page.
    """

    def __init__(self, field_name: str, value: object, allowed: str, *, meant: Sequence[str] = ()) -> None:
        self.field = field_name
        self.value = value
        self.allowed = allowed
        self.meant = tuple(meant)
        super().__init__(f"{field_name}: {self._what_is_wrong(repr(value))}; allowed: {allowed}")

    def _what_is_wrong(self, value: str) -> str:
        asked = f"; did you mean {' or '.join(self.meant)}?" if self.meant else ""
        return f"{value} can't be used{asked}"

    @property
    def for_people(self) -> str:
        """The same with the control's label, as the page shows it."""
        parameter = PARAMETERS.get(self.field)
        if parameter is None:
            return str(self)
        if parameter.kind == "blocks" and isinstance(self.value, str) and not self.value.strip(", "):
            return f"{parameter.label}: choose a block."
        wrong = self._what_is_wrong("an empty field" if self.value is None else f'"{self.value}"')
        labels = {name: about.label for name, about in PARAMETERS.items()}
        allowed = re.sub(r"\w+", lambda word: labels.get(word[0], word[0]), self.allowed)
        return f"{parameter.label}: {wrong}{'' if self.meant else ';'} possible: {allowed}."


@dataclass(frozen=True)
class Parameter:
    """What is to be known about one parameter."""

    name: str
    feature: Feature
    kind: Kind
    default: Value
    label: str
    help: str
    infotext: str
    minimum: float = 0.0
    maximum: float = 1.0
    step: float = 0.01
    choices: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    only_for: tuple[str, str] | None = None
    """A choice and the one of its values for which the parameter does anything."""

    @property
    def is_number(self) -> bool:
        """Whether it has a range."""
        return self.kind in ("float", "int")

    @property
    def switches(self) -> tuple[str, ...]:
        """The switches without which the parameter does nothing."""
        return self.needs if self.feature == "both" else (f"{self.feature}_enabled",)

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.kind == "bool":
            return "true or false"
        if self.is_number:
            number = "a number" if self.kind == "float" else "a whole number"
            return f"{number} from {self.minimum:g} to {self.maximum:g}"
        if self.kind == "choice":
            return " or ".join(repr(choice) for choice in self.choices)
        return 'block names as text, such as "middle" or "input.4, output.3-5"'

    def check(self, value: object) -> Value:
        """``value`` in the parameter's own type.

        Raises ``SettingError`` for another type, a number out of range or an unknown choice. Numbers may be given as
        integers, whole ones as floats; nothing else is converted.
        """
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
        elif self.is_number:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # compared before it is converted: an integer can be too large for a float
            if is_number and self.minimum <= value <= self.maximum:  # type: ignore[operator]
                if self.kind == "float":
                    return float(value)  # type: ignore[arg-type]
                if value == int(value):  # type: ignore[call-overload]
                    return int(value)  # type: ignore[call-overload,no-any-return]
        elif self.kind == "blocks":
            if isinstance(value, str) and len(value) <= LONGEST_LIST:
                return " ".join(value.split())
            if isinstance(value, str):
                raise SettingError(self.name, f"{value[:60]}…", f"a list of at most {LONGEST_LIST} characters")
        elif isinstance(value, str) and value in self.choices:
            return value
        raise SettingError(self.name, value, self.allowed)

    def has_effect(self, values: Mapping[str, object]) -> bool:
        """Whether the parameter does anything where these are all the values; those that are missing are defaults."""
        on = [values.get(name, False) is True for name in self.switches or SWITCHES]
        if not (all(on) if self.switches else any(on)):
            return False
        if self.only_for is None:
            return True
        choice, value = self.only_for
        return values.get(choice, PARAMETERS[choice].default) == value

    def accepts(self, value: object) -> bool:
        """Whether ``check`` lets ``value`` pass."""
        try:
            self.check(value)
        except SettingError:
            return False
        return True

    def parse(self, text: str) -> Value:
        """The value that ``text`` (infotext, an X/Y/Z cell) stands for; raises ``SettingError``."""
        stripped = text.strip()
        if self.kind == "bool" and stripped.lower() in ("true", "false"):
            return stripped.lower() == "true"
        if self.is_number:
            try:
                return self.check(float(stripped))
            except ValueError as error:
                raise SettingError(self.name, text, self.allowed) from error
        return self.check(stripped)

    def format(self, value: Value) -> str:
        """``value`` as infotext; ``parse`` gives exactly the same value back."""
        return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _parameter(default: Value, feature: Feature, label: str, help_text: str, infotext: str, **extra: Any) -> Any:
    kinds: dict[type, Kind] = {bool: "bool", int: "int", float: "float", str: "choice"}
    kind = kinds[type(default)]
    about = {"feature": feature, "kind": kind, "label": label, "help": help_text, "infotext": infotext, **extra}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """All parameters of one generation. Every value is checked; a bad one raises ``SettingError``."""

    sag_enabled: bool = _parameter(
        False, "sag", "Self-Attention Guidance (SAG)",
        "Steers away from a version of the picture that is blurred where the model looks most: finer detail.", "SAG")
    sag_scale: float = _parameter(
        0.75, "sag", "SAG scale", "How strongly to steer. 0.5 to 1 is usual; more turns crisp into harsh.", "SAG scale",
        maximum=5.0)
    sag_threshold: float = _parameter(
        1.0, "sag", "Mask threshold",
        "How much attention a place must get to be blurred. 1 is the average; higher touches less of the picture.",
        "SAG mask threshold", maximum=3.0)
    sag_blur_sigma: float = _parameter(
        1.0, "sag", "Blur sigma", "How wide the blur is; 1 is 8 pixels of the picture. 0 switches SAG off.",
        "SAG blur sigma", maximum=10.0)
    sag_block: str = _parameter(
        "middle", "sag", "Read attention from", "The block whose self-attention shows where the model looks.",
        "SAG block", kind="blocks")
    sag_start: float = _parameter(
        0.0, "sag", "SAG start", "From which part of the way from noise (0) to picture (1) on.", "SAG start")
    sag_end: float = _parameter(
        1.0, "sag", "SAG end", "Up to which part of the way from noise (0) to picture (1).", "SAG end")
    pag_enabled: bool = _parameter(
        False, "pag", "Perturbed-Attention Guidance (PAG)",
        "Steers away from a version of the picture made with its attention switched off: sounder structure.", "PAG")
    pag_scale: float = _parameter(
        3.0, "pag", "PAG scale", "How strongly to steer. 2 to 4 is usual with a prompt, 5 without CFG.", "PAG scale",
        maximum=20.0, step=0.05)
    pag_blocks: str = _parameter(
        "middle", "pag", "Blocks to perturb",
        "Click on the map, or write: middle, input.4, output.3-5, or middle.0 for one transformer block.",
        "PAG blocks", kind="blocks")
    pag_start: float = _parameter(
        0.0, "pag", "PAG start", "From which part of the way from noise (0) to picture (1) on.", "PAG start")
    pag_end: float = _parameter(
        1.0, "pag", "PAG end", "Up to which part of the way from noise (0) to picture (1).", "PAG end")
    pag_fade: bool = _parameter(
        False, "pag", "Fade to the end", "Lets the scale fall evenly from its full value at the start to 0 at the end.",
        "PAG fade")
    rescale: float = _parameter(
        0.0, "both", "Softer contrast (rescale)",
        "Takes back the extra contrast that strong guidance adds. 0 is off, 1 is all of it.",
        "SAG/PAG rescale")
    rescale_mode: str = _parameter(
        "full", "both", "What is softened",
        "Does nothing while the value above is 0. With the last one, the stronger of both wins at each place.",
        "SAG/PAG rescale mode", choices=RESCALE_MODES)
    hires_pass: str = _parameter(
        "both passes", "both", "Hires. fix", "In which passes of hires. fix to guide.", "SAG/PAG hires",
        choices=HIRES_PASSES)
    hires_own_scales: bool = _parameter(
        False, "both", "Other scales in the hires pass", "Use the two scales below in the hires pass.",
        "SAG/PAG hires own scales")
    hires_sag_scale: float = _parameter(
        0.75, "both", "SAG scale in the hires pass", "Used if other scales are chosen for the hires pass.",
        "SAG hires scale", maximum=5.0, needs=("sag_enabled", "hires_own_scales"))
    hires_pag_scale: float = _parameter(
        3.0, "both", "PAG scale in the hires pass", "Used if other scales are chosen for the hires pass.",
        "PAG hires scale", maximum=20.0, step=0.05, needs=("pag_enabled", "hires_own_scales"))
    sag_show: bool = _parameter(
        False, "sag", "Show what SAG sees",
        "Adds a picture to the gallery: the mask and the attention map at some points. Changes no other picture.",
        "SAG show")
    pag_perturbation: str = _parameter(
        IDENTITY, "pag", "Steer away from",
        "Attention switched off as in PAG's paper, blurred over places, or the places least alike swapped.",
        "PAG perturbation",
        choices=PERTURBATION_NAMES)
    pag_query_blur: float = _parameter(
        WHOLE_MAP, "pag", "Blur width (SEG)",
        "How wide attention is blurred, in places of the block's own map. 100 is all of the map.",
        "PAG query blur", minimum=0.5, maximum=WHOLE_MAP, step=0.5, only_for=("pag_perturbation", BLURRED))
    pag_swap: float = _parameter(
        0.1, "pag", "Share that is swapped (SSG)", "Of places, and of channels; 0.1 is the paper's.", "PAG swap",
        minimum=0.01, maximum=0.5, only_for=("pag_perturbation", SWAPPED))
    pag_every: int = _parameter(
        1, "pag", "PAG every n-th step", "2 guides in every second step only, for half of the extra time.", "PAG every",
        minimum=1, maximum=10, step=1)
    sag_every: int = _parameter(
        1, "sag", "SAG every n-th step", "2 guides in every second step only, for half of the extra time.", "SAG every",
        minimum=1, maximum=10, step=1)

    def __post_init__(self) -> None:
        for parameter in PARAMETERS.values():
            object.__setattr__(self, parameter.name, parameter.check(getattr(self, parameter.name)))

    def check_order(self) -> None:
        """Raises ``SettingError`` if the range of a feature that is on ends before it starts."""
        for feature in FEATURES:
            if not getattr(self, f"{feature}_enabled"):
                continue
            start, end = getattr(self, f"{feature}_start"), getattr(self, f"{feature}_end")
            if start > end:
                raise SettingError(f"{feature}_start", start, f"a number up to {feature}_end, here {end:g}")

    @classmethod
    def from_list(cls, values: Sequence[object]) -> Settings:
        """Settings from positional values (API, user interface), missing ones at the end taking defaults.

        A dict as the first value is read as ``from_dict`` does; values that follow it have their positions, as the
        WebUI pads short lists with what it has. A list with ``None`` for a switch is of named values too, ``None``
        being what is not named. What is off is not checked. Raises ``SettingError``.
        """
        for value in values[1:]:
            if isinstance(value, Mapping):
                raise SettingError("args", value, "one object with names, or a list of values")
        for value in values:
            if isinstance(value, int) and value.bit_length() > 63:
                raise SettingError("args", value, "numbers of usual size")  # the WebUI can't answer with a larger one
        if len(values) > len(PARAMETERS):
            raise SettingError("args", f"{len(values)} values", f"at most {len(PARAMETERS)} values")
        by_name = dict(zip(PARAMETERS, values, strict=False))
        if values and any(by_name.get(switch, False) is None for switch in SWITCHES):
            # a program that has the values by name gives None for those that it does not have
            return cls.from_dict({name: value for name, value in by_name.items() if value is not None})
        if values and isinstance(values[0], Mapping):
            del by_name[next(iter(PARAMETERS))]
            return cls.from_dict(values[0], others=by_name)
        return cls._from_unchecked(by_name)

    @classmethod
    def from_dict(cls, values: Mapping[Any, object], *, others: Mapping[str, object] | None = None) -> Settings:
        """Settings from named values; what is not named is as in ``others``, else the default. Raises ``SettingError``.

        To name a parameter switches on what it needs to do anything (its feature, "other scales in the hires pass",
        the perturbation that it is of), unless that is named as well. What is off is not checked.
        """
        for name in values:
            if name not in PARAMETERS:
                meant = difflib.get_close_matches(str(name).lower().replace(" ", "_"), PARAMETERS, cutoff=0.7)
                raise SettingError(str(name), values[name], "these names: " + ", ".join(PARAMETERS), meant=meant)
        return cls._from_unchecked({**(others or {}), **implied_by(values), **values})

    @classmethod
    def _from_unchecked(cls, values: Mapping[str, object]) -> Settings:
        """Settings from values of which those that have no effect may be anything; these become their defaults then.

        Raises ``SettingError`` for others.
        """
        switches = {name: PARAMETERS[name].check(values.get(name, False)) for name in SWITCHES}
        used = {
            name: value for name, value in values.items()
            if PARAMETERS[name].has_effect(values) or PARAMETERS[name].accepts(value)
        }
        return cls().with_values({**used, **switches})

    def with_values(self, values: Mapping[str, object]) -> Settings:
        """These settings with some replaced; raises ``SettingError``."""
        return replace(self, **values)  # type: ignore[arg-type]

    def values(self) -> tuple[Value, ...]:
        """All values in positional order."""
        return tuple(getattr(self, name) for name in PARAMETERS)

    @property
    def enabled(self) -> bool:
        """Whether any feature is switched on."""
        return self.sag_enabled or self.pag_enabled

    def infotext(self) -> dict[str, str]:
        """What is on, as infotext fields: the switches and scales, and whatever else is not at its default."""
        result: dict[str, str] = {}
        for parameter in PARAMETERS.values():
            is_on = self.enabled if parameter.feature == "both" else getattr(self, f"{parameter.feature}_enabled")
            if not is_on or (parameter.only_for and getattr(self, parameter.only_for[0]) != parameter.only_for[1]):
                continue
            value: Value = getattr(self, parameter.name)
            if value != parameter.default or parameter.name in ("sag_scale", "pag_scale"):
                result[parameter.infotext] = parameter.format(value)
        return result


def implied_by(names: Iterable[str]) -> dict[str, object]:
    """What naming these parameters turns on or chooses, so that they do anything."""
    wanted = [PARAMETERS[name] for name in names]
    switches = {switch: True for parameter in wanted for switch in parameter.switches if switch != parameter.name}
    return {**switches, **dict(parameter.only_for for parameter in wanted if parameter.only_for is not None)}


PARAMETERS: dict[str, Parameter] = {
    f.name: Parameter(name=f.name, default=f.default, **f.metadata) for f in fields(Settings)  # type: ignore[arg-type]
}


def completed(named: Mapping[str, Value], *, features: Sequence[Switchable] = FEATURES) -> dict[str, Value]:
    """All that a text says of these features which names these parameters.

    A feature of which it names something is on, unless it says that it is off; another one is off. Once a feature is
    on, what the text does not name of it, and of what both share, has its default.
    """
    values = dict(named)
    for feature in features:
        values.setdefault(f"{feature}_enabled", any(PARAMETERS[name].feature == feature for name in named))
    on = {feature for feature in features if values[f"{feature}_enabled"]}
    for parameter in PARAMETERS.values():
        if parameter.feature in on or (parameter.feature == "both" and on):
            values.setdefault(parameter.name, parameter.default)
    return values
