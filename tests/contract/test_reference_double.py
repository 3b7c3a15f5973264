"""A double of ControlNet's reference modes (sd-webui-controlnet 56cec5b2): the U-Net runs on a noised reference picture
first, and each block's self-attention then looks at the tokens that the reference had there, beside its own.

What guidance must be there is worked out literally: the rows once more, with the same noise on the reference and the
conditional ones perturbed, and ``plain + scale * (cond - perturbed)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host
from mechanisms import MECHANISMS
from stands_for import STANDS_FOR
from torch import Tensor, nn

MIDDLE = "middle_block.1.transformer_blocks.0"
FIRST = "input_blocks.1.1.transformer_blocks.0"
SCALE = 3.0
FIDELITY = 0.5
SMALL = (4, 2, 2)
"""Of a latent whose middle map has one token."""


class UnetHook(nn.Module):
    """``noises`` are those drawn in each call; ``given`` takes the place of the next one."""

    def __init__(self) -> None:
        super().__init__()
        kind = SimpleNamespace(name="AttentionInjection")
        unit = SimpleNamespace(control_model_type=kind, control_model=None)
        self.control_params: list[Any] | None = [unit]
        self.attention_auto_machine = self.gn_auto_machine = SimpleNamespace(name="Read")
        self.noises: list[Tensor] = []
        self.given: Tensor | None = None
        self.writes = False

    def hook(self, model: Any, process: Any, *, blocks: list[nn.Module]) -> None:
        outer, original = self, model.forward

        def forward(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            if not hasattr(process, "controlnet_vae_cache"):
                process.controlnet_vae_cache = SimpleNamespace(cache={})
            encoded = process.controlnet_vae_cache.cache
            if "reference" not in encoded:
                encoded["reference"] = torch.randn(x.shape[1:]).expand(x.shape)
            noise = torch.randn_like(x) if outer.given is None else outer.given
            outer.noises.append(noise)
            outer.writes = True
            original(encoded["reference"][: len(x)] + noise, timesteps, context=context)
            outer.writes = False
            out: Tensor = original(x, timesteps, context=context)
            return out

        def forward_webui(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            return forward(x, timesteps, context)

        def hacked_forward(block: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
            own = block.norm1(x)
            if outer.writes:
                block.bank.append(own.clone())
                attended = block.attn1(own, context=own)
            else:
                uncond = slice(len(x) // 2, None)  # of one picture
                attended = block.attn1(own, context=torch.cat([own, *block.bank], dim=1))
                faithful = attended.clone()
                faithful[uncond] = block.attn1(own[uncond], context=own[uncond])
                attended = FIDELITY * faithful + (1 - FIDELITY) * attended
                block.bank = []
            x = attended + x
            x = block.attn2(block.norm2(x), context=context) + x
            return block.ff(block.norm3(x)) + x  # type: ignore[no-any-return]

        model.forward = forward_webui
        for block in blocks:
            block.bank = []  # type: ignore[assignment]
            block.forward = MethodType(hacked_forward, block)  # type: ignore[method-assign]


class Literally:
    """Guides a generation beside the double, by the definition."""

    def __init__(self, host: Host, unet: nn.Module, hook: UnetHook, *, scale: float) -> None:
        self.host, self.unet, self.hook, self.scale = host, unet, hook, scale
        self.out: list[Tensor] = []
        host.script_callbacks.on_cfg_denoiser(self.remember)
        host.script_callbacks.on_cfg_after_cfg(self.guide)

    def remember(self, params: Any) -> None:
        self.params = params

    def guide(self, after: Any) -> None:
        noise = self.hook.noises[-1]
        plain, perturbed = self.predicted(noise), self.perturbed(noise)
        after.x = after.x + self.scale * (plain - perturbed)[:1]

    def predicted(self, noise: Tensor) -> Tensor:
        params, self.hook.given = self.params, noise
        cond = {"c_crossattn": [torch.cat([params.text_cond, params.text_uncond])], "c_concat": [params.image_cond]}
        try:
            out: Tensor = params.denoiser.inner_model(params.x, params.sigma, cond=cond)
            return out
        finally:
            self.hook.given = None

    def perturbed(self, noise: Tensor) -> Tensor:
        attention = self.unet.get_submodule(MIDDLE + ".attn1")
        original = attention.forward

        def first_row_identity(x: Tensor, context: Tensor | None = None) -> Tensor:
            out: Tensor = original(x, context=context)
            if len(x) == 2:
                out[0] = attention.to_out(attention.to_v(x[:1]))[0]  # type: ignore[operator]
            return out

        attention.forward = first_row_identity  # type: ignore[method-assign]
        try:
            return self.predicted(noise)
        finally:
            del attention.forward


@pytest.fixture
def unet(host: Host) -> Iterator[nn.Module]:
    model: nn.Module = host.shared.sd_model.model.diffusion_model
    yield model
    taken_off(model)


def taken_off(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("forward", "bank"):
            vars(module).pop(name, None)


def made(
    host: Host, unet: nn.Module, settings: dict[str, Any], *, literally: float = 0.0, blocks: tuple[str, ...] = (),
    size: tuple[int, ...] = (),
) -> tuple[Tensor, str]:
    """The picture and its text; with ``literally`` the one that guidance of that scale gives by its definition."""
    taken_off(unet)
    hook, p = UnetHook(), host.processing_for(settings)
    if size:
        p.noise = lambda _: host.sd_models.seeded("small", 1, *size)
    blocks = blocks or tuple(path for path, module in unet.named_modules() if type(module).__name__.startswith("Basic"))
    hook.hook(unet, p, blocks=[unet.get_submodule(path) for path in blocks])
    torch.manual_seed(1)
    if literally:
        with host.without_extension():
            Literally(host, unet, hook, scale=literally)
            done = host.processing.process_images(p)
    else:
        done = host.processing.process_images(p)
    return done.latents[0], done.infotexts[0]


@pytest.mark.parametrize(("still", "expected"), [
    ("there", [2] * 5), ("aligned", [2] * 5), ("noted", [2, 2, 2, 3]), ("gone", [3, 3]),
])
def test_what_it_leaves_on_the_blocks(host: Host, unet: nn.Module, still: str, expected: list[int]) -> None:
    """When it is done the blocks' own forward is in what it has put there: extra rows may ride along again."""
    hook, block = UnetHook(), unet.get_submodule(FIRST)
    hook.hook(unet, None, blocks=[block])
    del unet.forward
    if still != "there":
        hook.control_params = None
    if still == "noted":
        block.bank = [torch.zeros(2, 64, 32)]  # type: ignore[assignment]
    if still == "aligned":
        hook.attention_auto_machine = SimpleNamespace(name="StyleAlign")
    assert host.rows(lambda: host.generate({"pag_scale": 3}, steps=2)) == expected


