"""The panel of controls, made from ``PARAMETERS``. Needs gradio but not the WebUI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from sag_pag.engine.cost import Pass, PictureCost, UNetCost, picture_cost
from sag_pag.engine.plan import check_blocks
from sag_pag.engine.topology import Topology
from sag_pag.settings import FEATURES, PARAMETERS, Feature, Parameter, SettingError, Settings
from sag_pag.webui import texts
from sag_pag.webui.blockmap import block_map, selection
from sag_pag.webui.presets_ui import PresetControls

Switch = Callable[..., AbstractContextManager[Any]]
"""Makes an accordion that is also a checkbox, as the WebUI's ``InputAccordion``."""

LoadedModel = Callable[[], Topology | str]
"""The loaded model's self-attentions, or why there are none to choose from."""

_ROWS: dict[Feature, tuple[tuple[str, ...], ...]] = {
    "pag": (
        ("pag_scale",), ("pag_blocks",), ("pag_start", "pag_end"), ("pag_fade", "pag_every"), ("pag_perturbation",),
        ("pag_query_blur", "pag_swap"),
    ),
    "sag": (
        ("sag_scale",), ("sag_threshold", "sag_blur_sigma"), ("sag_block",), ("sag_start", "sag_end"),
        ("sag_every", "sag_show"),
    ),
    "both": (("rescale", "rescale_mode"),),
}
_HIRES_ROWS = (("hires_pass", "hires_own_scales"), ("hires_sag_scale", "hires_pag_scale"))
_QUIET = {"queue": False, "show_progress": False}


@dataclass(frozen=True)
class Surroundings:
    """Controls outside the panel that its costs depend on: pixels and steps.

    The CFG scale too where a scale of 1 saves the unconditional rows, which the WebUI computes all the same. In img2img
    denoising strength; where there is hires. fix, its switch, scale, pixels to resize to, steps (0: as many as before)
    and denoising strength.
    """

    width: Any
    height: Any
    steps: Any
    cfg_scale: Any = None
    denoising: Any = None
    hires: Any = None
    hires_scale: Any = None
    hires_width: Any = None
    hires_height: Any = None
    hires_steps: Any = None
    hires_denoising: Any = None

    def components(self) -> dict[str, Any]:
        """Those that there are."""
        return {name: component for name, component in vars(self).items() if component is not None}


