"""How our calls are made beside extensions that are in the model too. One file a strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sag_pag.engine.blocks import Topology
from sag_pag.engine.calls import APART, JOINED, Manner, moves_nothing
from sag_pag.engine.patching import Hook
from sag_pag.neighbours.unknown import REPEATED, Layers


class Neighbours:
    """Who else is in a model. What a run can find out once is found out when this is made."""

    def __init__(self, topology: Topology) -> None:
        self._layers = Layers(topology)

    def manner(self, *, short_of_memory: bool, moves: Callable[[Hook], bool] = moves_nothing) -> Manner:
        """How calls are made now. Cheap: extensions come and go between steps. ``moves`` as in ``Manner``."""
        if self._layers.tell_rows_apart():
            return REPEATED
        return replace(APART, moves=moves) if short_of_memory else JOINED
