"""Token merging (tomesd), which comes with the WebUI: self-attention gets fewer tokens, alike ones of a row as one.

A row's tokens are merged by themselves, so that any rows will do, as long as it draws no random numbers: an odd number
of rows keeps it from drawing.
"""

from __future__ import annotations

from sag_pag.neighbours.unknown import Change, written_in

NAME = "token merging"


def is_of_token_merging(change: Change) -> bool:
    """Whether it is the hook that tells token merging the picture's size."""
    arguments = getattr(change.module, "_tome_info", {}).get("args", {})
    return written_in(change.function).split(".")[0] == "tomesd" and not arguments.get("use_rand", True)
