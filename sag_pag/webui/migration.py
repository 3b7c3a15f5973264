"""Reads the infotext of other extensions that guide in the same way.

Values are taken over where they mean the same here. What has no counterpart is left at its default, and a note says so:
a picture's metadata must not turn silently into another picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sag_pag.engine.blocks import BlockNameError
from sag_pag.engine.topology import check_names
from sag_pag.settings import BLURRED, PARAMETERS, WHOLE_MAP, Feature, SettingError, Settings, Value


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


class _Reader:
    """One extension's fields on the way to ours."""

    def __init__(self, pasted: Mapping[str, object]) -> None:
        self.pasted = pasted
        self.values: dict[str, Value] = {}
        self.notes: list[str] = []

    def text(self, key: str) -> str:
        return str(self.pasted.get(key, "")).strip()

    def is_on(self, key: str) -> bool:
        return self.text(key) == "True"

    def number(self, key: str, default: float) -> float:
        """The value of a field; what is no number is noted and taken for the default."""
        text = self.text(key)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        self.notes.append(f"{key} is {text!r}, which is no number.")
        return default

    def take(self, name: str, value: Value, *, key: str) -> bool:
        """Takes a value over; one that is not possible here is noted."""
        parameter = PARAMETERS[name]
        try:
            self.values[name] = parameter.check(value)
        except SettingError:
            self.notes.append(f"{key} {parameter.format(value)} is not possible here ({parameter.allowed}).")
            return False
        return True

    def switch_on(self, feature: str, scale: float, *, key: str) -> bool:
        """Switches a feature on with its scale, or notes why it stays off."""
        if self.take(f"{feature}_scale", scale, key=key):
            self.values[f"{feature}_enabled"] = True
            return True
        self.notes.append(f"{feature.upper()} was left off.")
        return False


def _sd_webui_sag(reader: _Reader) -> None:
    """ashen-sensored/sd_webui_SAG: same formula and mask, blur 1. Writes its two fields only when on."""
    if "SAG Guidance Scale" not in reader.pasted:
        return
    scale = reader.number("SAG Guidance Scale", 0.75)
    if reader.switch_on("sag", scale, key="SAG Guidance Scale"):
        reader.take("sag_threshold", reader.number("SAG Mask Threshold", 1.0), key="SAG Mask Threshold")


def _forge_sag(reader: _Reader) -> None:
    """Forge and reForge: same formula and mask; older ones have no threshold. The blur always has 9 taps."""
    if not reader.is_on("sag_enabled") or not reader.switch_on("sag", reader.number("sag_scale", 0.5), key="sag_scale"):
        return
    reader.take("sag_threshold", reader.number("sag_threshold", 1.0), key="sag_threshold")
    blur = reader.number("sag_blur_sigma", 2.0)
    if reader.take("sag_blur_sigma", blur, key="sag_blur_sigma") and math.ceil(3 * blur) > 4:
        reader.notes.append(f"Forge cuts its blur off at 4 latent pixels: at sigma {blur:g} it is wider here.")


def _forge_pag(reader: _Reader) -> None:
    """Forge and reForge: same formula, whole middle block. Start and end are fractions of the steps there."""
    old, new = "PerturbedAttentionGuidance_", "pagi_"
    prefix = new if reader.is_on(f"{new}enabled") else old
    if not reader.is_on(f"{prefix}enabled"):
        return
    scale = reader.number(f"{prefix}scale", 3.0)
    if not reader.switch_on("pag", scale, key=f"{prefix}scale") or prefix == old:
        return
    if attenuation := reader.number("pagi_attenuation", 0.0):
        reader.notes.append(
            f"pagi_attenuation {attenuation:g} was left out: it lowers the scale by the step, Fade by the noise level."
        )
    start, end = reader.number("pagi_start_step", 0.0), reader.number("pagi_end_step", 1.0)
    if start > 0 or end < 1:
        reader.notes.append(
            f"Its range of steps ({start:g} to {end:g} of them) was left out: Start and End go by the noise level here."
        )


_ONE_CALL_A_STEP = ("Euler", "DPM++ 2M", "DPM++ 3M", "LMS", "LCM", "DDIM", "PLMS", "UniPC")


def _incantations_pag(reader: _Reader) -> None:
    """v0xie/sd-webui-incantations: same formula, first transformer block of the middle, steps counted from 0."""
    if not reader.is_on("PAG Active"):
        return
    scale = reader.number("PAG Scale", 0.0)
    if not reader.switch_on("pag", scale, key="PAG Scale"):
        return
    reader.values["pag_blocks"] = "middle.0"
    reader.notes.append("It leaves the attention's output layer out when it perturbs: the same scale steers otherwise.")
    start, end = reader.number("PAG Start Step", 0.0), reader.number("PAG End Step", 150.0)
    calls = max(reader.number("Steps", 20.0), reader.number("Hires steps", 0.0))
    if not reader.text("Sampler").startswith(_ONE_CALL_A_STEP):
        calls *= 2
    if start > 0 or end < calls - 1:
        reader.notes.append(
            f"Its range of steps ({start:g} to {end:g}) was left out: Start and End go by the noise level here."
        )
    if reader.is_on("PAG SANF"):
        reader.notes.append("Its saliency fusion was left out: it compares channels, Rescale mode snf compares places.")
    if reader.is_on("CFG Interval Enable"):
        reader.notes.append("Its CFG schedule was left out: there is none here.")


def _perturbed_attention(reader: _Reader) -> None:
    """pamparamm/sd-perturbed-attention, in Forge and reForge: same formula, rescale modes and block lists."""
    if not _perturbed_common(reader, "pag"):
        return
    adaptive = reader.number("pag_adaptive_scale", 0.0)
    kept = _perturbed_fade(reader, adaptive)
    if reader.is_on("pag_hr_override"):
        _perturbed_hires(reader, "pag", kept, adaptive=adaptive)


