"""Random states that a model's call may draw from without anybody else being in the model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """The state of torch's default generator on the CPU and on every device in use, of Python's and of numpy's."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(module, module.get_rng_state_all()) for module in (torch.cuda, _xpu()) if _in_use(module)]
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def restore(self) -> None:
        """Puts everything back to what it was."""
        torch.set_rng_state(self._cpu)
        for module, states in self._devices:
            module.set_rng_state_all(states)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _xpu() -> Any:
    return getattr(torch, "xpu", None)  # older torch does not have it


def _in_use(module: Any) -> bool:
    return module is not None and bool(module.is_initialized())
