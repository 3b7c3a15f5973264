"""A generation inside another one: callbacks are global, settings are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from double import Host
from torch import Tensor

OUTER = {"sag_scale": 1, "pag_scale": 3}
INNER = {"pag_scale": 1, "pag_blocks": "input.1"}
CALLBACKS = ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg")
SAME = {"seed": 7, "sampler_name": "Euler", "steps": 2}
OTHER = {"seed": 7, "sampler_name": "DDIM", "steps": 2, "batch_size": 2, "prompt": "a dog AND a house"}
INNER_SETTINGS: dict[str, Any] = {"plain": None, "off": {}, "guided": INNER, "guided alike": OUTER}


class Nested:
    """Runs one generation the second time that its hook is called, and keeps what came out."""

    def __init__(self, host: Host, settings: Any, fields: dict[str, Any]) -> None:
        self.host, self.settings, self.fields = host, settings, fields
        self.times = 0
        self.latents: list[Tensor] = []
        self.fails = False

    def __call__(self, *_: Any) -> None:
        self.times += 1
        if self.times == 2:
            p = self.host.processing.Processing(**self.fields)
            if self.settings is not None:
                p = self.host.processing_for(self.settings, **self.fields)
            if self.fails:
                p.callback = self._fail
            self.latents = self.host.processing.process_images(p).latents

    def _fail(self, step: int) -> None:
        if step == 1:
            raise RuntimeError("nested")


def check(host: Host, nested: Nested, install: Callable[[], None], outer: dict[str, Any]) -> None:
    expected_outer = host.generate(outer)[0]
    expected = host.plain(**nested.fields) if not nested.settings else host.generate(nested.settings, **nested.fields)
    install()
    actual_outer = host.generate(outer)[0]
    assert nested.times > 2
    for a, e in zip(nested.latents, expected, strict=True):
        assert torch.equal(a, e), "the nested generation is not its own"
    assert torch.equal(actual_outer, expected_outer), "the outer generation is not its own"


@pytest.mark.parametrize(
    ("inner", "fields"),
    [(None, SAME), (None, OTHER), ({}, SAME), (INNER, OTHER), (OUTER, SAME)],
    ids=["plain", "plain of other shape", "off", "guided", "guided alike"],
)
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_from_a_callback(host: Host, kind: str, position: str, inner: Any, fields: dict[str, Any]) -> None:
    nested = Nested(host, inner, fields)
    registered = host.script_callbacks.callbacks[kind]

    def install() -> None:
        registered.insert(0 if position == "before" else len(registered), nested)

    check(host, nested, install, OUTER)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_guided_inside_unguided(host: Host, kind: str) -> None:
    nested = Nested(host, INNER, SAME)
    check(host, nested, lambda: host.script_callbacks.callbacks[kind].append(nested), {})


@pytest.mark.parametrize("inner", INNER_SETTINGS.values(), ids=INNER_SETTINGS)
def test_between_steps(host: Host, inner: Any) -> None:
    nested = Nested(host, inner, SAME)
    expected = host.generate(OUTER)[0]
    alone = host.plain(**SAME) if not inner else host.generate(inner, **SAME)
    assert torch.equal(host.generate(OUTER, callback=nested)[0], expected)
    assert torch.equal(nested.latents[0], alone[0])


@pytest.mark.parametrize("inner", [None, INNER], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_nested_one_that_fails(host: Host, kind: str, inner: Any) -> None:
    """Its exception is swallowed by the host; the outer generation goes on as if it had not been."""
    expected = host.generate(OUTER)[0]
    nested = Nested(host, inner, SAME)
    nested.fails = True
    host.script_callbacks.callbacks[kind].append(nested)
    assert torch.equal(host.generate(OUTER)[0], expected)
    assert [str(error) for error in host.swallowed()] == ["nested"]


def test_refused_inside_guided(host: Host) -> None:
    expected = host.generate(OUTER)[0]
    nested = Nested(host, {"pag_blocks": "input.99"}, SAME)
    host.script_callbacks.callbacks["cfg_denoised"].append(nested)
    assert torch.equal(host.generate(OUTER)[0], expected)
    assert len(host.swallowed()) == 1
    assert nested.latents == []


def test_two_levels(host: Host) -> None:
    """A nested generation whose own sampler callback starts another one."""
    innermost = Nested(host, INNER, {"seed": 9})
    middle = Nested(host, OUTER, {"seed": 8, "callback": innermost})
    expected = [host.generate(OUTER)[0], host.generate(OUTER, seed=8)[0], host.generate(INNER, seed=9)[0]]
    outer = host.generate(OUTER, callback=middle)[0]
    for a, e in zip([outer, middle.latents[0], innermost.latents[0]], expected, strict=True):
        assert torch.equal(a, e)
