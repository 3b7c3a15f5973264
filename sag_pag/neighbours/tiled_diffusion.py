"""Tiled Diffusion (multidiffusion-upscaler): the denoiser's rows are cut into tiles, several of which make one call.

PAG works on each tile as it would on a picture: an attention map is the tile's own, as the host's is. SAG needs the map
of the whole picture, which nobody computes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sag_pag.engine.calls import JOINED, Manner
from sag_pag.neighbours.scene import BesideError, Scene

NAME = "Tiled Diffusion"
_METHODS = {"MultiDiffusion", "MixtureOfDiffusers"}


def tiled_diffusion(scene: Scene) -> Manner | None:
    """Extra rows in each tile's call. Raises ``BesideError`` for SAG, for regions, and beside others in the U-Net."""
    method = _method(scene.denoise)
    if method is None or (method.h, method.w) != scene.size:
        return None  # a picture of another size is not tiled
    if "sag" in scene.acting:
        raise BesideError(NAME, "sag", way_out="switch SAG off, or Tiled Diffusion; PAG works in tiles")
    if getattr(method, "custom_bboxes", ()):
        raise BesideError(NAME, "pag", way_out="switch its region prompt control off")
    if scene.found.anybody:
        others = ", ".join(scene.found.names())
        raise BesideError(f"{NAME} and {others}", "pag", way_out="switch one of the two off")
    return replace(JOINED, stacked=True, watch=scene.watch)


def _method(denoise: Any) -> Any:
    """The object that cuts into tiles: it stands in for the denoiser, or for the model that the denoiser calls."""
    denoiser = getattr(denoise, "__self__", None)
    replaced = getattr(getattr(denoiser, "inner_model", None), "__dict__", {}).get("apply_model")
    methods = (denoiser, getattr(replaced, "__self__", None))
    return next((method for method in methods if type(method).__name__ in _METHODS), None)
