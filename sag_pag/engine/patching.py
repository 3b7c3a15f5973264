"""Replacing a module's ``forward`` for the duration of a ``with`` block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextmanager
def forward_replaced(module: nn.Module, make: Callable[[Forward], Forward]) -> Iterator[None]:
    """Runs with ``module.forward`` replaced by ``make(what was there)``; gives back exactly what was there.

    Whatever ``forward`` is now is wrapped: the class's own, an attention optimisation put on the class, or another
    extension's replacement on the instance.
    """
    instance = vars(module)
    had_own = "forward" in instance
    previous: Forward = module.forward
    ours = instance["forward"] = make(previous)
    try:
        yield
    finally:
        if instance.get("forward") is ours:  # else another extension has put its own there: not ours to undo
            if had_own:
                instance["forward"] = previous
            else:
                del instance["forward"]


def is_replaced(module: nn.Module, name: str) -> bool:
    """Whether the method ``name`` of this one module is something else than its class's own."""
    own = vars(module).get(name)
    return own is not None and getattr(own, "__func__", own) is not getattr(type(module), name, None)


Hook = Callable[..., Any]


@contextmanager
def without_hooks(module: nn.Module, unwanted: Callable[[Hook], bool]) -> Iterator[None]:
    """Runs without those forward pre-hooks of the module that are ``unwanted``."""
    kept = module._forward_pre_hooks
    if any(unwanted(hook) for hook in kept.values()):
        module._forward_pre_hooks = OrderedDict((key, hook) for key, hook in kept.items() if not unwanted(hook))
    try:
        yield
    finally:
        module._forward_pre_hooks = kept


def unhooked(module: nn.Module, part: str) -> Forward:
    """The forward of a module's part, without the hooks that others have put on it: they are there for the calls that
    the module itself makes, with the rows that it has.
    """
    forward: Forward = module.get_submodule(part).forward
    return forward
