"""Presets: named values of the parameters. Some are built in, the user's own are kept in a JSON file.

A preset never holds the WebUI's own CFG scale; where one counts on it, its sentence says so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import unicodedata
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sag_pag.settings import (
    BLURRED,
    FIRST_OF_DECODER,
    PARAMETERS,
    SD3_EXAMPLE,
    SWAPPED,
    SWITCHES,
    SettingError,
    Settings,
    Value,
)
from sag_pag.webui import texts

MAX_NAME_LENGTH = 60
LOCK_TIMEOUT_S = 10.0
NO_PRESETS = b'{"presets": []}'


class PresetError(ValueError):
    """Something that can't be done with presets; the message is for the user."""


@dataclass(frozen=True)
class Preset:
    """Named values. What ``values`` does not name has its default."""

    name: str
    description: str
    values: Mapping[str, Value]
    built_in: bool = False

    def settings(self) -> Settings:
        """All parameters as the preset wants them."""
        return Settings().with_values(self.values)

    def differences(self, shown: Mapping[str, object]) -> dict[str, Value]:
        """What the preset wants where ``shown``, a value for each parameter, is another one.

        What has no effect in either is left out.
        """
        wanted = dict(zip(PARAMETERS, self.settings().values(), strict=True))
        return {
            name: wanted[name] for name, about in PARAMETERS.items() if shown[name] != wanted[name]
            and (name in SWITCHES or about.has_effect(shown) or about.has_effect(wanted))
        }


def _built_in(name: str, description: str, **values: Value) -> Preset:
    return Preset(name, description, values, built_in=True)


BUILT_IN: tuple[Preset, ...] = (
    _built_in("Off", "Switches both off and puts every control back to its default."),
    _built_in(
        "SD 1.5",
        "For SD 1.5 and 2.x with a CFG scale of about 4; at the usual 7 colours and contrast get stronger. Rests on "
        "the example that PAG's authors give.", pag_enabled=True),
    _built_in(
        "SDXL",
        "For SDXL. Take off the CFG scale what PAG adds: 7 with PAG 2.5 becomes about 5. Rests on people's reports.",
        pag_enabled=True, pag_scale=2.5),
    _built_in(
        "SDXL, blurred queries (SEG)",
        "For SDXL, above all with a short prompt or none: softer than PAG, and colours burn later. Rests on SEG's "
        "paper.", pag_enabled=True, pag_perturbation=BLURRED),
    _built_in(
        "SDXL, swapped tokens (SSG)",
        "For SDXL: swaps in the first six transformer blocks of the decoder. Rests on SSG's paper.",
        pag_enabled=True, pag_perturbation=SWAPPED, pag_blocks=FIRST_OF_DECODER),
    _built_in(
        "SD3", "For SD3, at a CFG scale of about 5. Rests on the example of diffusers' documentation.",
        pag_enabled=True, pag_scale=0.7, pag_blocks=SD3_EXAMPLE),
    _built_in(
        "Few steps (Lightning, Turbo, LCM)",
        "For distilled models with 1 to 8 steps: leave the CFG scale at 1 to 2, and PAG at 0.5 or less. Rests on "
        "people's reports.", pag_enabled=True, pag_scale=0.5),
    _built_in(
        "No prompt, or repair",
        "For an empty prompt, or img2img at a low denoising strength: set the CFG scale to 1, which switches CFG off. "
        "Rests on PAG's paper and the example that its authors give.", pag_enabled=True, pag_scale=5.0),
    _built_in(
        "Subtle",
        "For a picture that is nearly good: the composition stays, edges and hands get a little sounder. Rests on "
        "people's reports.", pag_enabled=True, pag_scale=1.5),
    _built_in(
        "Half the extra time",
        "Guides in every second step only. Rests on a measurement with the small model of the demo, where it gained as "
        "much as each step.", pag_enabled=True, pag_every=2),
    _built_in(
        "Detail (SAG)", "For crisper texture without changing the structure. Rests on SAG's paper.", sag_enabled=True),
    _built_in(
        "Structure and detail (both)",
        "Takes nearly twice the time of a picture without. Rests on people's reports.",
        sag_enabled=True, sag_scale=0.5, pag_enabled=True, pag_scale=2.0),
)


