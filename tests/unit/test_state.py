"""What others keep goes back to what it was, wherever their functions can reach it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sag_pag.neighbours.state import State

COUNT = 0
DRAW = random.Random(1)


class Keeper:
    """Another extension's object."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []
        self.by_name: dict[str, Any] = {}
        self.inner: Any = None
        self.cache: Any = None

    def count(self) -> None:
        global COUNT
        COUNT += 1
        self.calls += 1
        self.seen.append(self.calls)
        self.by_name[str(self.calls)] = torch.ones(1)
        self.cache = torch.ones(2)
        self.new = True
        if self.inner is not None:
            self.inner.count()


def kept(keeper: Keeper) -> tuple[Any, ...]:
    return COUNT, keeper.calls, list(keeper.seen), list(keeper.by_name), keeper.cache, hasattr(keeper, "new")


def capturing(keeper: Keeper) -> Callable[[], None]:
    return lambda: keeper.count()


@pytest.mark.parametrize("root", [
    lambda keeper: keeper.count, capturing, lambda keeper: functools.partial(capturing(keeper)),
    lambda keeper: functools.wraps(capturing(keeper))(lambda: keeper.count()),
    lambda keeper: keeper,
], ids=["method", "captured", "partial", "wrapped", "object"])
def test_counters_and_collections(root: Callable[[Keeper], Any]) -> None:
    keeper = Keeper()
    keeper.inner = Keeper()
    keeper.count()
    vars(keeper).pop("new")
    reached, before, inside = root(keeper), kept(keeper), kept(keeper.inner)
    state = State([reached])
    keeper.count()
    assert kept(keeper) != before
    state.restore()
    assert kept(keeper)[1:] == before[1:]
    assert kept(keeper.inner)[1:] == inside[1:]


def test_a_modules_own_names() -> None:
    state, before = State([capturing(Keeper())]), COUNT
    Keeper().count()
    state.restore()
    assert before == COUNT


def test_a_number_that_is_captured_itself() -> None:
    calls = 0

    def forward() -> int:
        nonlocal calls
        calls += 1
        return calls

    state = State([forward])
    forward()
    state.restore()
    assert forward() == 1


@pytest.mark.parametrize("generator", [
    random.Random(3), np.random.RandomState(3), np.random.default_rng(3), torch.Generator().manual_seed(3),
], ids=lambda generator: type(generator).__name__)
def test_generators(generator: Any) -> None:
    def draw() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand(1, generator=generator))
        return float(generator.random() if not isinstance(generator, np.random.RandomState) else generator.rand())

    state = State([draw])
    first = draw()
    state.restore()
    assert draw() == first


def test_what_is_on_a_module_of_the_model() -> None:
    """Before a call of ours its counters go back; what says what was done to its weights does not, until after."""
    module = nn.Linear(2, 2)
    module.calls, module.done = 1, ("before",)
    state = State([module])
    module.calls, module.done, module.noted, module.backup = 2, ("changed",), 3, torch.ones(1)
    state.restore(references=False)
    assert module.calls == 1
    assert module.done == ("changed",)
    assert not hasattr(module, "noted")
    assert hasattr(module, "backup")
    state.restore()
    assert module.done == ("before",)
    assert not hasattr(module, "backup")


def test_the_hosts_and_the_libraries_own_objects_are_left_alone() -> None:
    host = type("Options", (), {"__module__": "modules.options"})()
    host.count = 1

    def forward() -> Any:
        return host

    state = State([forward])
    host.count = 2
    state.restore()
    assert host.count == 2
