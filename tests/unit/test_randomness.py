"""Torch's random state around calls of ours, on every device that has one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sag_pag.neighbours.invisible import Invisible
from sag_pag.neighbours.randomness import RandomState


class Device:
    """A device's module of torch: CUDA and XPU have several generators, MPS has one."""

    def __init__(self, *, used: bool = True) -> None:
        self.states = [torch.tensor([1]), torch.tensor([2])]
        self.used = used

    def is_initialized(self) -> bool:
        return self.used

    def is_available(self) -> bool:
        return self.used

    def get_rng_state_all(self) -> list[Tensor]:
        assert self.used, "a device that is not in use must not be started"
        return [state.clone() for state in self.states]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        self.states = [state.clone() for state in states]

    def get_rng_state(self) -> Tensor:
        assert self.used
        return self.states[0].clone()

    def set_rng_state(self, state: Tensor) -> None:
        self.states[0] = state.clone()

    def draw(self) -> int:
        self.states = [state + 10 for state in self.states]
        return int(self.states[0])


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_every_device_goes_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    devices = {other: Device(used=other == name) for other in ("cuda", "xpu", "mps")}
    for other, device in devices.items():
        monkeypatch.setattr(torch, other, device)
    monkeypatch.setattr(torch.backends, "mps", devices["mps"])
    state = RandomState()
    first = devices[name].draw()
    state.restore()
    assert devices[name].draw() == first


def test_pythons_and_numpys_own_generators() -> None:
    state = RandomState()
    first = random.random(), np.random.rand()
    state.restore()
    assert (random.random(), np.random.rand()) == first


def test_older_torch_without_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "xpu")
    RandomState().restore()


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_of_ours_leaves_no_trace(fails: bool) -> None:
    """It draws what the host's call drew, and the host's next call draws what it draws without us."""
    torch.manual_seed(1)
    expected = torch.randn(3), torch.randn(3)
    torch.manual_seed(1)
    watch = Invisible()
    with watch.host_call(total=2, again=()):
        drawn = torch.randn(3)

    def own_call() -> Any:
        with watch.own_call(range(2), same_picture=False):
            again = torch.randn(3)
            torch.randn(100)
            if fails:
                raise MemoryError
            return again

    if fails:
        with pytest.raises(MemoryError):
            own_call()
    else:
        assert torch.equal(own_call(), drawn)
    assert torch.equal(drawn, expected[0])
    assert torch.equal(torch.randn(3), expected[1])
