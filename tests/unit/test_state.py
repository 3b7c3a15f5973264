"""What others keep goes back to what it was, wherever their functions can reach it."""

from __future__ import annotations

import builtins
import functools
import random
import sys
import types
from collections import OrderedDict, deque
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
    assert kept(keeper) == before
    assert kept(keeper.inner) == inside


THEIRS = """
import other_state
from types import SimpleNamespace
cache = None
count = 0
names = SimpleNamespace(calls=0)
unused = 0

class Count:
    calls = 0

class Slots:
    __slots__ = ("calls", "new")
    def __init__(self):
        self.calls = 0

slots = Slots()
keep = [].append

def forward():
    global cache, late, count
    cache = [1] if cache is None else [*cache, 1]
    late = True
    count += 1
    Count.calls += 1
    Count.new = 1
    names.calls += 1
    slots.calls += 1
    slots.new = 1
    other_state.calls += 1
    keep(1)

def seen():
    return (cache, "late" in globals(), count, Count.calls, hasattr(Count, "new"), names.calls, slots.calls,
            hasattr(slots, "new"), other_state.calls, keep.__self__[:])
"""


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another extension's module, which uses another one of its own."""
    made = {}
    for name, text in (("other_state", "calls = 0"), ("their_extension", THEIRS)):
        made[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made[name])
        exec(text, vars(made[name]))
    return made["their_extension"]


def test_what_code_of_another_extension_uses_by_name(theirs: Any) -> None:
    """Names bound anew or for the first time, a class's attributes, another module's, slots, what a method is of."""
    first = theirs.seen()
    before = State([theirs.forward])
    theirs.forward()
    second = theirs.seen()
    assert not any(a == b for a, b in zip(first, second, strict=True))
    after = State([theirs.forward])
    before.restore()
    assert theirs.seen() == first
    theirs.forward()
    theirs.forward()
    after.restore()
    assert theirs.seen() == second


def test_other_names_of_its_module_are_left_alone(theirs: Any) -> None:
    """Its interface may work in another thread meanwhile; nothing is done to Python's own names."""
    before, ours = State([theirs.forward]), dict(vars(builtins))
    theirs.unused, theirs.seen.noted = 1, True
    theirs.Count.later = lambda self: 1
    vars(builtins)["added"] = 1
    try:
        before.restore()
        assert theirs.unused == 1
        assert hasattr(theirs.Count, "later")
        assert vars(builtins).keys() - ours.keys() == {"added"}
    finally:
        del vars(builtins)["added"]


class Frozen(dict[str, int]):
    """Its own class lets nobody write."""

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError

    __setitem__ = clear = update  # type: ignore[assignment]


def test_collections_of_every_kind() -> None:
    ordered, frozen = OrderedDict(a=1, b=2), Frozen(a=1)
    queue, members, plain = deque([1, 2], maxlen=2), {1, 2}, [1, 2]
    state = State([[ordered, frozen, queue, members, plain]])
    ordered.move_to_end("a")
    dict.__setitem__(frozen, "b", 2)
    queue.append(3)
    members.add(3)
    plain.pop()
    state.restore()
    assert (list(ordered), frozen, list(queue), members, plain) == (["a", "b"], {"a": 1}, [1, 2], {1, 2}, [1, 2])
    assert queue.maxlen == 2


@pytest.mark.parametrize("collection", [[1, 2], {1: 2, 2: 3}, {1, 2}, deque([1, 2])], ids=lambda c: type(c).__name__)
def test_who_goes_through_a_collection_meanwhile_is_not_disturbed(collection: Any) -> None:
    state, seen = State([[collection]]), []
    for item in collection:
        state.restore()
        seen.append(item)
    assert seen == [1, 2]


class Lazy:
    """Loads what it stands for when it is asked what it is."""

    @property
    def __class__(self) -> Any:
        raise AssertionError

    def __getattr__(self, name: str) -> Any:
        raise AssertionError


def test_what_can_not_be_put_back_does_no_harm() -> None:
    keeper = Keeper()
    keeper.by_name = {"system": random.SystemRandom(), "lazy": Lazy()}
    State([keeper]).restore()


def test_it_says_if_there_was_too_much_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper()
    keeper.by_name = {str(number): [[]] for number in range(50)}
    assert State([keeper]).complete
    monkeypatch.setattr("sag_pag.neighbours.state._MOST", 50)
    assert not State([keeper]).complete


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
    module.calls, module._own, module.done, module.cache = 1, 1, ("before",), None
    state = State([module])
    module.calls, module._own, module.done, module.noted, module.backup = 2, 2, ("changed",), 3, torch.ones(1)
    module.cache = [1]
    state.restore(references=False)
    assert (module.calls, module._own) == (1, 1)
    assert (module.done, module.cache) == (("changed",), [1])
    assert not hasattr(module, "noted")
    assert hasattr(module, "backup")
    state.restore()
    assert (module.done, module.cache) == (("before",), None)
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
