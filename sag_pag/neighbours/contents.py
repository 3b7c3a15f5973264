"""What can be put back, kind by kind: collections, bindings of names, random generators.

Nothing is written that has not changed: whoever goes through a collection meanwhile is not disturbed by it.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch

Restore = Callable[[], None]

MISSING = object()
"""Stands for the value of a name that is not bound."""


class Put(Protocol):
    """Binds a name to a value, or unbinds it if that is ``MISSING``."""

    def __call__(self, name: str, value: Any) -> None: ...


def of_collection(collection: Any) -> Restore:
    """Puts the present items of a list, dict, set or deque back into it, past what its own class may forbid."""
    if isinstance(collection, dict):
        return _of_mapping(collection)
    if isinstance(collection, set):
        return _of_set(collection)
    kind: Any = deque if isinstance(collection, deque) else list
    before = list(kind.__iter__(collection))

    def restore() -> None:
        if not _same(kind.__iter__(collection), before):
            kind.clear(collection)
            kind.extend(collection, before)

    return restore


def _of_mapping(mapping: dict[Any, Any]) -> Restore:
    kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
    before = list(kind.items(mapping))

    def restore() -> None:
        now = list(kind.items(mapping))
        if not _same((key for key, _ in now), (key for key, _ in before)):
            kind.clear(mapping)
        elif _same((value for _, value in now), (value for _, value in before)):
            return
        for key, value in before:
            kind.__setitem__(mapping, key, value)

    return restore


def _of_set(members: set[Any]) -> Restore:
    before = frozenset(members)

    def restore() -> None:
        if members != before:
            set.intersection_update(members, before)
            set.update(members, before)

    return restore


def _same(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether both are the very same things in the same order."""
    return all(a is b for a, b in zip_longest(first, second, fillvalue=MISSING))


def of_names(before: dict[str, Any], now: Callable[[], dict[str, Any]], put: Put) -> Restore:
    """Binds names to what they were bound to ``before``; those that only ``now`` has are unbound."""

    def restore() -> None:
        bound = now()
        for name in bound.keys() | before.keys():
            value = before.get(name, MISSING)
            if bound.get(name, MISSING) is not value:
                put(name, value)

    return restore


def put_into(names: dict[str, Any]) -> Put:
    """Binds names in a namespace: a module's, or an object's own."""

    def put(name: str, value: Any) -> None:
        if value is MISSING:
            names.pop(name, None)
        else:
            names[name] = value

    return put


def put_onto(kind: type) -> Put:
    """Binds attributes of a class."""

    def put(name: str, value: Any) -> None:
        if value is MISSING:
            type.__delattr__(kind, name)
        else:
            type.__setattr__(kind, name, value)

    return put


def filled(slots: Mapping[str, Any], thing: Any) -> dict[str, Any]:
    """The values of an object's slots, by name; ``slots`` are the class's descriptors."""
    values = {}
    for name, slot in slots.items():
        with contextlib.suppress(AttributeError):  # an empty one
            values[name] = slot.__get__(thing)
    return values


def put_into_slots(slots: Mapping[str, Any], thing: Any) -> Put:
    """Fills an object's slots, or empties them."""

    def put(name: str, value: Any) -> None:
        if value is MISSING:
            slots[name].__delete__(thing)
        else:
            slots[name].__set__(thing, value)

    return put


def of_generator(thing: Any) -> Restore | None:
    """Puts a random generator's present state back; nothing for what is none, or has none as the system's."""
    kind = type(thing)  # not ``isinstance``: a stand-in may load what it stands for when it is asked what it is
    if issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):
        return functools.partial(thing.setstate, thing.getstate())
    if issubclass(kind, torch.Generator):
        state = thing.get_state()

        def restore() -> None:
            thing.set_state(state)

        return restore
    if issubclass(kind, np.random.RandomState):
        return functools.partial(thing.set_state, thing.get_state())
    if issubclass(kind, np.random.Generator):
        bits = thing.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    return None
