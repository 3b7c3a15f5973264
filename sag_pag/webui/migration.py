"""Other extensions' infotext in our fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sag_pag.settings import PARAMETERS, Settings, Value
from sag_pag.webui.foreign import READERS, Reader


@dataclass(frozen=True)
class Migration:
    """What foreign fields say in ours: ``fields`` are infotext fields, ``notes`` what could not be said."""

    fields: Mapping[str, str]
    sources: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def message(self) -> str:
        """What to tell the user; empty if nothing foreign was found."""
        if not self.sources:
            return ""
        taken = f"Guidance settings of {' and '.join(self.sources)} were read from the text."
        return " ".join((taken, *self.notes))


def migrate(pasted: Mapping[str, object]) -> Migration:
    """What the foreign fields of a pasted infotext say in ours. A feature that ours name is left as they say."""
    named = {feature for feature in ("sag", "pag", "both") if _names(pasted, feature)}
    values: dict[str, Value] = {}
    notes: list[str] = []
    sources: dict[str, str] = {}
    for feature, source, read in READERS:
        reader = Reader(pasted)
        read(reader)
        if feature in named or not (reader.values or reader.notes):
            continue
        if feature in sources:
            notes.append(f"{source} was on as well; only {sources[feature]} was taken over.")
            continue
        sources[feature] = source
        values |= reader.values
        notes += reader.notes
    if values.get("sag_enabled") and values.get("pag_enabled"):
        notes += _together(values, sources)
    if named:  # what they share is ours, too
        values = {name: value for name, value in values.items() if PARAMETERS[name].feature != "both"}
    fields = Settings().with_values(values).infotext()
    return Migration(fields, tuple(sources.values()), tuple(dict.fromkeys(notes)))


def _together(values: dict[str, Value], sources: Mapping[str, str]) -> list[str]:
    """What differs where one text switches both on."""
    notes = []
    if values.get("hires_own_scales"):
        values["hires_sag_scale"] = values["sag_scale"]
    if values.get("rescale"):
        notes.append("Its rescale was for PAG alone; here it is for both.")
    if sources["sag"] == "Forge's SAG" and sources["pag"] == "Forge's PAG":
        notes.append("In Forge SAG takes the place of PAG in the first transformer block; here both work.")
    return notes


def _names(pasted: Mapping[str, object], feature: str) -> bool:
    """Whether a text names a parameter of ours."""
    return any(parameter.infotext in pasted for parameter in PARAMETERS.values() if parameter.feature == feature)
