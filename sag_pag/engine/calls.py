"""How calls of our own are made: which rows they carry, and what goes around them.

A model that nobody else works in is called with the extra rows among the host's own. Beside other extensions, or where
memory is short, calls are made in another manner; who is there says in which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from sag_pag.engine.patching import Hook


class NotRunError(RuntimeError):
    """A selected attention did not run as expected: another extension has replaced it, skips it or works in tiles."""


class Denoiser(Protocol):
    """The host's denoiser: ``x`` is ``(rows, channels, height, width)``, ``sigma`` ``(rows,)``, ``cond`` by row."""

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor: ...


def moves_nothing(_: Hook) -> bool:
    """Of a model that stays on one device."""
    return False


class Watch:
    """Goes around one denoiser call of the host's, then around each call of ours that belongs to it.

    This one does nothing; others see to it that a call of ours finds everything as the host's call found it, and
    leaves everything as the host's call left it.
    """

    @contextmanager
    def host_call(self, *, total: int, again: Sequence[int]) -> Iterator[None]:
        """Around the host's own call of ``total`` rows, of which a call of ours carries ``again`` at that picture."""
        yield

    @contextmanager
    def own_call(self, rows: Sequence[int], *, same_picture: bool) -> Iterator[None]:
        """Around a call of ours that carries ``rows`` of the host's call, at the same picture or at another one."""
        yield

    def passed(self) -> Any:
        """During the host's call: what ``skip_to`` needs to make a later call of ours go on from here."""

    def skip_to(self, passed: Any) -> None:
        """During a call of ours that has left out what the host's call did before it was ``passed``."""


@dataclass
class Trust:
    """Whether a call made once more gives what the host's call gave, beside somebody of whom that is not known.

    ``reproduces`` is ``None`` until it has been tried. ``because`` says why it does not.
    """

    reproduces: bool | None = None
    because: str = ""


@dataclass(frozen=True)
class Manner:
    """``perturbed``: the extra rows are ``joined`` to the host's call, make a call of their own with what runs before
    the first perturbed attention taken from the host's (``apart``), or the host's rows are ``repeated`` and perturbed
    there. ``degraded``: SAG's rows make a call ``apart``, or the host's rows are ``repeated`` with SAG's changed.
    ``moves`` tells of a module's forward pre-hook whether all it does is to move the module to the GPU, which one that
    only puts out what is known already does not need. ``stacked``: the model may get a call's rows several times over,
    one behind the other, once for each tile of the picture. ``trust``: the first call is made once more to see
    whether that can be done at all.
    """

    perturbed: Literal["joined", "apart", "repeated"] = "joined"
    degraded: Literal["apart", "repeated"] = "apart"
    watch: Callable[[], Watch] = Watch
    moves: Callable[[Hook], bool] = moves_nothing
    stacked: bool = False
    trust: Trust | None = None


JOINED = Manner()
"""Where nobody else is in the model and memory is not short."""
APART = Manner(perturbed="apart")
"""Where memory is short."""
REPEATED = Manner(perturbed="repeated", degraded="repeated")
"""The host's own rows and no others, in every call."""
