"""What keeps the tested extension's own calls unnoticed. Each can be taken away: where it is for a neighbour, a picture
beside that one must then go wrong, and so must one beside the neighbour's double.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mechanism:
    """The ``method`` of a class that does it, and what to put in its place."""

    module: str
    owner: str
    method: str
    replacement: Callable[..., Any]


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _nobody(*_: Any) -> Iterator[Any]:
    return iter(())


@contextmanager
def _not_encoded_again(watch: Any, rows: Sequence[int], *, same_picture: bool) -> Iterator[None]:
    with watch._unnoticed.own_call(rows, same_picture=same_picture):
        yield


MECHANISMS = {  # putting back what others keep, what ControlNet has encoded, and looking who is there
    "state": Mechanism("sag_pag.neighbours.state", "State", "restore", _nothing),
    "encoding": Mechanism("sag_pag.neighbours.controlnet", "EncodedAgain", "own_call", _not_encoded_again),
    "looking": Mechanism("sag_pag.neighbours.unknown", "Modules", "_changes", _nobody),
}
