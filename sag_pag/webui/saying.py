"""What the panel says of its values: costs, what is chosen, what is wrong, what is not as by default. HTML, no gradio.

Every text is in an element of its own, so that the WebUI's localisation files can translate it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from sag_pag.engine.blocks import Topology
from sag_pag.engine.cost import Pass, PictureCost, cost_of, picture_cost
from sag_pag.engine.plan import check_blocks
from sag_pag.settings import FEATURES, PARAMETERS, SettingError, Settings, Switchable, Value
from sag_pag.webui import texts
from sag_pag.webui.blockmap import selection


def passes_of(topology: Topology, around: Mapping[str, Any]) -> list[Pass]:
    """What a picture with these controls is sampled in: one pass, two with hires. fix; none while a field is empty."""
    if None in around.values():
        return []
    steps, denoising = max(1, int(around["steps"])), around.get("denoising", 1)
    size = int(around["height"]) // 8, int(around["width"]) // 8
    scale = around.get("cfg_scale")
    first = Pass(cost_of(topology, size), min(steps, int(denoising * steps) + 1), 1 - denoising, rows=_rows(scale))
    if not around.get("hires"):
        return [first]
    cost = cost_of(topology, _hires_size(around))
    steps = int(around["hires_steps"]) or steps
    rows = _rows(around.get("hires_cfg_scale") or scale)  # 0 stands for the first pass's
    return [
        replace(first, hires="first pass"), Pass(cost, steps, 1 - around["hires_denoising"], "hires pass", rows),
    ]


def _rows(cfg_scale: float | None) -> int:
    """Rows a picture: a host that tells its CFG scale leaves the unconditional ones out where that is 1."""
    return 1 if cfg_scale == 1 else 2


def _hires_size(around: Mapping[str, Any]) -> tuple[int, int]:
    """The latent's height and width in the hires pass: both given, one given, or scaled."""
    height, width, target = around["height"], around["width"], (around["hires_height"], around["hires_width"])
    if not all(target):
        scale = target[0] / height or target[1] / width or around["hires_scale"]
        target = height * scale, width * scale
    return int(target[0]) // 8, int(target[1]) // 8


def block_state(name: str, text: str, model: Topology | str) -> str:
    """What is chosen, for the map; or what is wrong with the text, in the words in which a generation refuses.

    That another block stands in for those of a preset, or for the default, is said.
    """
    topology = None if isinstance(model, str) else model
    feature = PARAMETERS[name].feature
    try:
        check_blocks(Settings.from_dict({f"{feature}_enabled": True, name: text}), topology)
    except SettingError as error:
        return f'<span class="sag-pag-error" role="alert" data-text="{escape(text)}">{escape(error.for_people)}</span>'
    is_there = topology is not None and not topology.refuses(f"{feature}_enabled", True)
    chosen = selection(topology.resolve(text)) if topology is not None and is_there else ""
    said = f'<span hidden data-chosen="{chosen}" data-text="{escape(text)}"></span>'
    stands_in = topology is not None and is_there and topology.stand_in(text)
    return f'{said}<span class="sag-pag-hint">{texts.STANDS_IN}</span>' if stands_in else said


def cost_line_of(own: Mapping[str, Any], around: Mapping[str, Any], model: Topology | str) -> str:
    """What is on and what it costs, or what is wrong with the values."""
    topology = None if isinstance(model, str) else model
    try:
        settings = Settings.from_list(list(own.values()))
        settings.check_order()
        check_blocks(settings, topology)
    except SettingError as error:
        line = _line(f'<span class="sag-pag-error">{texts.NOT_USABLE}</span>')
        if PARAMETERS[error.field].kind == "blocks" or error.field.endswith("_start"):
            return line  # said beside the field, or the sliders
        return f'{line}<p class="sag-pag-error" role="alert">{escape(error.for_people)}</p>'
    passes = passes_of(topology, around) if topology is not None and settings.enabled else []
    cost = picture_cost(settings, passes) if passes else None
    return cost_line(settings, cost)


def cost_line(settings: Settings, cost: PictureCost | None) -> str:
    """What is on and, if known, what it costs; every text in an element of its own."""
    if not settings.enabled:
        return _line(f'<span class="sag-pag-off">{texts.OFF}</span>')
    on = "".join(
        f'<span class="sag-pag-on">{feature.upper()}</span>'
        for feature in reversed(FEATURES) if getattr(settings, f"{feature}_enabled")
    )
    if cost is None:
        return _line(on)
    picture, step = (
        f'<span class="sag-pag-price"><b>≈ {ratio:.2f}×</b> <span>{text}</span></span>'
        for ratio, text in ((cost.picture, texts.PER_PICTURE), (cost.step, texts.PER_STEP))
    )
    prices = picture if f"{cost.step:.2f}" == f"{cost.picture:.2f}" else picture + step
    return _line(f'{on}<span class="sag-pag-prices" title="{texts.COST_HELP}">{prices}</span>')


def _line(content: str) -> str:
    return f'<div class="sag-pag-line">{content}</div>'


def range_state(settings: Mapping[str, Any], feature: Switchable) -> str:
    """What is wrong with a feature's range, beside its sliders."""
    start, end = settings[f"{feature}_start"], settings[f"{feature}_end"]
    if start is None or end is None or start <= end:
        return ""
    return f'<span class="sag-pag-error" role="alert">{texts.ENDS_FIRST}</span>'


def summary(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Which of these parameters are not as by default, for the head of the fold that they are in."""
    said = [
        f"<span>{escape(parameter.label)}</span> <b>{escape(_shown(settings[parameter.name]))}</b>"
        for parameter in (PARAMETERS[name] for name in names)
        if settings[parameter.name] != parameter.default
        and (parameter.only_for is None or settings[parameter.only_for[0]] == parameter.only_for[1])
    ]
    return f'<div class="sag-pag-not-default">{" · ".join(said)}</div>' if said else ""


def _shown(value: Value | None) -> str:
    if value is None:
        return "?"
    if isinstance(value, str):
        return texts.CHOICES.get(value, value)
    return "✓" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
