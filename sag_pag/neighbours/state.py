"""What other extensions keep outside the model, as it is now: a call of ours must find and leave it as the host's did.

Extensions count calls to tell which of them is which, keep what they have made of the first one, draw from generators
of their own. All that is in objects that their functions in the model can reach: what those have captured, the objects
that they are methods of, the names of their modules. Nobody need know these by name.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOST_AND_US = {
    "modules", "modules_forge", "backend", "ldm_patched", "ldm", "sgm", "k_diffusion", "launch", "webui", "sag_pag",
    "networks", "lora_patches", "lora", "extra_networks_lora",
}
"""Not to be rewound: the host's own. Its LoRA notes on a layer what it has done to the layer's weights."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LARGEST = 1000
"""Of a collection no more items than this are looked into."""
_MOST = 20_000
"""Objects that are looked at."""

Restore = Callable[[], None]


def origin(thing: Any) -> str:
    """The name of the module that a function or a class was written in."""
    return str(getattr(thing, "__module__", "") or "")


def is_foreign(module: str) -> bool:
    """Whether a module is another extension's: not the host's, not ours, no library."""
    root = module.split(".")[0]
    if not root or root in _HOST_AND_US or root in sys.stdlib_module_names:
        return False
    file = str(getattr(sys.modules.get(root), "__file__", None) or "")
    return "site-packages" not in file and "dist-packages" not in file


class State:
    """The numbers, switches, references, collections and generators that ``roots`` can reach, as they are now.

    ``roots`` are functions, methods and objects. What tensors hold is not looked at, nor modules' parameters.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._before: list[Restore] = []
        self._after: list[Restore] = []
        self._seen: dict[int, Any] = {}
        self._waiting = deque(roots)
        while self._waiting and len(self._seen) < _MOST:
            self._visit(self._waiting.popleft())
        self._seen.clear()

    def restore(self, *, references: bool = True) -> None:
        """Puts back what was found. Without ``references`` the modules' own attributes that are no numbers or lists
        stay: they may say what has been done to the module's weights meanwhile.
        """
        for restore in self._before if not references else self._after:
            restore()

    def _visit(self, thing: Any) -> None:
        if isinstance(thing, (*_PLAIN, Tensor, type, types.ModuleType)) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing  # kept, so that no other object gets its number
        if isinstance(thing, (types.FunctionType, types.MethodType, functools.partial)):
            self._function(thing)
        elif (state := _state_of_generator(thing)) is not None:
            self._keep(state)
        elif isinstance(thing, (list, dict, set, deque)):
            self._keep(_contents(thing))
            self._wait_for(thing.values() if isinstance(thing, dict) else thing)
        elif isinstance(thing, tuple):
            self._wait_for(thing)
        elif isinstance(thing, nn.Module):
            self._module(thing)
        elif is_foreign(origin(type(thing))) and hasattr(thing, "__dict__"):
            self._keep(_contents(vars(thing)))
            self._wait_for(vars(thing).values())

    def _function(self, thing: Any) -> None:
        if isinstance(thing, functools.partial):
            self._wait_for((thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, types.MethodType):
            self._wait_for((thing.__self__, thing.__func__))
        else:
            if hasattr(thing, "__wrapped__"):
                self._waiting.append(thing.__wrapped__)
            if not is_foreign(str(thing.__globals__.get("__name__", ""))):
                return
            for cell in thing.__closure__ or ():
                self._cell(cell)
            self._names(thing.__globals__)

    def _cell(self, cell: Any) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return

        def restore() -> None:
            cell.cell_contents = content

        self._keep(restore)
        self._waiting.append(content)

    def _names(self, names: dict[str, Any]) -> None:
        """A module's names: counters are put back, and what the other names stand for is looked into."""
        if id(names) in self._seen:
            return
        self._seen[id(names)] = names
        numbers = {
            name: value for name, value in names.items() if isinstance(value, _PLAIN) and not name.startswith("__")
        }
        self._keep(functools.partial(names.update, numbers))
        self._wait_for(value for value in names.values() if not callable(value) or hasattr(value, "__dict__"))

    def _module(self, module: nn.Module) -> None:
        """A module of torch: what has been put on it beside its own parameters and parts."""
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        counters = {name: value for name, value in own.items() if _counts(name, value)}
        names = vars(module)

        def restore_counters() -> None:
            for name in [name for name, value in names.items() if _counts(name, value) and name not in own]:
                del names[name]
            names.update(counters)

        self._before.append(restore_counters)

        def restore() -> None:
            for name in [name for name in names if not name.startswith("_") and name not in own]:
                del names[name]
            names.update(own)

        self._after.append(restore)
        foreign = is_foreign(origin(type(module)))
        self._wait_for(own.values() if foreign else counters.values())

    def _keep(self, restore: Restore) -> None:
        self._before.append(restore)
        self._after.append(restore)

    def _wait_for(self, things: Iterable[Any]) -> None:
        self._waiting.extend(_some(things))


def _counts(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, (int, float, list, dict))


def _some(things: Iterable[Any]) -> Iterator[Any]:
    for number, thing in enumerate(things):
        if number >= _LARGEST:
            return
        yield thing


def _contents(collection: Any) -> Restore:
    """Puts a collection's present items back into it."""
    if isinstance(collection, MutableMapping):
        items = dict(collection)

        def restore() -> None:
            if collection.keys() != items.keys():
                collection.clear()
            collection.update(items)

        return restore
    if isinstance(collection, set):
        members = set(collection)

        def restore_members() -> None:
            collection.clear()
            collection.update(members)

        return restore_members
    values = list(collection)

    def restore_values() -> None:
        collection.clear()
        collection.extend(values)

    return restore_values


def _state_of_generator(thing: Any) -> Restore | None:
    """Puts a generator's present state back; nothing for what is none."""
    if isinstance(thing, random.Random):
        return functools.partial(thing.setstate, thing.getstate())
    if isinstance(thing, torch.Generator):
        state = thing.get_state()

        def restore() -> None:
            thing.set_state(state)

        return restore
    if isinstance(thing, np.random.RandomState):
        return functools.partial(thing.set_state, thing.get_state())
    if isinstance(thing, np.random.Generator):
        bits = thing.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    return None
