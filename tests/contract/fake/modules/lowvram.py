"""Whether the model is moved piece by piece."""

from __future__ import annotations

from typing import Any


def is_enabled(sd_model: Any) -> bool:
    return bool(sd_model.lowvram)
