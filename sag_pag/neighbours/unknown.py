"""Who is in a network besides the host, or on the way to it, found by what they have changed: nobody need be known by
name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from sag_pag.engine.blocks import Topology
from sag_pag.engine.patching import Hook, is_replaced
from sag_pag.neighbours.state import is_foreign, origin

LAYERS = {
    "Conv2d", "Linear", "ResBlock", "SpatialTransformer", "SpatialVideoTransformer", "AttentionBlock", "Downsample",
    "Upsample", "JointBlock",
}
METHODS = ("forward", "_forward")
ON_THE_WAY = (*METHODS, "apply_model", "_apply_model", "get_eps", "get_v", "__call__")
"""What the objects that a denoiser call goes through call of each other."""
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_EXTENSION = re.compile(r"extensions(?:-builtin|-disabled)?[\\/]([^\\/]+)[\\/]")
_BUILT_IN = re.compile(r"extensions-builtin[\\/]")
_DEEPEST = 20
"""Of functions that wrap each other no more than this are looked at."""


def written_in(function: Any) -> str:
    """The name of the module that a function was written in, also where it passes itself off as another's."""
    function = getattr(function, "__func__", function)
    names = getattr(function, "__globals__", None)
    return str(names.get("__name__", "")) if names is not None else origin(function) or origin(type(function))


def extension_of(function: Any) -> str:
    """What to call the extension that a function is of: its folder, or else its module."""
    function = next(filter(_is_theirs, _wrapping(function)), function)
    folder = _EXTENSION.search(_file_of(function))
    return folder[1] if folder else written_in(function).removesuffix(".py")


def _file_of(function: Any) -> str:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return "" if code is None else str(code.co_filename)


def theirs(function: Any) -> Any:
    """A function, or what it wraps, if that is another extension's: none of the host's, which brings some extensions
    along, nor of a library's. ``None`` if nothing is. A method that wraps one is given with the object that it is of.
    """
    method = None
    for part in _wrapping(function):
        method = part if isinstance(part, MethodType) else method
        if _is_theirs(part):
            return part if method is None else method
    return None


def _is_theirs(function: Any) -> bool:
    return is_foreign(written_in(function)) and not _BUILT_IN.search(_file_of(function))


def _wrapping(function: Any) -> Iterator[Any]:
    """A function and those that it wraps, from outside in."""
    for _ in range(_DEEPEST):
        if isinstance(function, functools.partial):
            function = function.func
        elif function is not None:
            yield function
            function = getattr(function, "__wrapped__", None)


@dataclass(frozen=True)
class Change:
    """Something that another has put on one module: a method in place of its class's own, or a hook. On the way to the
    network it is any object, and any method of another's.
    """

    module: Any
    function: Any
    hook: bool = False


@dataclass(frozen=True)
class Found:
    """All that others have changed in a network and on the way to it, and the modules put into its blocks or around
    them.
    """

    changes: tuple[Change, ...] = ()
    layers: tuple[nn.Module, ...] = ()
    classes: tuple[Any, ...] = ()
    """Methods that others have put on whole classes, for all modules of all models."""
    of_classes: tuple[nn.Module, ...] = ()
    """The network's modules of these classes."""

    @property
    def anybody(self) -> bool:
        return bool(self.changes or self.layers or self.classes)

    def roots(self) -> list[Any]:
        """From which all that these extensions keep can be reached."""
        own = [change.module for change in self.changes]
        functions = [change.function for change in self.changes]
        return [*functions, *own, *self.layers, *self.classes, *self.of_classes]

    def without(self, known: Callable[[Change], bool]) -> Found:
        """This without changes of which is known that they do no harm."""
        return replace(self, changes=tuple(change for change in self.changes if not known(change)))

    def names(self) -> list[str]:
        """What to call the extensions."""
        functions = [change.function for change in self.changes] + [type(layer).forward for layer in self.layers]
        functions += self.classes
        return list(dict.fromkeys(filter(None, map(extension_of, functions))))


class Modules:
    """A network's modules, and what others have changed in them. Made once a run and model, asked in every step."""

    def __init__(self, topology: Topology) -> None:
        self._network = topology.network
        self._modules = [(module, vars(module)) for module in topology.network.modules()]
        self._classes = list(dict.fromkeys(type(module) for module, _ in self._modules))
        self._layers = tuple(layer for layer in topology.layers() if type(layer).__name__ not in LAYERS)

    def found(self, moves: Callable[[Hook], bool], path: Sequence[Any] = ()) -> Found:
        """What is there now. It takes less than a millisecond.

        ``moves`` tells the host's own hooks, ``path`` are the functions and objects that a call goes through on its way
        to the network.
        """
        classes = {kind: methods for kind in self._classes if (methods := list(_put_on_class(kind)))}
        return Found(
            (*self._changes(moves), *self._global_hooks(), *_on_the_way(path)), self._layers,
            tuple(dict.fromkeys(method for methods in classes.values() for method in methods)),
            tuple(module for module, _ in self._modules if type(module) in classes) if classes else (),
        )

    def _changes(self, moves: Callable[[Hook], bool]) -> Iterator[Change]:
        for module, own in self._modules:
            for name in METHODS:
                if name in own and is_replaced(module, name) and not written_in(own[name]).startswith("sag_pag.hosts"):
                    yield Change(module, own[name])
            for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"]):
                for hook in hooks.values():
                    if not moves(hook) and not _is_of_torch(hook):
                        yield Change(module, hook, hook=True)

    def _global_hooks(self) -> Iterator[Change]:
        for name in _GLOBAL_HOOKS:
            for hook in getattr(torch_module, name, {}).values():
                if not _is_of_torch(hook) and (function := theirs(hook)) is not None:
                    yield Change(self._network, function, hook=True)


def _put_on_class(kind: type) -> Iterator[Any]:
    """The methods of a class of the host's, or of torch's, that are another extension's; those of the WebUI's LoRA and
    of its attention optimisations are its own.
    """
    for name in (*METHODS, "__call__"):
        function = theirs(getattr(kind, name, None))
        if function is not None and not is_foreign(origin(kind)):
            yield function


def _on_the_way(path: Sequence[Any]) -> Iterator[Change]:
    """What of others a denoiser call goes through."""
    for thing in path:
        if (function := theirs(thing)) is not None:
            yield Change(getattr(function, "__self__", None), function)
        own = getattr(thing, "__dict__", {})
        for name in ON_THE_WAY:
            if (function := theirs(own.get(name, getattr(type(thing), name, None)))) is not None:
                yield Change(thing, function)
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            for hook in own.get(hooks, {}).values():
                if (function := theirs(hook)) is not None:
                    yield Change(thing, function, hook=True)


def _is_of_torch(hook: Any) -> bool:
    return origin(hook).split(".")[0] == "torch" or origin(type(hook)).split(".")[0] == "torch"
