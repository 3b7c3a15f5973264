"""Calls of ours that nobody notices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sag_pag.engine.calls import Watch
from sag_pag.neighbours.randomness import RandomState
from sag_pag.neighbours.state import State


class Moment:
    """Random states and what ``roots`` can reach, as they are now."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self._random = RandomState()
        self._state = State(roots)

    def return_to(self, *, references: bool = True) -> None:
        """Makes it be that moment again; ``references`` as for a ``State``."""
        self._state.restore(references=references)
        self._random.restore()


class Invisible(Watch):
    """A call of ours finds everything as the host's call found it: it draws the same random numbers, counts as the
    same call, and makes anew what the host's call made once for all. It leaves everything as the host's call left it.

    ``roots`` gives the functions that other extensions have in the model.
    """

    def __init__(self, roots: Callable[[], Iterable[Any]] = tuple) -> None:
        self._roots = roots

    @contextmanager
    def host_call(self, *, total: int, again: Sequence[int]) -> Iterator[None]:
        """Remembers the moment before the host's call."""
        self._before = Moment(self._roots())
        yield

    @contextmanager
    def own_call(self, rows: Sequence[int], *, same_picture: bool) -> Iterator[None]:
        """Runs from that moment on; afterwards it is now again."""
        now = Moment(self._roots())
        self._before.return_to(references=False)
        try:
            yield
        finally:
            now.return_to()

    def passed(self) -> Any:
        """What the host's call has moved up to here."""
        return Moment(self._roots())

    def skip_to(self, passed: Any) -> None:
        """A call of ours that has left something out is at that point too."""
        passed.return_to(references=False)
