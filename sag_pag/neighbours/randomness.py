"""Torch's random state, so that a call of ours draws what the host's call drew and leaves no trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sag_pag.engine.calls import Watch


class RandomState:
    """The state of torch's default generator on the CPU and on every device in use, as it is now."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(module, module.get_rng_state_all()) for module in (torch.cuda, _xpu()) if _in_use(module)]
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Puts everything back to what it was."""
        torch.set_rng_state(self._cpu)
        for module, states in self._devices:
            module.set_rng_state_all(states)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


def _xpu() -> Any:
    return getattr(torch, "xpu", None)  # older torch does not have it


def _in_use(module: Any) -> bool:
    return module is not None and bool(module.is_initialized())


class SameRandomness(Watch):
    """Calls of ours draw what the host's call drew: ControlNet's reference modes add noise in every call, and it must
    not be part of the guidance. The host's next call draws what it draws without us.
    """

    @contextmanager
    def host_call(self) -> Iterator[None]:
        """Remembers the state before the host's call."""
        self._before = RandomState()
        yield

    @contextmanager
    def own_call(self, rows: Sequence[int], *, same_picture: bool) -> Iterator[None]:
        """Runs from that state on; afterwards the state is as it was."""
        now = RandomState()
        self._before.restore()
        try:
            yield
        finally:
            now.restore()
