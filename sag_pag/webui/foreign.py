"""The infotext of other extensions that guide in the same way, one reader for each.

Values are taken over where they mean the same here. What has no counterpart is left at its default, and a note says so:
a picture's metadata must not turn silently into another picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from sag_pag.engine.blocks import BlockNameError
from sag_pag.engine.topology import check_names
from sag_pag.settings import BLURRED, PARAMETERS, WHOLE_MAP, Feature, SettingError, Value


class Reader:
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


def _sd_webui_sag(reader: Reader) -> None:
    """ashen-sensored/sd_webui_SAG: same formula and mask, blur 1. Writes its two fields only when on."""
    if "SAG Guidance Scale" not in reader.pasted:
        return
    scale = reader.number("SAG Guidance Scale", 0.75)
    if reader.switch_on("sag", scale, key="SAG Guidance Scale"):
        reader.take("sag_threshold", reader.number("SAG Mask Threshold", 1.0), key="SAG Mask Threshold")


def _forge_sag(reader: Reader) -> None:
    """Forge and reForge: same formula and mask; older ones have no threshold. The blur always has 9 taps."""
    if reader.is_on("sag_enabled"):
        _forge_mask(reader, "sag_")


def _forge_mask(reader: Reader, key: str) -> None:
    if not reader.switch_on("sag", reader.number(f"{key}scale", 0.5), key=f"{key}scale"):
        return
    reader.take("sag_threshold", reader.number(f"{key}threshold", 1.0), key=f"{key}threshold")
    blur = reader.number(f"{key}blur_sigma", 2.0)
    if reader.take("sag_blur_sigma", blur, key=f"{key}blur_sigma") and math.ceil(3 * blur) > 4:
        reader.notes.append(f"Its blur is cut off at 4 latent pixels: at sigma {blur:g} it is wider here.")


def _forge_pag(reader: Reader) -> None:
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
    _note_steps(reader, reader.number("pagi_start_step", 0.0), reader.number("pagi_end_step", 1.0))


_ONE_CALL_A_STEP = ("Euler", "DPM++ 2M", "DPM++ 3M", "LMS", "LCM", "DDIM", "PLMS", "UniPC")


def _incantations_pag(reader: Reader) -> None:
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


def _perturbed_attention(reader: Reader) -> None:
    """pamparamm/sd-perturbed-attention, in Forge and reForge: same formula, rescale modes and block lists."""
    if not _perturbed_common(reader, "pag"):
        return
    adaptive = reader.number("pag_adaptive_scale", 0.0)
    kept = _perturbed_fade(reader, adaptive)
    if reader.is_on("pag_hr_override"):
        _perturbed_hires(reader, "pag", kept, adaptive=adaptive)


def _smoothed_energy(reader: Reader) -> None:
    """The same extension's SEG: the same blur where it does not reach the map's edge; -1 is the mean."""
    if "seg_start_step" in reader.pasted or not _perturbed_common(reader, "seg"):
        return
    _query_blur(reader, reader.number("seg_blur_sigma", -1.0), key="seg_blur_sigma")
    if reader.is_on("seg_hr_override"):
        _perturbed_hires(reader, "seg", 1.0)


def _sd_forge_seg(reader: Reader) -> None:
    """MisterChief95/sd-forge-seg: fields of the same names, but it blurs along the rows of the attention map."""
    if "seg_start_step" not in reader.pasted or not _perturbed_common(reader, "seg"):
        return
    _query_blur(reader, reader.number("seg_blur_sigma", 2.0), key="seg_blur_sigma")
    reader.notes.append("It blurs the attention map, not the queries: the same settings steer otherwise.")
    _note_steps(reader, reader.number("seg_start_step", 0.0), reader.number("seg_end_step", 1.0))


def _query_blur(reader: Reader, sigma: float, *, key: str) -> None:
    """Makes PAG blur queries. Below 0, and from where the map is all of it, their mean is meant."""
    reader.values["pag_perturbation"] = BLURRED
    if 0 <= sigma < WHOLE_MAP:
        reader.take("pag_query_blur", sigma, key=key)


def _note_steps(reader: Reader, start: float, end: float) -> None:
    """Notes a range of shares of the steps."""
    if start > 0 or end < 1:
        reader.notes.append(
            f"Its range of steps ({start:g} to {end:g} of them) was left out: Start and End go by the noise level here."
        )


def _perturbed_common(reader: Reader, name: str) -> bool:
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


def _perturbed_blocks(reader: Reader, name: str) -> str | None:
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


def _perturbed_fade(reader: Reader, adaptive: float) -> float:
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


def _perturbed_hires(reader: Reader, name: str, kept: float, *, adaptive: float = 0.0) -> None:
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


_STEER_BLOCK = re.compile(r"(middle|mid|(?:input|in|down|output|out|up)(?=\s*\d))\s*(\d+)?(?:\.(\d+))?")
_STEER_PARTS = {"in": "input", "down": "input", "mid": "middle", "out": "output", "up": "output"}


def _steer(method: str, read: Callable[[Reader, str], object]) -> Callable[[Reader], None]:
    """sca-285/sd-steer-cfg-attention-guidance (Steer): one of its methods that are ours too.

    Its one field lists what is on, with the values that are not its defaults: ``pag scale=4.5; seg blocks=output%201``.
    """

    def read_section(reader: Reader) -> None:
        sections = {words[0]: words[1:] for words in map(str.split, reader.text("Steer").split(";")) if words}
        if method not in sections:
            return
        key = f"Steer's {method} "
        given = (item.partition("=") for item in sections[method])
        own = Reader({f"{key}{name}": unquote(text) for name, _, text in given})
        read(own, key)
        reader.values |= own.values
        reader.notes += own.notes
        if others := [name.upper() for name in sections if name not in ("pag", "seg", "sag")]:
            reader.notes.append(f"Steer's {', '.join(others)} {'was' if len(others) == 1 else 'were'} left out.")

    return read_section


def _steer_attention(reader: Reader, key: str) -> bool:
    """Whether it could be taken over. Its ``down 7`` is the WebUI's ``input.7``, not diffusers' ``down.7``."""
    blocks = []
    for item in (reader.text(f"{key}blocks") or "middle").lower().split(","):
        found = _STEER_BLOCK.fullmatch(item.strip())
        if not found:
            reader.notes.append(f"PAG was left off: there is no block {item.strip()}.")
            return False
        name, number, transformer = found.groups()
        part = _STEER_PARTS.get(name, name)
        names = (part, None if part == "middle" else number, transformer)
        blocks.append(".".join(name for name in names if name is not None))
    if not reader.switch_on("pag", reader.number(f"{key}scale", 3.0), key=f"{key}scale"):
        return False
    reader.values["pag_blocks"] = ", ".join(blocks)
    _note_steps(reader, reader.number(f"{key}start", 0.0), reader.number(f"{key}end", 1.0))
    return True


def _steer_queries(reader: Reader, key: str) -> None:
    """The blur where it does not reach the map's edge is the same."""
    if _steer_attention(reader, key):
        _query_blur(reader, reader.number(f"{key}blur_sigma", WHOLE_MAP), key=f"{key}blur_sigma")


READERS: tuple[tuple[Feature, str, Callable[[Reader], None]], ...] = (
    ("sag", "sd_webui_SAG", _sd_webui_sag),
    ("sag", "Forge's SAG", _forge_sag),
    ("pag", "sd-perturbed-attention", _perturbed_attention),
    ("pag", "sd-perturbed-attention's SEG", _smoothed_energy),
    ("pag", "sd-forge-seg", _sd_forge_seg),
    ("pag", "Forge's PAG", _forge_pag),
    ("pag", "sd-webui-incantations", _incantations_pag),
    ("sag", "Steer's SAG", _steer("sag", _forge_mask)),
    ("pag", "Steer's PAG", _steer("pag", _steer_attention)),
    ("pag", "Steer's SEG", _steer("seg", _steer_queries)),
)
