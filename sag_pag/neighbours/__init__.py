"""How our calls are made beside extensions that are in the model too. One file a strategy.

Who is there is found out in every step, by what is changed in the model, never by what is installed. Beside somebody of
whom nothing is known the host's own rows, and no others, are run once more, unnoticed; whether that gives what the
host's call gave is tried in the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sag_pag.engine.blocks import Topology
from sag_pag.engine.calls import APART, JOINED, REPEATED, Manner, Trust, moves_nothing
from sag_pag.engine.patching import Hook
from sag_pag.neighbours.animatediff import animatediff
from sag_pag.neighbours.controlnet import controlnet, is_left_of_controlnet
from sag_pag.neighbours.hypertile import is_of_hypertile
from sag_pag.neighbours.scene import Scene
from sag_pag.neighbours.state import State
from sag_pag.neighbours.tiled_diffusion import is_of_tiled_diffusion, tiled_diffusion
from sag_pag.neighbours.token_merging import is_of_token_merging
from sag_pag.neighbours.unknown import Change, Modules
from sag_pag.settings import Switchable

Strategy = Callable[[Scene], Manner | None]
STRATEGIES: tuple[Strategy, ...] = (animatediff, tiled_diffusion, controlnet)
"""In this order each is asked how calls are made; one whose neighbour is not there says nothing."""


def takes_any_rows(change: Change) -> bool:
    """Whether it is by somebody of whom is known that no row of a call is to them unlike another."""
    known = (is_of_hypertile, is_of_token_merging, is_left_of_controlnet, is_of_tiled_diffusion)
    return any(is_theirs(change) for is_theirs in known)


class Neighbours:
    """Who else is in a model. What a run can find out once is found out when this is made."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._modules = Modules(topology)
        self._trust = Trust()
        self._names: list[str] = []

    def manner(
        self, *, short_of_memory: bool, moves: Callable[[Hook], bool] = moves_nothing, denoise: Any = None,
        path: Sequence[Any] = (), size: tuple[int, int] = (0, 0), acting: Sequence[Switchable] = (),
    ) -> Manner:
        """How calls are made now: extensions come and go between steps. Arguments as in ``Manner`` and ``Scene``;
        ``path`` are the objects that ``denoise`` goes through on its way to the network.

        Raises ``BesideError`` where a feature can't be had beside a neighbour.
        """
        def look() -> Any:
            return self._modules.found(moves, (denoise, *path))

        found = look()
        scene = Scene(
            topology=self._topology, found=found.without(takes_any_rows), look=look, trust=self._trust,
            short_of_memory=short_of_memory, moves=moves, denoise=denoise, size=size, acting=acting,
        )
        self._names = scene.found.names()
        for strategy in STRATEGIES:
            manner = strategy(scene)
            if manner is not None:
                return manner
        if scene.found.anybody:
            if self._trust.reproduces is None and not State(scene.found.roots()).complete:
                self._trust.reproduces, self._trust.because = False, "it keeps more than can be put back"
            return replace(REPEATED, watch=scene.watch, trust=self._trust)
        if short_of_memory:
            return replace(APART, watch=scene.watch, moves=moves)
        # PAG alone rides in the host's call: there is none of ours to go unnoticed, and nothing to look for
        return replace(JOINED, watch=scene.watch) if "sag" in acting else JOINED

    def blame(self, failure: str) -> str:
        """Why a step could not be guided, with the names of those who are there."""
        return f"beside {', '.join(self._names) or 'another extension'}: {failure}"
