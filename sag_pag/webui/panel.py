"""The panel of controls, made from ``PARAMETERS``. Needs gradio but not the WebUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sag_pag.blocks import Topology
from sag_pag.cost import UNetCost, picture_cost
from sag_pag.session import check_blocks
from sag_pag.settings import FEATURES, PARAMETERS, Feature, Parameter, SettingError, Settings
from sag_pag.webui import texts
from sag_pag.webui.blockmap import block_map, selection
from sag_pag.webui.presets_ui import PresetControls

Switch = Callable[..., AbstractContextManager[Any]]
"""Makes an accordion that is also a checkbox, as the WebUI's ``InputAccordion``."""

LoadedModel = Callable[[], Topology | str]
"""The loaded model's self-attentions, or why there are none to choose from."""

_ROWS: dict[Feature, tuple[tuple[str, ...], ...]] = {
    "pag": (("pag_scale",), ("pag_blocks",), ("pag_start", "pag_end"), ("pag_fade",)),
    "sag": (
        ("sag_scale",), ("sag_threshold", "sag_blur_sigma"), ("sag_block",), ("sag_start", "sag_end"), ("sag_show",),
    ),
    "both": (
        ("rescale", "rescale_mode"), ("hires_pass", "hires_own_scales"), ("hires_sag_scale", "hires_pag_scale"),
    ),
}
_COSTLY = (
    "sag_enabled", "sag_scale", "sag_blur_sigma", "sag_block", "sag_start", "sag_end",
    "pag_enabled", "pag_scale", "pag_blocks", "pag_start", "pag_end",
)
"""What the cost line depends on."""

_QUIET = {"queue": False, "show_progress": False}


@dataclass(frozen=True)
class Surroundings:
    """Controls outside the panel that its costs depend on: pixels, steps, CFG scale and, in img2img, denoising."""

    width: Any
    height: Any
    steps: Any
    cfg_scale: Any
    denoising: Any = None

    def components(self) -> list[Any]:
        found = [self.width, self.height, self.steps, self.cfg_scale, self.denoising]
        return [component for component in found if component is not None]


class Panel:
    """The controls inside one accordion. ``controls`` are in the positional order of ``PARAMETERS``.

    ``elem_id`` makes an element's id from a name. ``switch`` makes the two features' checkboxes where there is such a
    component; without it they are plain checkboxes.
    """

    def __init__(self, elem_id: Callable[[str], str], *, switch: Switch | None, model: LoadedModel) -> None:
        self.elem_id = elem_id
        self.model = model
        self.maps: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        with gr.Accordion(texts.PANEL, open=False, elem_id=elem_id("panel"), elem_classes="sag-pag-panel"):
            self.cost = gr.HTML(_cost_line(Settings(), None), elem_id=elem_id("cost"), elem_classes="sag-pag-cost")
            self.refresh = gr.Button("⟳", visible=False, elem_id=elem_id("refresh"), elem_classes="sag-pag-refresh")
            presets = PresetControls(elem_id)
            for feature in reversed(FEATURES):
                self._feature(feature, switch)
            with gr.Accordion(texts.BOTH, open=False, elem_id=elem_id("both")):
                self._rows("both")
        self.controls = [self._made[name] for name in PARAMETERS]
        presets.connect(self.controls)

    def _feature(self, feature: Feature, switch: Switch | None) -> None:
        parameter = PARAMETERS[f"{feature}_enabled"]
        if switch is None:
            self._made[parameter.name] = _control(parameter, self.elem_id(parameter.name))
            with gr.Group():
                self._rows(feature)
            return
        with switch(False, label=parameter.label, elem_id=self.elem_id(parameter.name)) as component:
            gr.Markdown(parameter.help, elem_classes="sag-pag-help")
            self._rows(feature)
        self._made[parameter.name] = component

    def _rows(self, feature: Feature) -> None:
        for names in _ROWS[feature]:
            if PARAMETERS[names[0]].kind == "blocks":
                self._blocks(PARAMETERS[names[0]])
                continue
            with gr.Row():
                for name in names:
                    self._made[name] = _control(PARAMETERS[name], self.elem_id(name))

    def _blocks(self, parameter: Parameter) -> None:
        """The text field with its map above and, below, what is wrong with the text."""
        name = parameter.name
        with gr.Column(elem_classes="sag-pag-blocks"):
            self.maps[name] = gr.HTML(elem_id=self.elem_id(f"{name}_map"), elem_classes="sag-pag-mapping")
            self._made[name] = _control(parameter, self.elem_id(name))
            self.states[name] = gr.HTML(elem_id=self.elem_id(f"{name}_state"), elem_classes="sag-pag-state")

    def connect(self, around: Surroundings) -> None:
        """Makes costs, maps and text fields follow each other, the surroundings and the loaded model."""
        inputs = [*self.controls, *around.components()]
        for name, state in self.states.items():
            field = self._made[name]
            field.change(self._check(name), [field], [state], **_QUIET)
        costly = [self._made[name] for name in _COSTLY]
        for component in (*costly, around.steps, around.denoising):
            if component is not None:
                component.change(self._overview, inputs, [self.cost], **_QUIET)
        everything = [self.cost, *self.maps.values(), *self.states.values()]
        for component in (around.width, around.height, around.cfg_scale):
            component.change(self._redraw, inputs, everything, **_QUIET)
        self.refresh.click(self._redraw, inputs, everything, **_QUIET)

    def _check(self, name: str) -> Callable[[str], str]:
        return lambda text: _state(name, text, self.model())

    def _overview(self, *values: Any) -> str:
        """The cost line for the present values."""
        own, around = values[: len(PARAMETERS)], values[len(PARAMETERS) :]
        return self._cost(own, around, _unet_cost(self.model(), around))

    def _redraw(self, *values: Any) -> list[str]:
        """Cost line, maps and states for the present values."""
        own, around = values[: len(PARAMETERS)], values[len(PARAMETERS) :]
        model = self.model()
        texts_of = {name: str(own[list(PARAMETERS).index(name)]) for name in self.maps}
        states = [_state(name, text, model) for name, text in texts_of.items()]
        cost = _unet_cost(model, around)
        if isinstance(model, str) or cost is None:
            reason = f'<p class="sag-pag-hint">{escape(str(model))}</p>'
            maps = [reason for _ in texts_of]
        else:
            maps = [
                block_map(cost, model.resolve_known(text), many=name == "pag_blocks")
                for name, text in texts_of.items()
            ]
        return [self._cost(own, around, cost), *maps, *states]

    def _cost(self, own: Sequence[Any], around: Sequence[Any], cost: UNetCost | None) -> str:
        try:
            settings = Settings.from_list(own)
            settings.check_order()
            check_blocks(settings, cost.topology if cost else None)
        except SettingError as error:
            line = _line(f'<span class="sag-pag-error">{texts.NOT_USABLE}</span>')
            shown_elsewhere = error.field in self.states  # under the text field
            return line if shown_elsewhere else f'{line}<p class="sag-pag-error" role="alert">{escape(str(error))}</p>'
        return _cost_line(settings, cost, *around)