def checked_name(name: object) -> str:
    """``name`` without space around it. Raises ``PresetError`` if it can't be a preset's name."""
    text = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
    if not text:
        raise PresetError(texts.NEEDS_NAME)
    if len(text) > MAX_NAME_LENGTH:
        raise PresetError(f"The name has {len(text)} characters; up to {MAX_NAME_LENGTH} are allowed.")
    if not text.isprintable():
        raise PresetError(texts.UNSEEN)
    return text


def _key(name: str) -> str:
    """What two names that count as the same have in common."""
    return unicodedata.normalize("NFC", name.casefold())


_BUILT_IN_KEYS = {_key(preset.name) for preset in BUILT_IN}


def _own(name: str, values: Mapping[str, Value]) -> Preset:
    shown = Settings().with_values(values).infotext()
    description = ", ".join(f"{key}: {text}" for key, text in shown.items() if text != "True") or "both off"
    return Preset(name, f"Your own: {description}.", values)


def _own_name(name: object) -> str:
    """A name that a preset of the user's own may have."""
    text = checked_name(name)
    if _key(text) in _BUILT_IN_KEYS:
        raise PresetError(f'"{text}" is built in and can\'t be changed; choose another name.')
    return text


def _read_entry(entry: object, *, taken: Container[str]) -> Preset:
    """One entry of the file, whose name is not among ``taken``. Raises ``PresetError`` or ``SettingError``."""
    if not isinstance(entry, dict) or set(entry) != {"name", "values"} or not isinstance(entry["values"], dict):
        raise PresetError("an entry has a name and values, nothing else")
    values = entry["values"]
    for name, value in values.items():
        if name not in PARAMETERS:
            raise SettingError(name, value, "these names: " + ", ".join(PARAMETERS))
    settings = Settings().with_values(values)
    settings.check_order()
    own_name = _own_name(entry["name"])
    if _key(own_name) in taken:
        raise PresetError(f'there are two of the name "{own_name}"')
    return _own(own_name, {name: getattr(settings, name) for name in values})


def _read(data: bytes) -> tuple[list[Preset], list[str]]:
    """The good presets of a file, and what is wrong with the rest of it."""
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return [], [f"it is not JSON ({error})"]
    if not isinstance(content, dict) or set(content) != {"presets"} or not isinstance(content["presets"], list):
        return [], ["it does not hold a list of presets"]
    good: dict[str, Preset] = {}
    wrong = []
    for number, entry in enumerate(content["presets"], start=1):
        try:
            preset = _read_entry(entry, taken=good)
        except (PresetError, SettingError) as error:
            wrong.append(f"preset {number}: {error}")
        else:
            good[_key(preset.name)] = preset
    return list(good.values()), wrong


