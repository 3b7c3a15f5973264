"""Extensions in the U-Net that keep what they count or make where it is not on their own object.

sd_webui_SAG 83d66a6 binds a name of its module anew in every call, others count in a class, in another module, in a
layer's own name. Whatever of that our calls move, the host's later calls would notice.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host
from torch import Tensor, nn

_cache: Tensor | None = None
_names = SimpleNamespace(calls=0)
_elsewhere = types.ModuleType("kept_by_another_extension")


class _Count:
    calls = 0


class _Layer(nn.Module):
    """Acts in its first two calls."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += 1
        return x * (1.5 if self._calls <= 2 else 1.0)


def made_first(out: Tensor) -> Tensor:
    global _cache
    _cache = out.detach().clone() if _cache is None else _cache
    return out + 0.5 * _cache


def made_last(out: Tensor) -> Tensor:
    global _cache
    last, _cache = _cache, out.detach().clone()
    return out if last is None or last.shape != out.shape else out + 0.5 * last


def in_a_class(out: Tensor) -> Tensor:
    _Count.calls += 1
    return out * (1.5 if _Count.calls <= 2 else 1.0)


def in_a_module(out: Tensor) -> Tensor:
    _elsewhere.calls += 1
    return out * (1.5 if _elsewhere.calls <= 2 else 1.0)


def in_a_namespace(out: Tensor) -> Tensor:
    _names.calls += 1
    return out * (1.5 if _names.calls <= 2 else 1.0)


Acts = Callable[[Tensor], Tensor]


@pytest.fixture
def unet(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    monkeypatch.setitem(sys.modules, _elsewhere.__name__, _elsewhere)
    model: nn.Module = host.shared.sd_model.model.diffusion_model
    yield model
    for module in model.modules():
        vars(module).pop("forward", None)


def generated(host: Host, unet: nn.Module, settings: dict[str, Any], acts: Acts | None) -> tuple[Tensor, str]:
    global _cache
    _cache, _Count.calls, _elsewhere.calls, _names.calls = None, 0, 0, 0
    block = unet.get_submodule("output_blocks.1")
    if acts is None:
        block.append(_Layer())
    else:
        original = type(block).forward.__get__(block)
        block.forward = lambda *args, **kwargs: acts(original(*args, **kwargs))  # type: ignore[method-assign]
    try:
        done = host.processing.process_images(host.processing_for(settings, steps=4))
        return done.latents[0], done.infotexts[0]
    finally:
        if acts is None:
            del block[-1]


@pytest.mark.parametrize("settings", [{"pag_scale": 1e-9}, {"sag_scale": 1e-9, "sag_threshold": 0}], ids=str)
@pytest.mark.parametrize("acts", [made_first, made_last, in_a_class, in_a_module, in_a_namespace, None])
def test_the_hosts_calls_are_as_without_us(
    host: Host, unet: nn.Module, acts: Acts | None, settings: dict[str, Any]
) -> None:
    plain, _ = generated(host, unet, {}, acts)
    guided, text = generated(host, unet, settings, acts)
    torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)
    assert "note" not in text


def test_more_than_can_be_looked_at(host: Host, unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody knows whether everything was put back: the picture is not guided and says why."""
    plain, _ = generated(host, unet, {}, in_a_class)
    monkeypatch.setattr("sag_pag.neighbours.state._MOST", 3)
    guided, text = generated(host, unet, {"pag_scale": 3}, in_a_class)
    torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)
    assert "PAG: True" not in text
    assert "beside test_kept_elsewhere: it keeps more than can be put back" in text
