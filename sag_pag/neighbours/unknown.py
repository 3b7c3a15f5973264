"""Who is in a network besides the host, found by what they have changed in it: nobody need be known by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sag_pag.engine.blocks import Topology
from sag_pag.engine.patching import Hook, is_replaced
from sag_pag.neighbours.state import is_foreign, origin

LAYERS = {
    "Conv2d", "Linear", "ResBlock", "SpatialTransformer", "SpatialVideoTransformer", "AttentionBlock", "Downsample",
    "Upsample", "JointBlock",
}
METHODS = ("forward", "_forward")
_EXTENSION = re.compile(r"extensions(?:-builtin|-disabled)?[\\/]([^\\/]+)[\\/]")


def written_in(function: Any) -> str:
    """The name of the module that a function was written in, also where it passes itself off as another's."""
    function = getattr(function, "__func__", function)
    names = getattr(function, "__globals__", None)
    return str(names.get("__name__", "")) if names is not None else origin(function) or origin(type(function))


def extension_of(function: Any) -> str:
    """What to call the extension that a function is of: its folder, or else its module."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    folder = _EXTENSION.search(code.co_filename) if code is not None else None
    return folder[1] if folder else written_in(function).removesuffix(".py")


@dataclass(frozen=True)
class Change:
    """Something that another has put on one module: a method in place of its class's own, or a hook."""

    module: nn.Module
    function: Any
    hook: bool = False


@dataclass(frozen=True)
class Found:
    """All that others have changed in a network, and the modules put into its blocks or around them."""

    changes: tuple[Change, ...] = ()
    layers: tuple[nn.Module, ...] = ()
    classes: tuple[Any, ...] = ()
    """Methods that others have put on whole classes, for all modules of all models."""

    @property
    def anybody(self) -> bool:
        return bool(self.changes or self.layers)

    def roots(self) -> list[Any]:
        """From which all that these extensions keep can be reached."""
        own = [change.module for change in self.changes]
        return [*(change.function for change in self.changes), *own, *self.layers, *self.classes]

    def without(self, known: Callable[[Change], bool]) -> Found:
        """This without changes of which is known that they do no harm."""
        return Found(tuple(change for change in self.changes if not known(change)), self.layers, self.classes)

    def names(self) -> list[str]:
        """What to call the extensions."""
        functions = [change.function for change in self.changes] + [type(layer).forward for layer in self.layers]
        return list(dict.fromkeys(filter(None, map(extension_of, functions))))


class Modules:
    """A network's modules, and what others have changed in them. Made once a run and model, asked in every step."""

    def __init__(self, topology: Topology) -> None:
        self._modules = [(module, vars(module)) for module in topology.network.modules()]
        self._classes = list(dict.fromkeys(type(module) for module, _ in self._modules))
        self._layers = tuple(layer for layer in topology.layers() if type(layer).__name__ not in LAYERS)

    def found(self, moves: Callable[[Hook], bool]) -> Found:
        """What is there now. It takes less than a millisecond. ``moves`` tells the host's own hooks."""
        return Found(tuple(self._changes(moves)), self._layers, tuple(self._foreign_methods()))

    def _changes(self, moves: Callable[[Hook], bool]) -> Iterator[Change]:
        for module, own in self._modules:
            for name in METHODS:
                if name in own and is_replaced(module, name) and not written_in(own[name]).startswith("sag_pag.hosts"):
                    yield Change(module, own[name])
            for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"]):
                for hook in hooks.values():
                    if not moves(hook) and not _is_of_torch(hook):
                        yield Change(module, hook, hook=True)

    def _foreign_methods(self) -> Iterator[Any]:
        """A forward put on a class changes all rows alike, as LoRA does; what it keeps is to be kept all the same."""
        for kind in self._classes:
            method = getattr(kind, "forward", None)
            if method is not None and is_foreign(written_in(method)) and not is_foreign(origin(kind)):
                yield method


def _is_of_torch(hook: Any) -> bool:
    return origin(hook).split(".")[0] == "torch" or origin(type(hook)).split(".")[0] == "torch"