class Panel:
    """The controls inside one accordion. ``controls`` are in the positional order of ``PARAMETERS``.

    ``elem_id`` makes an element's id from a name. ``switch`` makes the two features' checkboxes where there is such a
    component; without it they are plain checkboxes. ``hires`` shows what is for hires. fix only.
    """

    def __init__(
        self, elem_id: Callable[[str], str], *, switch: Switch | None, model: LoadedModel, hires: bool = False,
    ) -> None:
        self.elem_id = elem_id
        self.model = model
        self.around: tuple[str, ...] = ()
        self.maps: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self._made: dict[str, Any] = {}
        with gr.Accordion(texts.PANEL, open=False, elem_id=elem_id("panel"), elem_classes="sag-pag-panel"):
            self.cost = gr.HTML(_cost_line(Settings(), None), elem_id=elem_id("cost"), elem_classes="sag-pag-cost")
            self.refresh = gr.Button("⟳", visible=False, elem_id=elem_id("refresh"), elem_classes="sag-pag-refresh")
            self.recount = gr.Button("⟳", visible=False, elem_id=elem_id("recount"), elem_classes="sag-pag-recount")
            self.presets = PresetControls(elem_id)
            for feature in reversed(FEATURES):
                self._feature(feature, switch)
            with gr.Accordion(texts.BOTH_AND_HIRES if hires else texts.BOTH, open=False, elem_id=elem_id("both")):
                self._rows(_ROWS["both"])
                with gr.Column(visible=hires):
                    self._rows(_HIRES_ROWS)
        self.controls = [self._made[name] for name in PARAMETERS]
        self.presets.connect(self.controls)

    def _feature(self, feature: Feature, switch: Switch | None) -> None:
        parameter = PARAMETERS[f"{feature}_enabled"]
        if switch is None:
            self._made[parameter.name] = _control(parameter, self.elem_id(parameter.name))
            with gr.Group():
                self._rows(_ROWS[feature])
            return
        with switch(False, label=parameter.label, elem_id=self.elem_id(parameter.name)) as component:
            gr.Markdown(parameter.help, elem_classes="sag-pag-help")
            self._rows(_ROWS[feature])
        self._made[parameter.name] = component

    def _rows(self, rows: tuple[tuple[str, ...], ...]) -> None:
        for names in rows:
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
        """Makes costs, maps, text fields and presets follow each other, the surroundings and the loaded model.

        A change is told to the page alone, which asks for what it shows when the changing has come to rest, and not
        at all while the panel is closed and off (``javascript/sag_pag.js``).
        """
        components = around.components()
        self.around = tuple(components)
        inputs = [*self.controls, *components.values(), self.presets.chosen]
        outputs = [self.cost, self.presets.changed]
        sized = f"(...values) => sagPagSized({self._id}, values, {self._places()})"
        asking = {"inputs": inputs, "_js": sized, **_QUIET}
        self.recount.click(self._recount, outputs=outputs, **asking)
        self.refresh.click(self._redraw, outputs=[*outputs, *self.states.values(), *self.maps.values()], **asking)
        for name, state in self.states.items():
            self._made[name].change(self._check(name), [self._made[name]], [state], **_QUIET)
        for name, component in {**dict(zip(PARAMETERS, self.controls, strict=True)), **components}.items():
            redraw = "true" if name in ("width", "height") else "false"
            component.change(fn=None, _js=f"() => sagPagChanged({self._id}, {redraw})")

    @property
    def _id(self) -> str:
        """The panel's element id, for the page's scripts."""
        return json.dumps(self.elem_id("panel"))

    def _places(self) -> list[int]:
        """Where width and height are among the values that the page sends."""
        return [len(PARAMETERS) + self.around.index(name) for name in ("width", "height")]

    def _check(self, name: str) -> Callable[[str], str]:
        return lambda text: _state(name, text, self.model())

    def _recount(self, *values: Any) -> list[Any]:
        """The cost line, and whether the values are those of the chosen preset, which comes last."""
        own, around = self._split(values[:-1])
        changed = self.presets.compare(values[-1], values[: len(PARAMETERS)])
        return [_cost_line_of(own, around, self.model()), changed]

    def _redraw(self, *values: Any) -> list[Any]:
        """What ``_recount`` gives, the states and the maps."""
        own, around = self._split(values[:-1])
        model = self.model()
        if isinstance(model, str):
            waiting = " sag-pag-waiting" if model == texts.NO_MODEL else ""
            maps = [f'<p class="sag-pag-hint{waiting}">{escape(model)}</p>' for _ in self.maps]
        elif passes := _passes(model, around):
            maps = [block_map(passes[0].cost, str(own[name]), many=name == "pag_blocks") for name in self.maps]
        else:
            maps = [gr.update() for _ in self.maps]
        states = [_state(name, str(own[name]), model) for name in self.maps]
        return [*self._recount(*values), *states, *maps]

    def _split(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The panel's own values and those around it, by name."""
        named = dict(zip((*PARAMETERS, *self.around), values, strict=True))
        own = {name: named.pop(name) for name in PARAMETERS}
        return own, named


def _passes(topology: Topology, around: Mapping[str, Any]) -> list[Pass]:
    """What a picture with these controls is sampled in: one pass, two with hires. fix; none while a field is empty."""
    if None in around.values():
        return []
    steps, denoising = max(1, int(around["steps"])), around.get("denoising", 1)
    size = int(around["height"]) // 8, int(around["width"]) // 8
    first = Pass(UNetCost(topology, size), min(steps, int(denoising * steps) + 1), 1 - denoising)
    if not around.get("hires"):
        return [first]
    cost = UNetCost(topology, _hires_size(around))
    steps = int(around["hires_steps"]) or steps
    return [replace(first, hires="first pass"), Pass(cost, steps, 1 - around["hires_denoising"], "hires pass")]


def _hires_size(around: Mapping[str, Any]) -> tuple[int, int]:
    """The latent's height and width in the hires pass: both given, one given, or scaled."""
    height, width, target = around["height"], around["width"], (around["hires_height"], around["hires_width"])
    if not all(target):
        scale = target[0] / height or target[1] / width or around["hires_scale"]
        target = height * scale, width * scale
    return int(target[0]) // 8, int(target[1]) // 8


def _state(name: str, text: str, model: Topology | str) -> str:
    """What is chosen, for the map; or what is wrong with the text, in the words in which a generation refuses."""
    topology = None if isinstance(model, str) else model
    feature = PARAMETERS[name].feature
    try:
        check_blocks(Settings.from_dict({f"{feature}_enabled": True, name: text}), topology)
    except SettingError as error:
        return f'<span class="sag-pag-error" role="alert" data-text="{escape(text)}">{escape(error.for_people)}</span>'
    chosen = selection(topology.resolve(text)) if topology else ""
    return f'<span hidden data-chosen="{chosen}" data-text="{escape(text)}"></span>'


def _cost_line_of(own: Mapping[str, Any], around: Mapping[str, Any], model: Topology | str) -> str:
    """What is on and what it costs, or what is wrong with the values."""
    topology = None if isinstance(model, str) else model
    try:
        settings = Settings.from_list(list(own.values()))
        settings.check_order()
        check_blocks(settings, topology)
    except SettingError as error:
        line = _line(f'<span class="sag-pag-error">{texts.NOT_USABLE}</span>')
        if PARAMETERS[error.field].kind == "blocks":
            return line  # shown under the text field
        return f'{line}<p class="sag-pag-error" role="alert">{escape(error.for_people)}</p>'
    passes = _passes(topology, around) if topology is not None and settings.enabled else []
    cost = picture_cost(settings, passes, rows=1 if around.get("cfg_scale") == 1 else 2) if passes else None
    return _cost_line(settings, cost)


def _cost_line(settings: Settings, cost: PictureCost | None) -> str:
    """What is on and, if known, what it costs; every text in an element of its own."""
    if not settings.enabled:
        return _line(f'<span class="sag-pag-off">{texts.OFF}</span>')
    on = "".join(
        f'<span class="sag-pag-on">{feature.upper()}</span>'
        for feature in reversed(FEATURES) if getattr(settings, f"{feature}_enabled")
    )
    if cost is None:
        return _line(on)
    return _line(
        f'{on}<span title="{texts.COST_HELP}"><b>≈ {cost.step:.2f}×</b> <span>{texts.PER_STEP}</span>, '
        f"<b>≈ {cost.picture:.2f}×</b> <span>{texts.PER_PICTURE}</span></span>"
    )


def _line(content: str) -> str:
    return f'<div class="sag-pag-line">{content}</div>'


def _control(parameter: Parameter, elem_id: str) -> Any:
    common = {"label": parameter.label, "value": parameter.default, "info": parameter.help, "elem_id": elem_id}
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.is_number:
        return gr.Slider(minimum=parameter.minimum, maximum=parameter.maximum, step=parameter.step, **common)
    if parameter.kind == "choice":
        return gr.Radio(choices=list(parameter.choices), **common)
    return gr.Textbox(max_lines=1, **common)
