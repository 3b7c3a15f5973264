"""The host's globals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

opts: Any = SimpleNamespace(
    batch_cond_uncond=True, skip_early_cond=0.0, s_min_uncond_all=True, infotext_skip_pasting=[],
)
state: Any = SimpleNamespace(interrupted=False, sampling_step=0, sampling_steps=0)
sd_model: Any = None
loaded_hypernetworks: list[Any] = []
