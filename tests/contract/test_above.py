"""Extensions that have changed a whole class, or what calls the U-Net: they are somebody too, the host's own is nobody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from double import Host
from forks import forked
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

TINY = [{"pag_scale": 1e-9}, {"sag_scale": 1e-9, "sag_threshold": 0}]
Function = Callable[..., Any]


def of_the_host(function: Any) -> Any:
    """The function as if it were written in the WebUI."""
    names = {**function.__globals__, "__name__": "modules.sd_hijack"}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def attention_class(host: Host) -> Any:
    return type(host.shared.sd_model.model.diffusion_model.get_submodule("middle_block.1.transformer_blocks.0.attn2"))


@contextmanager
def put(owner: Any, name: str, function: Any) -> Iterator[None]:
    """On a class, or on an object that has none of its own."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def by_half(out: Tensor) -> Tensor:
    """The first half of the rows is taken for the prompt's."""
    first, second = out.chunk(2)
    return torch.cat([first * 1.1, second * 0.9])


class Counting:
    """Every second call is taken for another one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, out: Tensor) -> Tensor:
        self.calls += 1
        return out * (1.1 if self.calls % 2 else 0.9)


@contextmanager
def on_class(host: Host, change: Callable[[Tensor], Tensor], name: str = "forward") -> Iterator[None]:
    kind = attention_class(host)
    own = getattr(kind, name)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = own(self, x, *args, **kwargs)
        return out if kwargs.get("context", args[0] if args else None) is None else change(out)

    with put(kind, name, forward):
        yield


def on_class_in_call(host: Host, change: Callable[[Tensor], Tensor]) -> Any:
    return on_class(host, change, "__call__")


@contextmanager
def on_model(host: Host, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = host.shared.sd_model.apply_model
    with put(host.shared.sd_model, "apply_model", lambda *args, **kwargs: change(own(*args, **kwargs))):
        yield


@contextmanager
def on_models_class(host: Host, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    kind = type(host.shared.sd_model)
    own = kind.apply_model

    @torch.no_grad()
    @functools.wraps(own)
    def apply_model(*args: Any, **kwargs: Any) -> Tensor:
        return change(own(*args, **kwargs))

    with put(kind, "apply_model", apply_model):
        yield


@contextmanager
def on_denoiser(host: Host, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    kind = host.sd_models.SigmaDenoiser
    own = kind.forward
    with put(kind, "forward", lambda *args, **kwargs: change(own(*args, **kwargs))):
        yield


@contextmanager
def hook_on_model(host: Host, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def install(params: Any) -> None:
        if not params.denoiser.inner_model._forward_hooks:
            params.denoiser.inner_model.register_forward_hook(lambda _, args, out: change(out))

    callbacks = host.script_callbacks.callbacks["cfg_denoiser"]
    callbacks.insert(0, install)
    yield
    callbacks.remove(install)


@contextmanager
def hook_on_all(host: Host, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    unet = host.shared.sd_model.model.diffusion_model
    handle = register_module_forward_hook(lambda module, _, out: change(out) if module is unet else None)
    yield
    handle.remove()


EVERYWHERE = [on_class, on_class_in_call, on_model, on_models_class, on_denoiser, hook_on_model, hook_on_all]


def made(host: Host, put_on: Function, change: Callable[[Tensor], Tensor], settings: Any) -> tuple[Tensor, str]:
    torch.manual_seed(3)
    with put_on(host, change):
        done = host.processing.process_images(host.processing_for(settings, steps=3))
    return done.latents[0], done.infotexts[0]


@pytest.mark.parametrize("lowvram", [False, True], ids=["extra rows", "own call"])
@pytest.mark.parametrize("kind", ["by half", "counting"])
@pytest.mark.parametrize("put_on", EVERYWHERE)
def test_the_hosts_calls_are_as_without_us(host: Host, put_on: Function, kind: str, lowvram: bool) -> None:
    """At a scale near 0 the picture is the unguided one, though calls of ours were made."""
    host.shared.sd_model.lowvram = lowvram
    makes: Callable[[], Callable[[Tensor], Tensor]] = (lambda: by_half) if kind == "by half" else Counting
    plain, _ = made(host, put_on, makes(), {})
    for settings in TINY:
        guided, text = made(host, put_on, makes(), settings)
        torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)
        assert "note" not in text


def test_guidance_beside_a_class_by_half(host: Host) -> None:
    """It is what it is where that class tells the rows apart by what they hold."""
    negative = host.shared.sd_model.encode("blurry")

    @contextmanager
    def by_context(host: Host, _: Any) -> Iterator[None]:
        kind = attention_class(host)
        own = kind.forward

        def forward(self: Any, x: Tensor, context: Tensor | None = None, **kwargs: Any) -> Tensor:
            out: Tensor = own(self, x, context=context, **kwargs)
            if context is None:
                return out
            is_prompt = (context - negative).abs().amax(dim=(1, 2)) > 0
            return out * torch.where(is_prompt, 1.1, 0.9)[:, None, None]

        with put(kind, "forward", forward):
            yield

    for settings in ({"pag_scale": 3}, {"sag_scale": 1}):
        expected, _ = made(host, by_context, None, settings)
        torch.testing.assert_close(made(host, on_class, by_half, settings)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["class", "model", "denoiser"])
def test_the_hosts_own_is_nobody(host: Host, where: str) -> None:
    """As attention optimisations, LoRA's layers, and what casts at the model's edge: no row more is computed."""
    kind, name = {
        "class": (attention_class(host), "forward"), "model": (type(host.shared.sd_model), "apply_model"),
        "denoiser": (host.sd_models.SigmaDenoiser, "forward"),
    }[where]
    own = getattr(kind, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    with put(kind, name, of_the_host(function)):
        assert host.rows(lambda: host.generate({"pag_scale": 3}, steps=2)) == [3, 3]
        assert host.rows(lambda: host.generate({"sag_scale": 1}, steps=2)) == [2, 1, 2, 1]
    with put(kind, name, function):
        assert max(host.rows(lambda: host.generate({"pag_scale": 3}, steps=2))) == 2


@pytest.mark.parametrize("fork", ["backend", "ldm_patched"])
def test_in_a_fork(fork: str) -> None:
    """The model's own call replaced, as by those who compile it."""
    with forked(fork) as host:
        assert host.rows(lambda: host.generate({"pag_scale": 3}, steps=2)) == [3, 3]
        model = host.shared.sd_model.forge_objects.unet.model
        own = model.apply_model
        with put(model, "apply_model", lambda *args, **kwargs: own(*args, **kwargs)):
            assert host.rows(lambda: host.generate({"pag_scale": 3}, steps=2)) == [2, 2, 2, 2, 2]


def test_a_counter_on_the_modules_of_a_class(host: Host) -> None:
    """What a method of a class keeps on each module is put back too."""
    unet: nn.Module = host.shared.sd_model.model.diffusion_model
    kind = attention_class(host)
    own = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        out: Tensor = own(self, *args, **kwargs) * (1.5 if self.seen % 2 else 0.5)
        return out

    def picture(settings: Any) -> tuple[Tensor, str]:
        for module in unet.modules():
            vars(module).pop("seen", None)
        done = host.processing.process_images(host.processing_for(settings, steps=3))
        return done.latents[0], done.infotexts[0]

    with put(kind, "forward", forward):
        plain, _ = picture({})
        for settings in TINY:
            guided, text = picture(settings)
            torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)
            assert "note" not in text
    for module in unet.modules():
        vars(module).pop("seen", None)
