"""Where exceptions go that the host prints and forgets."""

from __future__ import annotations

swallowed: list[Exception] = []


def report(error: Exception) -> None:
    swallowed.append(error)
