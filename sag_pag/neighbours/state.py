"""What other extensions keep outside the model, as it is now: a call of ours must find and leave it as the host's did.

Extensions count calls to tell which of them is which, keep what they have made of the first one, draw from generators
of their own. All that is in what their functions in the model can reach: what those have captured, the objects that
they are methods of, the names of modules that their code uses. Nobody need know these by name.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from sag_pag.neighbours.contents import (
    Restore,
    filled,
    of_collection,
    of_generator,
    of_names,
    put_into,
    put_into_slots,
    put_onto,
)

_HOST_AND_US = {
    "modules", "modules_forge", "backend", "ldm_patched", "ldm", "sgm", "k_diffusion", "launch", "webui", "sag_pag",
    "networks", "lora_patches", "lora", "extra_networks_lora", "__main__",
}
"""Not to be rewound: the host's own. Its LoRA notes on a layer what it has done to the layer's weights."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_COLLECTIONS = (list, dict, set, deque)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_LARGEST = 1000
"""Of a collection no more items than this are looked into."""
_MOST = 20_000
"""Things that are looked at."""
_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module of torch has."""


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
    """The bindings, switches, counters, collections and generators that ``roots`` can reach, as they are now.

    ``roots`` are functions, methods and objects. What tensors hold is not looked at, nor modules' parameters, nor which
    functions, classes and modules a name stands for. ``complete`` says whether all that they reach was looked at.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._before: list[Restore] = []
        self._after: list[Restore] = []
        self._seen: dict[int | tuple[int, str], Any] = {}
        self._waiting = deque(roots)
        while self._waiting and len(self._seen) < _MOST:
            self._visit(self._waiting.popleft())
        self.complete = not self._waiting
        self._seen.clear()
        self._waiting.clear()

    def restore(self, *, references: bool = True) -> None:
        """Puts back what was found. Without ``references`` the modules' own attributes that are no numbers or lists
        stay: they may say what has been done to the module's weights meanwhile.
        """
        for restore in self._before if not references else self._after:
            restore()

    def _visit(self, thing: Any) -> None:
        kind = type(thing)  # not ``isinstance``: a stand-in may load what it stands for when it is asked what it is
        if issubclass(kind, (*_PLAIN, Tensor)) or not self._is_new(id(thing), thing):
            return
        if issubclass(kind, _FUNCTIONS):
            self._function(thing)
        elif issubclass(kind, (staticmethod, classmethod)):
            self._waiting.append(thing.__func__)
        elif issubclass(kind, property):
            self._wait_for((thing.fget, thing.fset))
        elif (generator := of_generator(thing)) is not None:
            self._keep(generator)
        elif issubclass(kind, _COLLECTIONS):
            self._keep(of_collection(thing))
            self._wait_for(dict.values(thing) if issubclass(kind, dict) else kind.__iter__(thing))
            if is_foreign(origin(kind)):
                self._object(thing)
        elif issubclass(kind, types.BuiltinMethodType):
            self._waiting.append(thing.__self__)
        elif issubclass(kind, tuple):
            self._wait_for(thing)
        elif issubclass(kind, type):
            self._class(thing)
        elif issubclass(kind, nn.Module):
            self._module(thing)
        elif is_foreign(origin(kind)) or kind is types.SimpleNamespace:
            self._object(thing)

    def _is_new(self, key: int | tuple[int, str], thing: Any) -> bool:
        if key in self._seen:
            return False
        self._seen[key] = thing  # kept, so that no other thing gets its number
        return True

    def _function(self, thing: Any) -> None:
        if isinstance(thing, functools.partial):
            self._wait_for((thing.func, *thing.args, *thing.keywords.values()))
        elif isinstance(thing, types.MethodType):
            self._wait_for((thing.__self__, thing.__func__))
        else:
            self._waiting.append(vars(thing).get("__wrapped__"))
            if not is_foreign(str(thing.__globals__.get("__name__", ""))):
                return
            for cell in thing.__closure__ or ():
                self._cell(cell)
            self._wait_for((*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()))
            self._names(thing.__globals__, set(_names_in(thing.__code__)))

    def _cell(self, cell: Any) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            return

        def restore() -> None:
            cell.cell_contents = content

        self._keep(restore)
        self._waiting.append(content)

    def _names(self, names: dict[str, Any], used: set[str], *, within: tuple[int, ...] = ()) -> None:
        """Names of a module that code uses, and of another extension's module that is among them."""
        bound = {name: names[name] for name in used if name in names}
        kept = {
            name for name in used
            if not name.startswith("__") and not _is_code(bound.get(name)) and self._is_new((id(names), name), names)
        }
        self._keep(of_names(
            {name: value for name, value in bound.items() if name in kept},
            lambda: {name: names[name] for name in kept & names.keys() if not _is_code(names[name])}, put_into(names),
        ))
        for value in bound.values():
            if type(value) is not types.ModuleType:
                self._waiting.append(value)
            elif is_foreign(value.__name__) and id(value) not in within:
                self._names(vars(value), used, within=(*within, id(value)))

    def _class(self, kind: type) -> None:
        """What is on a class of another extension for all of its objects, and what its methods reach."""
        for own in kind.__mro__:
            if not is_foreign(origin(own)) or (own is not kind and not self._is_new(id(own), own)):
                continue

            def now(own: type = own) -> dict[str, Any]:
                return {
                    name: value for name, value in vars(own).items()
                    if not name.startswith("__") and not _is_code(value) and not hasattr(type(value), "__get__")
                }

            self._keep(of_names(now(), now, put_onto(own)))
            self._wait_for(list(vars(own).values()))

    def _object(self, thing: Any) -> None:
        """An object's own attributes, and its class."""
        if type(thing).__dictoffset__:
            names: dict[str, Any] = object.__getattribute__(thing, "__dict__")
            self._keep(of_names(dict(names), lambda: names, put_into(names)))
            self._wait_for(list(names.values()))
        slots = {
            name: slot for own in type(thing).__mro__ if is_foreign(origin(own))
            for name, slot in vars(own).items() if type(slot) is types.MemberDescriptorType
        }
        if slots:
            before = filled(slots, thing)
            self._keep(of_names(before, lambda: filled(slots, thing), put_into_slots(slots, thing)))
            self._wait_for(before.values())
        self._waiting.append(type(thing))

    def _module(self, module: nn.Module) -> None:
        """A module of torch: what has been put on it beside its own parameters and parts."""
        names = vars(module)

        def own() -> dict[str, Any]:
            return {name: value for name, value in names.items() if name not in _OF_TORCH}

        before = own()
        counters = {name: value for name, value in before.items() if _counts(value)}

        def counters_now() -> dict[str, Any]:
            return {
                name: value for name, value in own().items()
                if name in counters or (name not in before and _counts(value))
            }

        self._before.append(of_names(counters, counters_now, put_into(names)))
        self._after.append(of_names(before, own, put_into(names)))
        self._wait_for((before if is_foreign(origin(type(module))) else counters).values())
        self._waiting.append(type(module))

    def _keep(self, restore: Restore) -> None:
        self._before.append(restore)
        self._after.append(restore)

    def _wait_for(self, things: Iterable[Any]) -> None:
        self._waiting.extend(islice(things, _LARGEST))


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float, list, dict))


def _is_code(value: Any) -> bool:
    """Whether a name's value is what programs are made of: who binds such a name defines or imports."""
    return issubclass(type(value), (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType))


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The names that a function's code uses, with what is defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
