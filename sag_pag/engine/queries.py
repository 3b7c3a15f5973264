"""Perturbing the queries of some rows of a self-attention, which itself runs as it always does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sag_pag.engine.attention import MapSize, call_copies
from sag_pag.engine.patching import Forward, forward_replaced
from sag_pag.engine.rows import replace_rows, stacked_rows, take_rows
from sag_pag.guidance import MergedTokensError

Tiling = tuple[int, int]
"""How many tiles a map is cut into: one below the other, and side by side."""


def in_tiles(tokens: Tensor, size: tuple[int, int], tiling: Tiling) -> Tensor:
    """``(rows, tokens of a map of that size, channels)`` as ``(rows * tiles, tokens of a tile, channels)``."""
    (height, width), (down, across) = size, tiling
    cut = tokens.reshape(len(tokens), down, height // down, across, width // across, -1).transpose(2, 3)
    return cut.reshape(len(tokens) * down * across, -1, tokens.shape[-1])


def out_of_tiles(tiles: Tensor, size: tuple[int, int], tiling: Tiling) -> Tensor:
    """The inverse of ``in_tiles``."""
    (height, width), (down, across) = size, tiling
    parts = tiles.reshape(-1, down, across, height // down, width // across, tiles.shape[-1]).transpose(2, 3)
    return parts.reshape(-1, height * width, tiles.shape[-1])


def tiling_of(whole: Tensor, tiles: Tensor, size: tuple[int, int]) -> Tiling:
    """How the tokens of one row, ``(1, tokens, channels)``, have been cut into ``(tiles, tokens, channels)``.

    Raises ``MergedTokensError`` if they have not been cut into tiles of a map of that size.
    """
    count, (height, width) = len(tiles), size
    if tiles.shape[1] * count == whole.shape[1] == height * width:
        for down in range(1, count + 1):
            tiling = down, count // down
            if count % down or height % down or width % tiling[1]:
                continue
            if torch.equal(in_tiles(whole, size, tiling), tiles):
                return tiling
    raise MergedTokensError(f"{count} x {tiles.shape[1]} tokens are no tiles of a feature map of {height} x {width}")


@dataclass
class QueryPatch:
    """One self-attention's queries in a call of ``rows`` rows: those of ``perturbed`` become something else.

    The attention runs with all rows as it is put together now, with whatever keys and values it is given. Where its
    tokens have been cut into tiles on the way (HyperTile), the queries are perturbed on the whole map, whose size
    ``map_size`` knows, and cut again. ``stacked``, ``read`` and ``applied`` as for ``AttentionPatch``.
    """

    rows: int
    attention: nn.Module
    map_size: MapSize
    perturb: Callable[[Tensor], Tensor]
    perturbed: Sequence[int]
    stacked: bool = False
    read: Callable[[Tensor], None] | None = None
    applied: bool = field(default=False, init=False)

    def wrap(self, host: Forward) -> Forward:
        """The replacement for ``host``, the attention's present forward."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            copies = call_copies(len(x), of=self.rows, stacked=self.stacked)
            if not copies:
                return host(x, *args, **kwargs)
            if self.read is not None:
                self.read(x)
            rows = stacked_rows(self.perturbed, of=self.rows, copies=copies)
            with forward_replaced(self.attention.get_submodule("to_q"), partial(self._queries, x, rows)):
                return host(x, *args, **kwargs)

        return forward

    def _queries(self, x: Tensor, rows: Sequence[int], host: Forward) -> Forward:
        """The replacement for the forward of ``to_q`` while the attention works on ``x``."""

        def forward(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
            query = host(tokens, *args, **kwargs)
            tiles, rest = divmod(len(tokens), len(x))
            if rest or not tiles:  # not the attention's own rows
                return query
            self.applied = True
            own = [row * tiles + tile for row in rows for tile in range(tiles)]
            part = take_rows(query, own, total=len(query))
            if tiles == 1:
                return replace_rows(query, own, self.perturb(part))
            size, first = self.map_size.known(), rows[0]
            tiling = tiling_of(x[first : first + 1], tokens[first * tiles : (first + 1) * tiles], size)
            whole = self.perturb(out_of_tiles(part, size, tiling))
            return replace_rows(query, own, in_tiles(whole, size, tiling))

        return forward
