"""Free memory by the measure of a fork."""

from __future__ import annotations

from typing import Any

FREE = [1e12]


def get_free_memory(_: Any = None) -> float:
    return FREE[0]
