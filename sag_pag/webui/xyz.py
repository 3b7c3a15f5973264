"""X/Y/Z plot axes, one for every parameter. An axis edits the script's own arguments of the cell's generation."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from modules import scripts

from sag_pag import hosts
from sag_pag.engine.blocks import Topology
from sag_pag.engine.plan import check_blocks
from sag_pag.hosts.interface import UnguidableModelError
from sag_pag.settings import PARAMETERS, Parameter, SettingError, Settings, Value, implied_by
from sag_pag.webui import texts
from sag_pag.webui.refused import RefusedError, told_to_the_page
from sag_pag.webui.texts import axis_label

_PLOTTED = "sag_pag_plotted"
"""Attribute of a cell's processing object: the parameters that its axes have set so far."""

_NUMBER = r"([+-]?\d+(?:\.\d*)?)"
_RANGE = re.compile(rf"{_NUMBER}\s*-\s*{_NUMBER}\s*\(\s*{_NUMBER}\s*\)")
"""What the plot computes with steps: start, end, step. It goes on until a step is beyond the end."""


def register_axes() -> None:
    """Adds the axes to the X/Y/Z plot, once however often the UI is made."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ not in ("xyz_grid.py", "scripts.xyz_grid"):
            continue
        known = {option.label for option in data.module.axis_options}
        for parameter in PARAMETERS.values():
            if axis_label(parameter) not in known:
                data.module.axis_options.append(_axis(data.module, parameter))


def _axis(module: Any, parameter: Parameter) -> Any:
    choices = {"bool": ("True", "False"), "choice": parameter.choices}.get(parameter.kind)
    return module.AxisOption(
        axis_label(parameter), {"float": float, "int": int}.get(parameter.kind, str), partial(_apply, parameter),
        confirm=partial(_confirm, parameter), choices=None if choices is None else lambda: list(choices),
    )


def _confirm(parameter: Parameter, p: Any, cells: list[Any]) -> None:
    """Refuses a bad value, in a cell or in the script's other arguments, before the first picture is made.

    Cells that nobody has asked for are taken out of the plot's list.
    """
    script = _script(p)
    axes = _axes(p)
    plotted = {axis for axis, _ in axes}
    written = ",".join(text for axis, text in axes if axis == axis_label(parameter))
    cells[:] = [cell for cell in cells if not _beyond_its_range(parameter, cell, written)]
    topology = None if "Checkpoint name" in plotted else _topology(p)
    others = {f"{parameter.name[:4]}start", f"{parameter.name[:4]}end"} - {parameter.name}
    both_ends = any(axis_label(PARAMETERS[name]) in plotted for name in others & PARAMETERS.keys())
    try:
        settings = Settings.from_list(p.script_args[script.args_from : script.args_to])
        for cell in cells:
            value = _value(parameter, cell)
            changed = settings.with_values({**implied_by([parameter.name]), parameter.name: value})
            if not both_ends:
                changed.check_order()
            check_blocks(changed, topology)
    except SettingError as error:
        with told_to_the_page(hosts.current()):
            raise RefusedError(error) from error


def _axes(p: Any) -> list[tuple[str, str]]:
    """The axes of the plot that ``p`` is for: label, and the values as they were written."""
    plot = next(script for script in p.scripts.scripts if script.title().lower() == "x/y/z plot")  # Classic: "Plot"
    args = p.script_args[plot.args_from : plot.args_to]
    kinds, texts_written = args[0:9:3], args[1:9:3]  # each axis has three controls: kind, values, values to choose
    return [
        (plot.current_axis_options[kind or 0].label, str(text or ""))
        for kind, text in zip(kinds, texts_written, strict=True)
    ]


def _beyond_its_range(parameter: Parameter, cell: Any, written: str) -> bool:
    """Whether a cell can't be used and is a step beyond the end of a range that can.

    The plot makes 0.5, …, 1 and 1.0999999999999999 of "0.5-1 (+0.1)".
    """
    if not parameter.is_number or parameter.minimum <= round(cell, 9) <= parameter.maximum:
        return False
    for item in written.split(","):
        if (found := _RANGE.fullmatch(item.strip())) is not None:
            start, end, step = (float(number) for number in found.groups())
            usable = all(parameter.minimum <= number <= parameter.maximum for number in (start, end))
            if usable and 0 < (cell - end) / step <= 1 + 1e-9:
                return True
    return False


def _topology(p: Any) -> Topology | None:
    """The model that the plot's pictures will be made with, if it is loaded already and can be guided."""
    if "sd_model_checkpoint" in p.override_settings:
        return None
    try:
        return hosts.current().topology()
    except UnguidableModelError:
        return None


def _script(p: Any) -> Any:
    return next(script for script in p.scripts.alwayson_scripts if script.title() == texts.PANEL)


def _value(parameter: Parameter, cell: Any) -> Value:
    """The value that a cell stands for. The plot computes the numbers of a range: 1.0000000000000002 is 1."""
    return parameter.parse(cell) if isinstance(cell, str) else parameter.check(round(cell, 9))


def _apply(parameter: Parameter, p: Any, cell: Any, _cells: list[Any]) -> None:
    """Sets the parameter, and switches on what it needs, in the arguments of this cell's generation.

    A switch that has an axis of its own is left to that axis, whichever of the two the plot applies first.
    """
    script = _script(p)
    before, own, after = (
        p.script_args[: script.args_from], p.script_args[script.args_from : script.args_to],
        p.script_args[script.args_to :],
    )
    plotted: tuple[str, ...] = getattr(p, _PLOTTED, ())
    implied = {switch: on for switch, on in implied_by([parameter.name]).items() if switch not in plotted}
    setattr(p, _PLOTTED, (*plotted, parameter.name))
    changed = Settings.from_list(own).with_values({**implied, parameter.name: _value(parameter, cell)})
    p.script_args = type(p.script_args)((*before, *changed.values(), *after))
