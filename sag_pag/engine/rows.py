"""What the rows of a denoiser call are, and taking rows out of whatever a host hands over by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Role = Literal["cond", "uncond", "other"]
"""``other`` is a row that guidance does not touch (InstructPix2Pix has a third group)."""


@dataclass(frozen=True)
class Row:
    """One row of a step: whose prediction it is.

    A conditional row is of the sub-prompt number ``prompt`` of its image and enters CFG with ``weight`` (several with
    ``AND``).
    """

    role: Role
    image: int
    prompt: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class StepRows:
    """All rows that the calls of one step carry together, in the host's order.

    Every conditional row is predicted in every step; the unconditional ones may be left out, all of them at once.
    """

    rows: tuple[Row, ...]

    @classmethod
    def plain(cls, images: int) -> StepRows:
        """One prompt for each of ``images``, then the unconditional rows."""
        return cls((
            *(Row("cond", image) for image in range(images)), *(Row("uncond", image) for image in range(images)),
        ))

    @property
    def conds(self) -> tuple[Row, ...]:
        """The conditional rows."""
        return tuple(row for row in self.rows if row.role == "cond")

    @property
    def images(self) -> int:
        """The number of pictures."""
        return 1 + max(row.image for row in self.rows)

    def first_conds(self) -> list[Row]:
        """For each image its first conditional row: hosts put these where unconditional ones are left out."""
        found: dict[int, Row] = {}
        for row in self.conds:
            if row.image not in found or row.prompt < found[row.image].prompt:
                found[row.image] = row
        return [found[image] for image in range(self.images)]


def rows_in(x: Tensor, announced: StepRows) -> StepRows:
    """``announced`` in the order in which ``x`` holds them: an extension may have sorted the conditional rows anew.

    ``x`` are the latents of all rows. A conditional row's is its image's, as the unconditional row's is; which
    sub-prompts of an image come first stays. Where the latents tell no order the announced one is given.
    """
    rows = announced.rows
    of_image = {row.image: index for index, row in enumerate(rows) if row.role == "uncond"}
    places = [index for index, row in enumerate(rows) if row.role == "cond" and row.image in of_image]
    if len(of_image) < 2 or len(x) != len(rows):
        return announced
    if torch.equal(x[places], x[[of_image[rows[place].image] for place in places]]):
        return announced
    waiting = {image: [row for row in announced.conds if row.image == image] for image in of_image}
    found = list(rows)
    for place in places:
        images = [image for image, index in of_image.items() if torch.equal(x[place], x[index])]
        if len(images) != 1 or not waiting[images[0]]:
            return announced
        found[place] = waiting[images[0]].pop(0)
    return StepRows(tuple(found))


@runtime_checkable
class ByRow(Protocol):
    """A value that knows itself what it is for some of its rows."""

    def take_rows(self, rows: Sequence[int], *, total: int) -> Any:
        """What it is in a call that carries only ``rows`` of its ``total`` ones."""


def take_rows(value: Any, rows: Sequence[int], *, total: int) -> Any:
    """``value`` with each batch of ``total`` rows in it cut down to ``rows``, in that order; one may come twice.

    Looks into lists, tuples and dicts; what is no batch of that size stays as it is.
    """
    if isinstance(value, Tensor):
        return _rows_of(value, rows) if value.ndim and value.shape[0] == total else value
    if isinstance(value, ByRow):
        return value.take_rows(rows, total=total)
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(item, rows, total=total) for item in value)
    if isinstance(value, dict):
        return {key: take_rows(item, rows, total=total) for key, item in value.items()}
    return value


def _rows_of(value: Tensor, rows: Sequence[int]) -> Tensor:
    """A view where the rows follow each other, else a copy."""
    first = rows[0] if rows else 0
    if all(row == first + offset for offset, row in enumerate(rows)):
        return value[first : first + len(rows)]
    return value[list(rows)]


def copied(value: Any) -> Any:
    """``value`` with tensors of its own; looks into lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


def join_rows(first: Any, second: Any) -> Any:
    """Two results of the same form as one, the rows of the second behind those of the first."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, (list, tuple)):
        return type(first)(join_rows(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return {key: join_rows(value, second[key]) for key, value in first.items()}
    return first


def replace_rows(value: Any, rows: Sequence[int], others: Any) -> Any:
    """A copy of ``value`` in which ``rows`` are those of ``others``, a result of the same form."""
    if isinstance(value, Tensor):
        replaced = value.clone()
        replaced[list(rows)] = others
        return replaced
    if isinstance(value, (list, tuple)):
        return type(value)(replace_rows(a, rows, b) for a, b in zip(value, others, strict=True))
    return value


def count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The rows of a module's call: those of its first tensor."""
    return next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)


def stacked_rows(rows: Sequence[int], *, of: int, copies: int) -> list[int]:
    """Where ``rows`` of a call with ``of`` rows are when it is stacked ``copies`` times."""
    return [copy * of + row for copy in range(copies) for row in rows]
