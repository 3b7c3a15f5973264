"""Whose a function is: the host's and libraries' are nobody's, also where they wrap or are wrapped."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
from torch import nn

from sag_pag.neighbours.unknown import theirs


def own(*_: Any) -> None:
    pass


def elsewhere(name: str, *, file: str = __file__) -> Any:
    return FunctionType(own.__code__.replace(co_filename=file), {"__name__": name}, "forward")


HOST = elsewhere("modules.sd_hijack_optimizations")


def test_another_extensions() -> None:
    for function in (own, functools.partial(own, 1), own.__get__(object()), torch.no_grad()(own)):
        assert getattr(theirs(function), "__func__", theirs(function)) is own
    method = torch.no_grad()(own).__get__([])
    assert theirs(method) is method, "what it is of is not lost"
    passed_off = functools.wraps(HOST)(lambda *args: HOST(*args))
    assert theirs(passed_off) is passed_off, "it has the name of what it wraps"


def test_nobodys() -> None:
    """Attention optimisations, LoRA's layers, what comes with the WebUI, torch, this extension."""
    lora = elsewhere("networks", file="/webui/extensions-builtin/Lora/networks.py")
    built_in = elsewhere("compile.py", file="/webui/extensions-builtin/sd_forge_compile/scripts/compile.py")
    for function in (HOST, lora, built_in, nn.Linear.forward, torch.no_grad()(HOST), elsewhere("sag_pag.hosts.forge")):
        assert theirs(function) is None
    assert theirs(None) is None


def test_what_wraps_itself() -> None:
    host = elsewhere("modules.devices")
    host.__wrapped__ = host
    assert theirs(host) is None
