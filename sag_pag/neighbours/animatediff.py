"""AnimateDiff: a call's rows are the frames of a clip, and layers put into the U-Net mix them.

The host's rows run once more as beside anybody. A clip longer than its context is denoised in windows of frames, a call
each; which of them a row is in changes from step to step.
"""

from __future__ import annotations

from typing import Any

from sag_pag.engine.calls import Manner
from sag_pag.neighbours.scene import BesideError, Scene

NAME = "AnimateDiff"


def animatediff(scene: Scene) -> Manner | None:
    """Raises ``BesideError`` for a clip that is denoised in windows; else it is one of whom nothing need be known."""
    function = getattr(scene.denoise, "__func__", None)
    if getattr(function, "__name__", "") != "mm_sd_forward":
        return None
    params = _captured_params(function)
    frames, window = getattr(params, "video_length", 0), getattr(params, "batch_size", 0)
    if frames > window:
        way_out = f"set its context batch size to the number of frames ({frames}) or more, or switch guidance off"
        raise BesideError(NAME, scene.acting[0] if scene.acting else "pag", way_out=way_out)
    return None


def _captured_params(function: Any) -> Any:
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return next((cell.cell_contents for name, cell in zip(names, cells, strict=True) if name == "ad_params"), None)
