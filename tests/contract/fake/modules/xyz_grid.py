"""The X/Y/Z plot: axes that change copies of a generation. Loaded as a script file."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import gradio as gr
import numpy as np

from modules import errors, processing, scripts


class AxisOption:
    def __init__(
        self, label: str, type: Callable[[Any], Any], apply: Callable[..., None],
        format_value: Any = None, confirm: Any = None, cost: float = 0.0, choices: Any = None, prepare: Any = None,
    ) -> None:
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


axis_options = [
    AxisOption("Nothing", str, lambda p, x, xs: None),
    AxisOption("Seed", int, lambda p, x, xs: setattr(p, "seed", x)),
    AxisOption("Checkpoint name", str, lambda p, x, xs: setattr(p, "checkpoint", p.checkpoints[x])),
]


class Script(scripts.Script):
    def title(self) -> str:
        return "X/Y/Z plot"

    def ui(self, is_img2img: bool) -> list[Any]:
        self.current_axis_options = list(axis_options)
        return [gr.Dropdown(value=value) for value in (0, "", []) * 3]

    def _computed(self, option: AxisOption, text: str) -> list[Any]:
        """The values of a range with steps, one of which may be beyond its end."""
        if option.type is not float or "(" not in text:
            return [text]
        ends, step = text.rstrip(")").split("(")
        start, end = ends.split("-")
        return list(np.arange(float(start), float(end) + float(step), float(step)).tolist())

    def run(self, p: Any, axes: dict[str, list[Any]]) -> list[processing.Processed]:
        """One result a cell, the first axis outermost; a cell that failed is empty."""
        options = {option.label: option for option in self.current_axis_options}
        p, args = copy(p), list(p.script_args)
        args[self.args_from : self.args_from + 3 * len(axes) : 3] = [list(options).index(label) for label in axes]
        args[self.args_from + 1 : self.args_from + 3 * len(axes) : 3] = [", ".join(texts) for texts in axes.values()]
        p.script_args = type(p.script_args)(args)
        chosen = []
        for label, texts in axes.items():
            option = options[label]
            values = [option.type(value) for text in texts for value in self._computed(option, text)]
            if option.confirm:
                option.confirm(p, values)
            chosen.append((option, values))
        cells: list[list[tuple[AxisOption, Any, list[Any]]]] = [[]]
        for option, values in chosen:
            cells = [[*cell, (option, value, values)] for cell in cells for value in values]
        results = []
        for cell in cells:
            pc = copy(p)
            for option, value, values in cell:
                option.apply(pc, value, values)
            try:
                results.append(processing.process_images(pc))
            except Exception as error:  # noqa: BLE001 - as the host does
                errors.report(error)
                results.append(processing.Processed([], []))
        return results