def _smoothed_energy(reader: _Reader) -> None:
    """The same extension's SEG: the same blur where it does not reach the map's edge; -1 is the mean."""
    if not _perturbed_common(reader, "seg"):
        return
    reader.values["pag_perturbation"] = BLURRED
    sigma = reader.number("seg_blur_sigma", -1.0)
    if 0 <= sigma < WHOLE_MAP:
        reader.take("pag_query_blur", sigma, key="seg_blur_sigma")
    if reader.is_on("seg_hr_override"):
        _perturbed_hires(reader, "seg", 1.0)


def _perturbed_common(reader: _Reader, name: str) -> bool:
    """What the extension's PAG and SEG have in common; whether it is on and could be taken over."""
    if not reader.is_on(f"{name}_enabled"):
        return False
    blocks = _perturbed_blocks(reader, name)
    scale = f"{name}_scale"
    if blocks is None or not reader.switch_on("pag", reader.number(scale, 3.0), key=scale):
        return False
    reader.values["pag_blocks"] = blocks
    mode = reader.text(f"{name}_rescale_mode") or "full"
    rescale = reader.number(f"{name}_rescale", 0.0)
    if reader.take("rescale_mode", mode, key=f"{name}_rescale_mode"):
        reader.take("rescale", 1.0 if mode == "snf" else rescale, key=f"{name}_rescale")  # its snf is always whole
    if max(reader.number(f"{name}_sigma_start", -1.0), reader.number(f"{name}_sigma_end", -1.0)) >= 0:
        reader.notes.append("Its range of sigmas was left out: Start and End go by the timestep here.")
    return True


def _perturbed_blocks(reader: _Reader, name: str) -> str | None:
    """The blocks in our words, ``None`` if they have none. A list goes before the single block."""
    if text := reader.text(f"{name}_block_list"):
        try:
            check_names(text)
        except BlockNameError as error:
            reader.notes.append(f"PAG was left off: {error}.")
            return None
        return text
    part, number = reader.text(f"{name}_block") or "middle", reader.number(f"{name}_block_id", 0.0)
    if part in ("input", "output") and number.is_integer() and 0 <= number < 10_000:
        return f"{part}.{int(number)}"
    if part == "middle" and number == 0:
        return "middle"
    reader.notes.append(f"PAG was left off: there is no block {part} {number:g}.")
    return None


def _perturbed_fade(reader: _Reader, adaptive: float) -> float:
    """Takes the adaptive scale over and returns the factor on the scale.

    The scale is ``s - s * a^4 * (1000 - t)`` there; with progress ``(999 - t) / 1000`` that is a fade from
    ``s * (1 - a^4)`` to 0 at progress ``(1 - a^4) / (1000 * a^4)``.
    """
    if adaptive <= 0:
        return 1.0
    loss = min(adaptive, 1.0) ** 4
    end = (1 - loss) / (1000 * loss) if loss > 1e-9 else math.inf
    if end > 1:
        reader.notes.append(
            f"pag_adaptive_scale {adaptive:g} was left out: it lowers the scale by {min(loss * 1000, 1):.0%} up to the "
            "end, Fade always by all of it."
        )
        return 1.0
    scale = reader.values["pag_scale"]
    assert isinstance(scale, float)
    reader.values |= {"pag_scale": scale * (1 - loss), "pag_end": end, "pag_fade": True}
    return 1 - loss


def _perturbed_hires(reader: _Reader, name: str, kept: float, *, adaptive: float = 0.0) -> None:
    scale = reader.number(f"{name}_hr_scale", 3.0)
    if reader.take("hires_pag_scale", scale * kept, key=f"{name}_hr_scale"):
        reader.values["hires_own_scales"] = True

    def tamed(where: str) -> tuple[float, str]:
        return reader.number(f"{where}_rescale", 0.0), reader.text(f"{where}_rescale_mode") or "full"

    differs = tamed(f"{name}_hr") != tamed(name)
    if name == "pag":
        differs |= reader.number("pag_hr_adaptive_scale", 0.0) != adaptive
    else:
        differs |= reader.number("seg_hr_blur_sigma", -1.0) != reader.number("seg_blur_sigma", -1.0)
    if differs:
        more = "adaptive scale" if name == "pag" else "blur"
        reader.notes.append(f"Rescale and {more} of the hires pass were left out: only its scales differ here.")
    if reader.text(f"{name}_hr_cfg"):
        reader.notes.append(f"Its CFG scale of the hires pass ({reader.text(f'{name}_hr_cfg')}) was left out.")


_READERS: tuple[tuple[Feature, str, Callable[[_Reader], None]], ...] = (
    ("sag", "sd_webui_SAG", _sd_webui_sag),
    ("sag", "Forge's SAG", _forge_sag),
    ("pag", "sd-perturbed-attention", _perturbed_attention),
    ("pag", "sd-perturbed-attention's SEG", _smoothed_energy),
    ("pag", "Forge's PAG", _forge_pag),
    ("pag", "sd-webui-incantations", _incantations_pag),
)


def migrate(pasted: Mapping[str, object]) -> Migration:
    """What the foreign fields of a pasted infotext say in ours. A feature that ours name is left as they say."""
    named = {feature for feature in ("sag", "pag", "both") if _names(pasted, feature)}
    values: dict[str, Value] = {}
    notes: list[str] = []
    sources: dict[str, str] = {}
    for feature, source, read in _READERS:
        reader = _Reader(pasted)
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
    return Migration(fields, tuple(sources.values()), tuple(notes))


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
