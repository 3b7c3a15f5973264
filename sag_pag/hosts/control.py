"""ControlNet in the forks: what it gives is worked out before a step's model call, and used up by the U-Net."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sag_pag.hosts.options import CallRows


def copied_lists(control: Any) -> Any:
    """What ControlNet gave, once more for another call: the U-Net takes items out of the lists."""
    return {part: list(given) for part, given in control.items()} if isinstance(control, Mapping) else control


def control_of(control: Any, x: Tensor, sigma: Tensor, c: dict[str, Any], rows: CallRows) -> Any:
    """What ControlNet gives for another picture ``x``, with ``c`` as the host hands it over for a call of ``rows``.

    ``control`` is the last of a chain of units. In some forks they are told the options beforehand, in others with the
    call. What they were told of the host's call they are told again afterwards.
    """
    options, chunks = c["transformer_options"], len(rows.chunks)
    if "transformer_options" in inspect.signature(control.get_control).parameters:
        return control.get_control(x, sigma, dict(c), chunks, options)
    units = []
    unit = control
    while unit is not None:
        units.append((unit, getattr(unit, "transformer_options", None)))
        unit.transformer_options = options
        unit = unit.previous_controlnet
    try:
        return control.get_control(x, sigma, dict(c), chunks)
    finally:
        for unit, told in units:
            unit.transformer_options = told