def _unet_cost(model: Topology | str, around: Sequence[Any]) -> UNetCost | None:
    """For the picture's size, in pixels the first two of ``around``; ``None`` without a model."""
    return None if isinstance(model, str) else UNetCost(model, (int(around[1]) // 8, int(around[0]) // 8))


def _state(name: str, text: str, model: Topology | str) -> str:
    """What is chosen, for the map; or what is wrong with the text, in the words in which a generation refuses."""
    topology = None if isinstance(model, str) else model
    feature = PARAMETERS[name].feature
    try:
        check_blocks(Settings.from_dict({f"{feature}_enabled": True, name: text}), topology)
    except SettingError as error:
        return f'<span class="sag-pag-error" role="alert">{escape(str(error))}</span>'
    return f'<span hidden data-chosen="{selection(topology.resolve(text)) if topology else ""}"></span>'


def _cost_line(
    settings: Settings, cost: UNetCost | None, _width: float = 0, _height: float = 0, steps: float = 20,
    cfg_scale: float = 7, denoising: float = 1,
) -> str:
    """What is on and what it costs; every text in an element of its own."""
    if not settings.enabled:
        return _line(f'<span class="sag-pag-off">{texts.OFF}</span>')
    on = "".join(
        f'<span class="sag-pag-on">{feature.upper()}</span>'
        for feature in reversed(FEATURES) if getattr(settings, f"{feature}_enabled")
    )
    if cost is None:
        return _line(on)
    count = max(1, round(steps * denoising))
    ratio = picture_cost(settings, cost, steps=count, rows=1 if cfg_scale == 1 else 2, begin=1 - denoising)
    return _line(
        f'{on}<span title="{texts.COST_HELP}"><b>≈ {ratio.step:.2f}×</b> <span>{texts.PER_STEP}</span>, '
        f"<b>≈ {ratio.picture:.2f}×</b> <span>{texts.PER_PICTURE}</span></span>"
    )


def _line(content: str) -> str:
    return f'<div class="sag-pag-line">{content}</div>'


def _control(parameter: Parameter, elem_id: str) -> Any:
    common = {"label": parameter.label, "value": parameter.default, "info": parameter.help, "elem_id": elem_id}
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.kind == "float":
        return gr.Slider(minimum=parameter.minimum, maximum=parameter.maximum, step=parameter.step, **common)
    if parameter.kind == "choice":
        return gr.Radio(choices=list(parameter.choices), **common)
    return gr.Textbox(max_lines=1, **common)
