"""The panel of controls, made from ``PARAMETERS``. Needs gradio but not the WebUI."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import gradio as gr

from sag_pag.settings import PARAMETERS, Feature, Parameter
from sag_pag.webui.presets_ui import PresetControls

TITLE = "Self-Attention & Perturbed-Attention Guidance"

Switch = Callable[..., AbstractContextManager[Any]]
"""Makes an accordion that is also a checkbox, as the WebUI's ``InputAccordion``."""

_ROWS: dict[Feature, tuple[tuple[str, ...], ...]] = {
    "pag": (("pag_scale",), ("pag_blocks",), ("pag_start", "pag_end"), ("pag_fade",)),
    "sag": (("sag_scale",), ("sag_threshold", "sag_blur_sigma"), ("sag_block",), ("sag_start", "sag_end")),
    "both": (
        ("rescale", "rescale_mode"), ("hires_pass", "hires_own_scales"), ("hires_sag_scale", "hires_pag_scale"),
    ),
}


def build_panel(elem_id: Callable[[str], str], *, switch: Switch | None) -> list[Any]:
    """The controls inside one accordion, in the positional order of ``PARAMETERS``.

    ``elem_id`` makes an element's id from a parameter's name. ``switch`` makes the two features' checkboxes where
    there is such a component; without it they are plain checkboxes.
    """
    made: dict[str, Any] = {}

    def rows(feature: Feature) -> None:
        for names in _ROWS[feature]:
            with gr.Row():
                for name in names:
                    made[name] = _control(PARAMETERS[name], elem_id(name))

    with gr.Accordion(TITLE, open=False, elem_id=elem_id("panel")):
        presets = PresetControls(elem_id)
        for feature in ("pag", "sag"):
            parameter = PARAMETERS[f"{feature}_enabled"]
            if switch is None:
                made[parameter.name] = _control(parameter, elem_id(parameter.name))
                with gr.Group():
                    rows(feature)
            else:
                with switch(False, label=parameter.label, elem_id=elem_id(parameter.name)) as component:
                    gr.Markdown(parameter.help, elem_classes="sag-pag-help")
                    rows(feature)
                made[parameter.name] = component
        with gr.Accordion("Both: contrast and hires. fix", open=False, elem_id=elem_id("both")):
            rows("both")
    presets.connect([made[name] for name in PARAMETERS])
    return [made[name] for name in PARAMETERS]


def _control(parameter: Parameter, elem_id: str) -> Any:
    common = {"label": parameter.label, "value": parameter.default, "info": parameter.help, "elem_id": elem_id}
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.kind == "float":
        return gr.Slider(minimum=parameter.minimum, maximum=parameter.maximum, step=parameter.step, **common)
    if parameter.kind == "choice":
        return gr.Radio(choices=list(parameter.choices), **common)
    return gr.Textbox(max_lines=1, **common)
