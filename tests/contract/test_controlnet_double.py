"""A double of ControlNet (sd-webui-controlnet 56cec5b2): it replaces the U-Net's forward, runs a model of its own on
the call's rows there, and keeps by row what it makes in its first call. Its reference modes look at all rows together.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host
from stands_for import STANDS_FOR
from torch import Tensor, nn


class ControlModel(nn.Module):
    """Counts its calls in a tensor, which nobody puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, context: Tensor) -> list[Tensor]:
        self.get_buffer("calls").add_(1)
        return [0.3 * x.tanh() * context.mean(dim=(1, 2))[:, None, None, None]]


class Unit:
    def __init__(self, kind: str) -> None:
        self.control_model_type = SimpleNamespace(name=kind)
        self.control_model = ControlModel()
        self.hint_cond = torch.zeros(1, 3, 8, 8)
        self.hr_hint_cond = None
        self.used_hint_cond_latent: Tensor | None = None
        self.used_hint_inpaint_hijack = None


class UnetHook(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.control_params = [Unit(kind) for kind in kinds]

    def hook(self, model: Any, process: Any, *, known: bool) -> None:
        outer = self
        original = model.forward

        def forward(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            out: Tensor = original(x, timesteps, context=context)
            for unit in outer.control_params:
                if unit.used_hint_cond_latent is None:
                    unit.used_hint_cond_latent = context.mean(dim=(1, 2))[:, None, None, None].clone()
                if not hasattr(process, "controlnet_vae_cache"):
                    process.controlnet_vae_cache = SimpleNamespace(cache={})
                if "hint" not in process.controlnet_vae_cache.cache:
                    process.controlnet_vae_cache.cache["hint"] = torch.randn(4)
                noise = torch.randn(1) if unit.control_model_type.name == "AttentionInjection" else 0
                out = out + unit.control_model(x=x, context=context)[0] + unit.used_hint_cond_latent + noise
            return out

        def forward_webui(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            return forward(x, timesteps, context)

        if not known:
            forward_webui.__qualname__ = "forward_of_somebody"
        model.forward = forward_webui


@pytest.fixture
def unet(host: Host) -> Iterator[nn.Module]:
    model: nn.Module = host.shared.sd_model.model.diffusion_model
    yield model
    vars(model).pop("forward", None)


def made(
    host: Host, unet: nn.Module, settings: dict[str, Any], *kinds: str, known: bool = True, **fields: Any
) -> tuple[Tensor, str, list[int], float]:
    """The picture, its text, the rows of the U-Net's calls, and how often the first unit's model has run."""
    vars(unet).pop("forward", None)
    hook, p = UnetHook(*kinds), host.processing_for(settings, **fields)
    hook.hook(unet, p, known=known)
    before = len(host.calls)
    torch.manual_seed(1)
    done = host.processing.process_images(p)
    ran = float(hook.control_params[0].control_model.get_buffer("calls"))
    return torch.stack(done.latents), done.infotexts[0], host.calls[before:], ran


@pytest.mark.parametrize("fields", [{}, {"batch_size": 2}], ids=str)
@pytest.mark.parametrize("settings", [{"pag_scale": 3}, {"sag_scale": 1}, {"pag_scale": 3, "sag_scale": 1}], ids=str)
@pytest.mark.parametrize("kinds", [("ControlNet",), ("ControlNet", "InstantID")], ids=str)
def test_the_picture_is_that_of_the_rows_made_once_more(
    host: Host, unet: nn.Module, kinds: tuple[str, ...], settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    """It is what the host's rows, all run once more, give. Nobody knows of the second one who it is."""
    picture, text, calls, _ = made(host, unet, settings, *kinds, **fields)
    expected, _, repeated, _ = made(host, unet, settings, *kinds, known=False, **fields)
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)
    assert "note" not in text
    assert sum(calls) < sum(repeated)


def test_its_models_run_once_a_step_for_pag(host: Host, unet: nn.Module) -> None:
    _, _, calls, ran = made(host, unet, {"pag_scale": 3}, "ControlNet", steps=3)
    assert calls == [2, 1] * 3
    assert STANDS_FOR["ControlNet"].calls == "+".join(map(str, calls[:2]))
    assert ran == 3


def test_a_reference_is_encoded_once_more(host: Host, unet: nn.Module) -> None:
    """The first call draws for the encoding and the noise; ours finds neither made, and so draws the same."""
    picture, text, calls, _ = made(host, unet, {"sag_scale": 1e-9, "sag_threshold": 0}, "AttentionInjection")
    plain, *_ = made(host, unet, {}, "AttentionInjection")
    torch.testing.assert_close(picture, plain, rtol=1e-5, atol=1e-5)
    assert "note" not in text
    assert calls == [2] * 7
