"""The panel of controls, made from ``PARAMETERS``. Needs gradio but not the WebUI."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from sag_pag.engine.blocks import Topology
from sag_pag.settings import FEATURES, PARAMETERS, Feature, Parameter, Settings, Switchable
from sag_pag.webui import texts
from sag_pag.webui.blockmap import block_map
from sag_pag.webui.presets_ui import PresetControls
from sag_pag.webui.saying import block_state, cost_line, cost_line_of, passes_of, range_state, summary

Switch = Callable[..., AbstractContextManager[Any]]
"""Makes an accordion that is also a checkbox, as the WebUI's ``InputAccordion``."""

LoadedModel = Callable[[], Topology | str]
"""The loaded model's self-attentions, or why there are none to choose from."""

Rows = tuple[tuple[str, ...], ...]

_FOLDED: dict[Feature, Rows] = {
    "pag": (
        ("pag_perturbation",), ("pag_query_blur",), ("pag_swap",), ("pag_blocks",), ("pag_start", "pag_end"),
        ("pag_every", "pag_fade"),
    ),
    "sag": (
        ("sag_threshold", "sag_blur_sigma"), ("sag_block",), ("sag_start", "sag_end"), ("sag_every", "sag_show"),
    ),
    "both": (("rescale",), ("rescale_mode",)),
}
"""What is not seen at once: all but the scales."""
_HIRES: Rows = (("hires_pass",), ("hires_own_scales",), ("hires_sag_scale", "hires_pag_scale"))
_QUIET = {"queue": False, "show_progress": False}


