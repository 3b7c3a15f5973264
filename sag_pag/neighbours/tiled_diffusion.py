"""Tiled Diffusion (multidiffusion-upscaler), and the forks' own MultiDiffusion, which was made of it: rows are cut into
tiles, several of which make one call.

PAG works on each tile as it would on a picture: an attention map is the tile's own, as the host's is. SAG needs the map
of the whole picture, which nobody computes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sag_pag.engine.calls import JOINED, Manner
from sag_pag.neighbours.scene import BesideError, Scene
from sag_pag.neighbours.unknown import Change

NAME, BUILT_IN = "Tiled Diffusion", "MultiDiffusion Integrated"
_METHODS = {"MultiDiffusion", "MixtureOfDiffusers", "SpotDiffusion"}


def tiled_diffusion(scene: Scene) -> Manner | None:
    """Extra rows in each tile's call. Raises ``BesideError`` for SAG, for regions, and beside others in the U-Net."""
    method = _method(scene.denoise)
    if method is None or not _is_tiled(method, scene.size):
        return None
    name = BUILT_IN if hasattr(method, "tile_width") else NAME
    if "sag" in scene.acting:
        raise BesideError(name, "sag", way_out=f"switch SAG off, or {name}; PAG works in tiles")
    if getattr(method, "custom_bboxes", ()):
        raise BesideError(name, "pag", way_out="switch its region prompt control off")
    if scene.found.anybody:
        others = ", ".join(scene.found.names())
        raise BesideError(f"{name} and {others}", "pag", way_out="switch one of the two off")
    return replace(JOINED, stacked=True, watch=scene.watch)


def is_of_tiled_diffusion(change: Change) -> bool:
    """Whether it is where it cuts, or would: a picture that it does not cut goes through as it is."""
    return type(getattr(change.function, "__self__", change.function)).__name__ in _METHODS


def _is_tiled(method: Any, size: tuple[int, int]) -> bool:
    """Whether a picture is cut: Tiled Diffusion cuts those of one size, the forks' own those larger than a tile."""
    if hasattr(method, "tile_width"):
        return bool(size[0] > method.tile_height or size[1] > method.tile_width)
    return bool((method.h, method.w) == size)


def _method(denoise: Any) -> Any:
    """The object that cuts into tiles: it stands in for the denoiser, or for the model that the denoiser calls; in the
    forks it is what the denoiser wraps.
    """
    denoiser = getattr(denoise, "__self__", None)
    replaced = getattr(getattr(denoiser, "inner_model", None), "__dict__", {}).get("apply_model")
    methods = (denoiser, getattr(replaced, "__self__", None), getattr(denoise, "__wrapped__", None))
    return next((method for method in methods if type(method).__name__ in _METHODS), None)
