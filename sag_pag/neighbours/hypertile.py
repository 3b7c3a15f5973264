"""HyperTile, which comes with the WebUI: cuts self-attention into tiles, which it draws from a generator of its own.

It works on any rows, and what it draws is put back with all else that its functions reach.
"""

from __future__ import annotations

from sag_pag.neighbours.unknown import Change, written_in

NAME = "HyperTile"


def is_of_hypertile(change: Change) -> bool:
    """Whether a self-attention's forward is HyperTile's: it is wrapped to look like the host's own."""
    return written_in(change.function).split(".")[-1] == "hypertile"
