"""A failure is seen, leaves nothing behind, and does not poison the next generation."""

from __future__ import annotations

import traceback
from functools import cached_property
from importlib import import_module
from inspect import getattr_static
from typing import Any

import pytest
import torch
from double import Host

BOTH = {"sag_scale": 1, "pag_scale": 3}


class Interrupted(BaseException):
    """As a sampler's own way out."""


def fail_at(host: Host, call: int, error: BaseException) -> None:
    """Makes the U-Net raise from inside its call number ``call``, then never again."""
    model = host.shared.sd_model
    block = model.model.diffusion_model.middle_block
    start = len(model.calls)

    def before_call() -> None:
        if len(model.calls) - start != call:
            return

        def raise_now(*_: Any) -> None:
            handle.remove()
            raise error

        handle = block[2].register_forward_pre_hook(raise_now)  # after the attention: all patches are on

    model.before_call = before_call


def leaves_nothing(host: Host, p: Any, expected: list[torch.Tensor]) -> None:
    host.shared.sd_model.before_call = lambda: None
    host.assert_clean()
    assert "sample" not in vars(p)
    assert torch.equal(host.generate({})[0], expected[0])
    assert torch.equal(host.plain()[0], expected[0])


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), Interrupted()], ids=type)
@pytest.mark.parametrize("call", [1, 2, 6])
@pytest.mark.parametrize("batched", [True, False], ids=["one call", "own call"])
def test_the_unet_raises(host: Host, error: BaseException, call: int, batched: bool) -> None:
    """With three guided steps of a U-Net call and SAG's own, even calls are made by the extension."""
    expected = host.plain()
    host.shared.opts.batch_cond_uncond = batched
    host.shared.sd_model.lowvram = not batched
    p = host.processing_for(BOTH, steps=3)
    fail_at(host, call, error)
    with pytest.raises(type(error)) as raised:
        host.processing.process_images(p)
    assert raised.value is error
    host.shared.opts.batch_cond_uncond, host.shared.sd_model.lowvram = True, False
    leaves_nothing(host, p, expected)


@pytest.mark.parametrize("others", [0, 1], ids=["of itself", "of each other"])
def test_an_exception_that_is_its_own_cause(host: Host, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """``raise error from error`` in SAG's own call, where it is kept to be raised later."""
    expected = host.plain()
    error, *between = ring = [ValueError(str(number)) for number in range(1 + others)]
    for made, cause in zip(ring, [*between, error], strict=True):
        made.__cause__ = cause
    clear, cleared = traceback.clear_frames, []

    def counted(frames: Any) -> None:
        cleared.append(frames)
        assert len(cleared) < 50, "it never ends"
        clear(frames)

    p = host.processing_for({"sag_scale": 1})
    fail_at(host, 2, error)
    with monkeypatch.context() as patch:
        patch.setattr(traceback, "clear_frames", counted)
        with pytest.raises(ValueError, match="0"):
            host.processing.process_images(p)
    assert len(cleared) == len(ring)
    leaves_nothing(host, p, expected)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_interrupting(host: Host, step: int) -> None:
    """The sampler returns what it has; the picture is whole, and the next one plain."""
    expected = host.plain()
    p = host.processing_for(BOTH)

    def interrupt(at: int) -> None:
        host.shared.state.interrupted = at == step

    p.callback = interrupt
    result = host.processing.process_images(p)
    assert len(result.latents) == 1
    host.shared.state.interrupted = False
    leaves_nothing(host, p, expected)


@pytest.mark.parametrize(
    ("where", "settings"),
    [("blur", BOTH), ("add_guidance", BOTH), ("add_guidance", {"pag_scale": 3}), ("attention_mask", {"sag_scale": 1})],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_maths_raise_in_a_callback(
    host: Host, monkeypatch: pytest.MonkeyPatch, where: str, settings: dict[str, Any], steps: int
) -> None:
    """Also in the very last step, after which there is no U-Net call that could raise it."""
    expected = host.plain()

    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError(where)

    p = host.processing_for(settings, steps=steps)
    with monkeypatch.context() as patch:
        patch.setattr(f"sag_pag.guidance.{where}", broken)
        with pytest.raises(ArithmeticError, match=where):
            host.processing.process_images(p)
    leaves_nothing(host, p, expected)


@pytest.mark.parametrize("function", [
    "A1111Step.rows", "A1111Step.progress", "A1111Step.space", "A1111.topology", "A1111.key_value_inputs",
    "A1111Step.weight", "A1111Step.factor", "A1111.step", "A1111Step.wants_own_call", "A1111.is_tiling",
])
def test_the_host_is_not_as_expected(host: Host, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """A WebUI of another version lacks something: no unguided picture that claims to be guided."""
    def missing(*_: Any, **__: Any) -> None:
        raise AttributeError(function)

    p = host.processing_for(BOTH)
    kind, name = function.split(".")
    owner = getattr(import_module("sag_pag.hosts.a1111"), kind)
    is_property = isinstance(getattr_static(owner, name), (property, cached_property))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, property(missing) if is_property else missing)
        with pytest.raises(AttributeError, match=function):
            host.processing.process_images(p)
    assert "sample" not in vars(p)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_webui_before_ddim_cfgpp(host: Host, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """Versions before 1.10 have no factor for CFG's scale."""
    expected = host.generate(BOTH, sampler_name=sampler)
    monkeypatch.setattr(host.sd_samplers.CFGDenoiser, "knows_cfgpp", False)
    assert torch.equal(host.generate(BOTH, sampler_name=sampler)[0], expected[0])


@pytest.mark.parametrize("settings", [{"pag_scale": 3}, {"sag_scale": 1}, BOTH])
def test_more_rows_than_announced(host: Host, settings: dict[str, Any]) -> None:
    """Another extension has changed the batch: the picture is what it is without us, and says so."""
    def add_a_row(params: Any) -> None:
        for name in ("x", "sigma", "text_cond", "image_cond"):
            rows = getattr(params, name)
            setattr(params, name, torch.cat([rows[:1], rows]))

    registered = host.script_callbacks.callbacks["cfg_denoiser"]
    registered.insert(0, add_a_row)
    p = host.processing_for(settings)
    result = host.processing.process_images(p)
    assert list(p.extra_generation_params) == ["SAG/PAG note"]
    assert "not applied" in result.infotexts[0]
    with host.without_extension():
        registered.append(add_a_row)
        assert torch.equal(result.latents[0], host.processing.process_images(host.processing.Processing()).latents[0])
        registered.clear()