def _reason(error: OSError) -> str:
    """Why, without the whole path of the file."""
    return error.strerror or str(error)


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that must not exist yet, down to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class PresetStore:
    """The presets, the user's own being read from ``path`` on each use. Safe to use from several threads and
    processes: who changes the file holds a lock beside it.

    The file is replaced in one step, so that it is whole after a crash too. One that can't be read is put aside,
    never overwritten or deleted, and ``problem`` says so from then on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._file_lock = FileLock(path.with_name(f".{path.stem}.lock"), timeout=LOCK_TIMEOUT_S)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._file_lock:
                yield
        except Timeout as error:
            raise PresetError(f"Another program holds {self.path.name}; try again.") from error
        except OSError as error:
            raise PresetError(f"{self.path.name} can't be locked: {_reason(error)}") from error

    def look(self) -> tuple[list[Preset], str | None]:
        """All presets, and what is wrong with the file: as ``all``, but nothing is written. Raises ``PresetError``."""
        own, wrong = _read(self._bytes())
        problem = f"{self.path.name} is broken: {'; '.join(wrong)}" if wrong else self.problem
        return [*BUILT_IN, *sorted(own, key=lambda preset: _key(preset.name))], problem

    def all(self) -> list[Preset]:
        """Built-in ones, then the user's own in the order of their names. Raises ``PresetError``."""
        return [*BUILT_IN, *sorted(self._load(), key=lambda preset: _key(preset.name))]

    def get(self, name: str) -> Preset:
        """The preset of this name. Raises ``PresetError``."""
        for preset in self.all():
            if _key(preset.name) == _key(name):
                return preset
        raise PresetError(f'There is no preset "{name}" any more.')

    def get_own(self, name: str | None) -> Preset:
        """The user's own preset of this name. Raises ``PresetError``, also for one that is built in."""
        if not name:
            raise PresetError(texts.CHOOSE_OWN)
        preset = self.get(name)
        if preset.built_in:
            raise PresetError(f'"{preset.name}" is built in and can\'t be renamed or deleted.')
        return preset

    def save(self, name: str, settings: Settings) -> Preset:
        """Keeps ``settings`` under ``name``, in place of an own preset of that name. Raises ``PresetError``."""
        preset = _own(_own_name(name), dict(zip(PARAMETERS, settings.values(), strict=True)))
        with self._locked():
            self._store([other for other in self._load() if _key(other.name) != _key(preset.name)] + [preset])
        return preset

    def rename(self, name: str, new_name: str) -> Preset:
        """Gives an own preset another name. Raises ``PresetError``."""
        with self._locked():
            preset = self.get_own(name)
            renamed = _own(_own_name(new_name), preset.values)
            others = [other for other in self._load() if _key(other.name) != _key(preset.name)]
            if any(_key(other.name) == _key(renamed.name) for other in others):
                raise PresetError(f'There is a preset "{renamed.name}" already.')
            self._store([*others, renamed])
        return renamed

    def delete(self, name: str) -> None:
        """Forgets an own preset. Raises ``PresetError``."""
        with self._locked():
            preset = self.get_own(name)
            self._store([other for other in self._load() if _key(other.name) != _key(preset.name)])

    def _bytes(self) -> bytes:
        """The file's content; that of a file without presets if there is none."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return NO_PRESETS
        except OSError as error:
            raise PresetError(f"{self.path.name} can't be read: {_reason(error)}") from error

    def _load(self) -> list[Preset]:
        presets, wrong = _read(self._bytes())
        if not wrong:
            return presets
        with self._locked():
            data = self._bytes()  # another program may have put it aside meanwhile
            presets, wrong = _read(data)
            if wrong:
                self._put_aside(data, presets, wrong)
        return presets

    def _put_aside(self, data: bytes, good: Sequence[Preset], wrong: Sequence[str]) -> None:
        """Keeps what was read under a new name, and goes on with the good presets."""
        try:
            aside = self._copy_aside(data)
        except OSError as error:
            raise PresetError(
                f"{self.path.name} is broken ({'; '.join(wrong)}) and can't be put aside: {_reason(error)}"
            ) from error
        if good:
            self._store(good)
        else:
            self._remove_file()
        left = f"{len(good)} good one{'s' if len(good) != 1 else ''} kept" if good else "none could be read"
        self.problem = (
            f"The file of your presets was broken ({'; '.join(wrong)}); {left}. It is now {aside.name}, in the "
            "extension's folder."
        )

    def _copy_aside(self, data: bytes) -> Path:
        for number in itertools.count(1):
            aside = self.path.with_name(f"{self.path.stem}.broken-{number}{self.path.suffix}")
            with contextlib.suppress(FileExistsError):  # never overwritten: the next number is tried
                _write_new(aside, data)
                return aside
        raise AssertionError

    def _remove_file(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise PresetError(f"{self.path.name} can't be removed: {_reason(error)}") from error

    def _store(self, presets: Sequence[Preset]) -> None:
        content = {"presets": [{"name": preset.name, "values": dict(preset.values)} for preset in presets]}
        data = (json.dumps(content, indent=2) + "\n").encode()
        new = self.path.with_name(f".{self.path.stem}-{uuid.uuid4().hex}.tmp")
        try:
            try:
                _write_new(new, data)
                os.replace(new, self.path)  # noqa: PTH105 - the atomic one, named as what it is
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            raise PresetError(f"{self.path.name} can't be written: {_reason(error)}") from error


STORE = PresetStore(Path(__file__).resolve().parents[2] / "presets.json")
"""The presets of this installation."""