@dataclass(frozen=True)
class Surroundings:
    """Controls outside the panel that its costs depend on: pixels and steps.

    The CFG scale too where a scale of 1 saves the unconditional rows; AUTOMATIC1111's WebUI computes them all the same.
    In img2img denoising strength; where there is hires. fix, its switch, scale, pixels to resize to, steps (0: as many
    as before), denoising strength and, if it has one, CFG scale (0: as before).
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
    hires_cfg_scale: Any = None

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
        self.ranges: dict[Switchable, Any] = {}
        self.summaries: dict[Feature, Any] = {}
        self._made: dict[str, Any] = {}
        with gr.Accordion(texts.PANEL, open=False, elem_id=elem_id("panel"), elem_classes="sag-pag-panel"):
            self.cost = gr.HTML(cost_line(Settings(), None), elem_id=elem_id("cost"), elem_classes="sag-pag-cost")
            self.refresh = gr.Button("⟳", visible=False, elem_id=elem_id("refresh"), elem_classes="sag-pag-refresh")
            self.recount = gr.Button("⟳", visible=False, elem_id=elem_id("recount"), elem_classes="sag-pag-recount")
            gr.HTML(_spoken_by_the_page())
            self.presets = PresetControls(elem_id)
            for feature in reversed(FEATURES):
                self._feature(feature, switch)
            self._fold("both", texts.BOTH_AND_HIRES if hires else texts.BOTH, more=_HIRES, shown=hires)
        self.controls = [self._made[name] for name in PARAMETERS]
        self.presets.connect(self.controls)

    def _feature(self, feature: Switchable, switch: Switch | None) -> None:
        parameter = PARAMETERS[f"{feature}_enabled"]
        if switch is None:
            self._made[parameter.name] = _control(parameter, self.elem_id(parameter.name))
            with gr.Group():
                self._inside(feature)
            return
        with switch(False, label=parameter.label, elem_id=self.elem_id(parameter.name)) as component:
            gr.Markdown(parameter.help, elem_classes="sag-pag-help")
            self._inside(feature)
        self._made[parameter.name] = component

    def _inside(self, feature: Switchable) -> None:
        self._rows(((f"{feature}_scale",),))
        self._fold(feature, texts.MORE)

    def _fold(self, feature: Feature, label: str, *, more: Rows = (), shown: bool = True) -> None:
        """A closed accordion whose head says what in it is not as by default; ``more`` only where it is ``shown``."""
        self.summaries[feature] = gr.HTML(elem_id=self.elem_id(f"{feature}_summary"), elem_classes="sag-pag-summary")
        with gr.Accordion(label, open=False, elem_id=self.elem_id(f"{feature}_more"), elem_classes="sag-pag-fold"):
            self._rows(_FOLDED[feature])
            if more:
                with gr.Column(visible=shown):
                    self._rows(more)

    def _rows(self, rows: Rows) -> None:
        for names in rows:
            first = PARAMETERS[names[0]]
            if first.kind == "blocks":
                self._blocks(first)
                continue
            with gr.Row():
                for name in names:
                    self._made[name] = _control(PARAMETERS[name], self.elem_id(name))
            if first.name in ("sag_start", "pag_start"):
                feature: Switchable = "sag" if first.feature == "sag" else "pag"
                self.ranges[feature] = gr.HTML(elem_id=self.elem_id(f"{feature}_range"), elem_classes="sag-pag-range")

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
        outputs = [self.cost, self.presets.changed, *self.summaries.values(), *self.ranges.values()]
        sized = f"(...values) => sagPagSized({self._id}, values, {self._places()})"
        asking = {"inputs": inputs, "_js": sized, **_QUIET}
        self.recount.click(self._recount, outputs=outputs, **asking)
        self.refresh.click(self._redraw, outputs=[*outputs, *self.states.values(), *self.maps.values()], **asking)
        for name, state in self.states.items():
            self._made[name].change(self._check(name), [self._made[name]], [state], **_QUIET)
        choices = {p.only_for[0] for p in PARAMETERS.values() if p.only_for}
        for choice in choices:
            shown = [p for p in PARAMETERS.values() if p.only_for and p.only_for[0] == choice]
            self._made[choice].change(partial(_shown_for, shown), [self._made[choice]],
                                      [self._made[p.name] for p in shown], **_QUIET)
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
        return lambda text: block_state(name, text, self.model())

    def _recount(self, *values: Any) -> list[Any]:
        """The cost line; whether the values are those of the chosen preset, which comes last; summaries and ranges."""
        own, around = self._split(values[:-1])
        changed = self.presets.compare(values[-1], values[: len(PARAMETERS)])
        folds = [summary(own, self._folded(feature)) for feature in self.summaries]
        return [cost_line_of(own, around, self.model()), changed, *folds, *(range_state(own, f) for f in self.ranges)]

    def _folded(self, feature: Feature) -> list[str]:
        """The parameters in a feature's fold."""
        rows = _FOLDED[feature] + (_HIRES if feature == "both" else ())
        return [name for row in rows for name in row]

    def _redraw(self, *values: Any) -> list[Any]:
        """What ``_recount`` gives, the states and the maps."""
        own, around = self._split(values[:-1])
        model = self.model()
        if isinstance(model, str):
            waiting = " sag-pag-waiting" if model == texts.NO_MODEL else ""
            maps = [f'<p class="sag-pag-hint{waiting}">{escape(model)}</p>' for _ in self.maps]
        elif passes := passes_of(model, around):
            maps = [
                f'<p class="sag-pag-hint">{escape(reason)}</p>'
                if (reason := model.refuses(f"{PARAMETERS[name].feature}_enabled", True))
                else block_map(passes[0].cost, str(own[name]), many=name == "pag_blocks")
                for name in self.maps
            ]
        else:
            maps = [gr.update() for _ in self.maps]
        states = [block_state(name, str(own[name]), model) for name in self.maps]
        return [*self._recount(*values), *states, *maps]

    def _split(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The panel's own values and those around it, by name."""
        named = dict(zip((*PARAMETERS, *self.around), values, strict=True))
        own = {name: named.pop(name) for name in PARAMETERS}
        return own, named


def _spoken_by_the_page() -> str:
    """Texts, never seen here, that the page's scripts put where they belong: here the WebUI can translate them."""
    terms = "".join(f'<span data-for="{name}">{term}</span>' for name, term in texts.TERMS.items())
    return (
        f'<div hidden class="sag-pag-texts" data-words="{"|".join(texts.CHOICES)}">'
        f'<span class="sag-pag-plot-decides">{texts.PLOT_DECIDES}</span>'
        f'<span class="sag-pag-not-counting">{texts.NOT_COUNTING}</span>{terms}</div>'
    )


def _shown_for(parameters: Sequence[Parameter], chosen: str) -> Any:
    """Shows the parameters that do anything for what is chosen."""
    updates = [gr.update(visible=p.only_for is not None and p.only_for[1] == chosen) for p in parameters]
    return updates if len(updates) > 1 else updates[0]


def _control(parameter: Parameter, elem_id: str) -> Any:
    common = {
        "label": parameter.label, "value": parameter.default, "info": parameter.help, "elem_id": elem_id,
        "visible": parameter.only_for is None or parameter.only_for[1] == PARAMETERS[parameter.only_for[0]].default,
    }
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.is_number:
        return gr.Slider(minimum=parameter.minimum, maximum=parameter.maximum, step=parameter.step, **common)
    if parameter.kind == "choice":
        return gr.Radio(choices=[(texts.CHOICES.get(choice, choice), choice) for choice in parameter.choices], **common)
    return gr.Textbox(max_lines=1, **common)