@pytest.mark.parametrize("size", [(), SMALL], ids=["many tokens", "one token"])
def test_guidance_is_what_its_definition_says_from_the_first_step_on(
    host: Host, unet: nn.Module, size: tuple[int, ...]
) -> None:
    picture, text = made(host, unet, {"pag_scale": SCALE}, size=size)
    expected, _ = made(host, unet, {}, literally=SCALE, size=size)
    plain, _ = made(host, unet, {}, size=size)
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(picture, plain, atol=1e-2), "one token of its own is two with the reference's"
    assert "note" not in text


def test_one_token_without_the_references_is_not_guided(host: Host, unet: nn.Module) -> None:
    """There identity is attention, though other blocks look at the reference."""
    picture, _ = made(host, unet, {"pag_scale": 20}, blocks=(FIRST,), size=SMALL)
    plain, _ = made(host, unet, {}, blocks=(FIRST,), size=SMALL)
    torch.testing.assert_close(picture, plain, rtol=1e-4, atol=2e-3)


def test_what_the_real_one_needs(host: Host, unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it there is no picture beside the double. The same is tried beside the real extension."""
    taken = MECHANISMS[STANDS_FOR["reference"].needs]
    monkeypatch.setattr(getattr(import_module(taken.module), taken.owner), taken.method, taken.replacement)
    _, text = made(host, unet, {"sag_scale": 5, "sag_threshold": 3}, size=SMALL)
    assert "a call made once more gives something else" in text


@pytest.mark.parametrize("own_call", [False, True])
def test_the_blur_of_one_token_changes_nothing(host: Host, unet: nn.Module, own_call: bool) -> None:
    """Whatever keys and values it looks at: the reference's stay."""
    host.shared.sd_model.lowvram = own_call
    settings = {"pag_scale": 20, "pag_perturbation": "blurred queries"}
    picture, text = made(host, unet, settings, size=SMALL)
    plain, _ = made(host, unet, {}, size=SMALL)
    torch.testing.assert_close(picture, plain, rtol=1e-4, atol=2e-3)
    assert "PAG perturbation: blurred queries" in text
    host.shared.sd_model.lowvram = False


def test_sag_with_an_empty_mask_changes_nothing(host: Host, unet: nn.Module) -> None:
    picture, text = made(host, unet, {"sag_scale": 5, "sag_threshold": 3}, size=SMALL)
    plain, _ = made(host, unet, {}, size=SMALL)
    torch.testing.assert_close(picture, plain, rtol=1e-4, atol=2e-3)
    assert "SAG: True" in text
