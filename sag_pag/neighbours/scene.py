"""What a strategy looks at, and what it says where guidance and a neighbour can't be had together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sag_pag.engine.blocks import Topology
from sag_pag.engine.calls import Trust, Watch, moves_nothing
from sag_pag.engine.patching import Hook
from sag_pag.neighbours.invisible import Invisible
from sag_pag.neighbours.unknown import Found
from sag_pag.settings import Switchable


class BesideError(Exception):
    """A feature can't be used beside a neighbour. Has the neighbour's name and the way out."""

    def __init__(self, neighbour: str, feature: Switchable, *, way_out: str) -> None:
        super().__init__(f"{feature.upper()} can't be used beside {neighbour} here: {way_out}")
        self.neighbour = neighbour
        self.feature = feature
        self.way_out = way_out


@dataclass(frozen=True)
class Scene:
    """A step that is about to be guided.

    ``found`` is what others have changed in the U-Net, ``look`` finds it anew; ``trust`` is the run's in what is not
    known. ``denoise`` is what will be called, with latents of ``size`` (height, width), ``acting`` are the features
    that act.
    """

    topology: Topology
    found: Found
    look: Callable[[], Found]
    trust: Trust
    short_of_memory: bool = False
    moves: Callable[[Hook], bool] = moves_nothing
    denoise: Any = None
    size: tuple[int, int] = (0, 0)
    acting: Sequence[Switchable] = ()

    def watch(self) -> Watch:
        """Sees to it that calls of ours go unnoticed by all that are here."""
        return Invisible(lambda: self.look().roots())
