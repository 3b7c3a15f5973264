"""Doubles of real extensions in the U-Net: a call of ours changes nothing for them, nor they for it.

Each double is of one kind; ``stands_for`` says for which real extensions it stands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FunctionType
from typing import Any

import pytest
import torch
from double import Host
from mechanisms import MECHANISMS
from stands_for import STANDS_FOR
from torch import Tensor, nn

SWAPPED = {"pag_scale": 3, "pag_perturbation": "swapped tokens"}
SETTINGS = [{"pag_scale": 20}, {"sag_scale": 5, "sag_threshold": 3}]
"""With which guidance does nothing where the map has one token."""

GENERATOR = random.Random()
Put = Callable[[nn.Module], None]


def counter(unet: nn.Module) -> None:
    """Every second call of the U-Net is taken for the negative prompt's."""
    attentions = [module for path, module in unet.named_modules() if path.endswith("attn2")]
    seen = {"calls": 0}

    def made(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            negative = seen["calls"] // len(attentions) % 2
            seen["calls"] += 1
            return original(x, *args, **kwargs) * (0.5 if negative else 1.5)

        return forward

    for attention in attentions:
        attention.forward = made(attention.forward)  # type: ignore[method-assign]


def hook(unet: nn.Module) -> None:
    """Its second call sees what its first noted, on the module itself."""
    def note(module: Any, args: Any, out: Tensor) -> Tensor:
        first, second = out.chunk(2) if len(out) % 2 == 0 else (out, out)
        module.noted = getattr(module, "noted", 0) + 1
        return torch.cat([first * (1 + module.noted % 2), second]) if len(out) % 2 == 0 else out

    unet.get_submodule("input_blocks.1").register_forward_hook(note)


def generator(unet: nn.Module) -> None:
    """Draws in every call, also in ones that leave out the blocks before."""
    GENERATOR.seed(5)
    for path, module in unet.named_modules():
        if path.endswith("attn1") and not path.startswith("middle"):  # there nothing of it may be left in identity
            module.forward = drawing(module.forward)  # type: ignore[method-assign]


def drawing(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs) * GENERATOR.uniform(0.5, 1.5)

    return forward


def first_call(unet: nn.Module) -> None:
    """Noise is drawn once and kept; each call draws other noise beside."""
    kept: dict[str, Tensor] = {}
    block = unet.get_submodule("input_blocks.1")
    original = block.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "noise" not in kept:
            kept["noise"] = torch.randn(x.shape)
        out: Tensor = original(x + kept["noise"], *args, **kwargs)
        return out + torch.randn(out.shape)

    block.forward = forward  # type: ignore[method-assign]


@pytest.fixture
def unet(host: Host) -> Iterator[nn.Module]:
    model: nn.Module = host.shared.sd_model.model.diffusion_model
    yield model
    for module in model.modules():
        for name in ("forward", "_forward", "noted"):
            vars(module).pop(name, None)
        module._forward_hooks.clear()


def small(host: Host, settings: dict[str, Any], *, put_on: Put, unet: nn.Module, **fields: Any) -> tuple[Tensor, str]:
    """A picture whose middle map has one token, beside a fresh neighbour, with its text."""
    for module in unet.modules():
        vars(module).pop("forward", None)
        vars(module).pop("noted", None)
        module._forward_hooks.clear()
    put_on(unet)
    torch.manual_seed(3)
    p = host.processing_for(settings, **fields)
    p.noise = lambda size: host.sd_models.seeded("small", p.batch_size, 4, 2, 2)
    done = host.processing.process_images(p)
    return done.latents[0], done.infotexts[0]


@pytest.mark.parametrize("apart", [False, True], ids=["one call", "prompts apart"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("put_on", [counter, hook, generator, first_call])
def test_nothing_of_the_neighbours_is_guidance(
    host: Host, unet: nn.Module, put_on: Put, settings: dict[str, Any], apart: bool
) -> None:
    fields: dict[str, Any] = {"batch_size": 2}
    if apart:
        fields["negative_prompt"] = "blurry and much longer than the prompt is"
    plain, _ = small(host, {}, put_on=put_on, unet=unet, **fields)
    guided, text = small(host, settings, put_on=put_on, unet=unet, **fields)
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=2e-3)
    assert "note" not in text


@pytest.mark.parametrize("lowvram", [False, True])
@pytest.mark.parametrize("put_on", [counter, hook, generator, first_call])
def test_the_hosts_calls_are_as_without_us(host: Host, unet: nn.Module, put_on: Put, lowvram: bool) -> None:
    """At a scale near 0 the picture is the unguided one, though calls of ours were made."""
    host.shared.sd_model.lowvram = lowvram
    for settings in ({"pag_scale": 1e-9}, {"sag_scale": 1e-9, "sag_threshold": 0}):
        plain, _ = small(host, {}, put_on=put_on, unet=unet)
        guided, _ = small(host, settings, put_on=put_on, unet=unet)
        torch.testing.assert_close(guided, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draws", [False, True])
def test_extra_rows_ride_along_beside_token_merging(host: Host, unet: nn.Module, draws: bool) -> None:
    """If it draws nothing: then the rows of a call, or how many there are, are nothing to it."""
    def keep_size(module: Any, args: Any) -> None:
        module._tome_info["size"] = args[0].shape[2:]

    names = {"__name__": "tomesd.patch"}
    unet._tome_info = {"args": {"use_rand": draws}}  # type: ignore[assignment]
    handle = unet.register_forward_pre_hook(FunctionType(keep_size.__code__, names))
    try:
        calls = host.rows(lambda: host.generate({"pag_scale": 3}))
    finally:
        handle.remove()
        del unet._tome_info
    assert set(calls) == ({2} if draws else {3})


@pytest.mark.parametrize("put_on", [counter, hook, generator])
def test_what_the_real_ones_need(
    host: Host, unet: nn.Module, put_on: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a picture beside the double goes wrong, or is not guided. The same is tried beside the real ones."""
    taken = MECHANISMS[STANDS_FOR[put_on.__name__].needs]
    owner = getattr(import_module(taken.module), taken.owner)
    fields: dict[str, Any] = {"batch_size": 2}
    if put_on is counter:
        fields["negative_prompt"] = "blurry and much longer than the prompt is"
    plain, _ = small(host, {}, put_on=put_on, unet=unet, **fields)
    monkeypatch.setattr(owner, taken.method, taken.replacement)
    tiny = [{"pag_scale": 1e-9}, {"sag_scale": 1e-9, "sag_threshold": 0}]
    made = [small(host, settings, put_on=put_on, unet=unet, **fields) for settings in (*SETTINGS, *tiny)]
    assert any("not applied" in text or not torch.allclose(picture, plain, atol=0.02) for picture, text in made)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_was_done_to_weights_is_not_done_once_more(host: Host, unet: nn.Module, settings: dict[str, Any]) -> None:
    """As LoRA does, a layer changes its weights in the first call and notes on itself that it has. A call of ours finds
    the weights changed, and so the note too.
    """
    layer: Any = unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2.to_v")
    weight = layer.weight.clone()

    def patched(_: nn.Module) -> None:
        layer.weight.copy_(weight)
        original = layer.forward

        def forward(x: Tensor) -> Tensor:
            if getattr(layer, "noted", ()) != ("lora", 1.0):
                layer.weight.add_(1.0)
                layer.noted = ("lora", 1.0)
            out: Tensor = original(x)
            return out

        layer.forward = forward

    try:
        plain, _ = small(host, {}, put_on=patched, unet=unet)
        guided, text = small(host, settings, put_on=patched, unet=unet)
    finally:
        layer.weight.copy_(weight)
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=2e-3)
    assert "note" not in text


def test_a_call_that_cannot_be_made_once_more(host: Host, unet: nn.Module) -> None:
    """The picture is the unguided one and says so."""
    beyond_reach = torch.zeros(1)

    def unrepeatable(model: nn.Module) -> None:
        beyond_reach.zero_()
        block = model.get_submodule("input_blocks.1")
        original = block.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            beyond_reach.add_(1)
            return original(x, *args, **kwargs) * (1 + 0.1 * beyond_reach)  # type: ignore[no-any-return]

        block.forward = forward  # type: ignore[method-assign]

    guided, text = small(host, {"pag_scale": 3}, put_on=unrepeatable, unet=unet)
    assert guided.isfinite().all()
    assert "PAG: True" not in text
    assert "not applied, beside test_unnoticed: a call made once more gives something else" in text


def test_a_call_that_fails_when_made_once_more(host: Host, unet: nn.Module) -> None:
    beyond_reach = torch.zeros(1)

    def failing(model: nn.Module) -> None:
        beyond_reach.zero_()

        def note(_: Any, args: Any, out: Tensor) -> None:
            beyond_reach.add_(1)
            if int(beyond_reach) == 2:
                raise IndexError

        model.get_submodule("input_blocks.1").register_forward_hook(note)

    _, text = small(host, {"pag_scale": 3}, put_on=failing, unet=unet)
    assert "a call made once more failed with IndexError" in text


@pytest.mark.parametrize("settings", [{"pag_scale": 3}, {"sag_scale": 1}, {"pag_scale": 3, "sag_scale": 1}], ids=str)
def test_cached_steps(host: Host, unet: nn.Module, settings: dict[str, Any]) -> None:
    """Full steps are guided; the text says of the others."""
    def cached(model: nn.Module) -> None:
        middle, seen = model.get_submodule("middle_block"), {"calls": 0}
        original = model.forward
        kept: dict[str, Tensor] = {}
        run = middle.forward

        def through(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if seen["calls"] % 2:
                return kept["last"]
            kept["last"] = run(x, *args, **kwargs)
            return kept["last"]

        def forward(*args: Any, **kwargs: Any) -> Any:
            middle.forward = through  # type: ignore[method-assign]
            out = original(*args, **kwargs)
            seen["calls"] += 1
            return out

        model.forward = forward  # type: ignore[method-assign]

    cached(unet)
    done = host.processing.process_images(host.processing_for(settings, steps=4))
    assert "applied in 2 of 4 steps" in done.infotexts[0]
    assert "beside test_unnoticed: the self-attention of middle.0 did not run in every step" in done.infotexts[0]
    assert STANDS_FOR["cached steps"].says in done.infotexts[0]


class MultiDiffusion:
    """Tiles of half the height, ``at_once`` of them in a call of the U-Net, one behind the other."""

    def __init__(self, inner: Any, *, at_once: int, size: tuple[int, int]) -> None:
        self.sampler_forward = inner.forward
        self.at_once = at_once
        self.h, self.w = size

    @torch.no_grad()  # wrapped in a function of torch's, as theirs is
    def kdiff_forward(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        tiles, outs = list(x.chunk(4, dim=2)), []
        for first in range(0, 4, self.at_once):
            part = tiles[first : first + self.at_once]
            conds = {
                key: [torch.cat([c] * len(part)) for c in value] if isinstance(value, list) else value
                for key, value in cond.items()
            }
            out = self.sampler_forward(torch.cat(part), sigma.repeat(len(part)), cond=conds)
            outs += out.chunk(len(part))
        return torch.cat(outs, dim=2)


def tiled(host: Host, *, at_once: int) -> None:
    def install(params: Any) -> None:
        inner = params.denoiser.inner_model
        if "forward" not in vars(inner):
            inner.forward = MultiDiffusion(inner, at_once=at_once, size=tuple(params.x.shape[2:])).kdiff_forward

    callbacks = host.script_callbacks.callbacks["cfg_denoiser"]
    callbacks[:] = [callback for callback in callbacks if callback.__name__ != "install"]
    callbacks.insert(0, install)


@pytest.mark.parametrize("lowvram", [False, True])
@pytest.mark.parametrize("settings", [{"pag_scale": 3}, SWAPPED], ids=str)
def test_tiles_of_tiled_diffusion(host: Host, settings: dict[str, Any], lowvram: bool) -> None:
    """However many tiles make a call, the picture is the same, and a guided one."""
    host.shared.sd_model.lowvram = lowvram
    pictures = {}
    for at_once in (1, 3, 4):
        tiled(host, at_once=at_once)
        pictures[at_once] = host.generate(settings)[0]
    assert lowvram or str(host.calls[-1]) == STANDS_FOR["tiles"].calls
    plain = host.generate({})[0]
    torch.testing.assert_close(pictures[4], pictures[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pictures[3], pictures[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pictures[4], plain, atol=1e-2)


def test_sag_in_tiles_is_refused_by_name(host: Host) -> None:
    tiled(host, at_once=4)
    status, answer = host.processing.answer(
        host.txt2img, host.processing.Processing(), {host.script.title(): [{"sag_scale": 1}]}
    )
    assert status == 422
    assert answer["body"]["neighbour"] == "Tiled Diffusion"
    assert answer["detail"] == (
        "SAG can't be used beside Tiled Diffusion here: switch SAG off, or Tiled Diffusion; PAG works in tiles"
    )


def test_more_frames_than_a_window_are_refused_by_name(host: Host) -> None:
    """The double is AnimateDiff's denoiser, a88e889."""
    class Params:
        video_length, batch_size = 4, 2

    def install(params: Any) -> None:
        inner, ad_params = params.denoiser.inner_model, Params()
        if "forward" in vars(inner):
            return
        original = inner.forward

        def mm_sd_forward(self: Any, x_in: Tensor, sigma_in: Tensor, cond: Any) -> Any:
            return original(x_in[: ad_params.batch_size], sigma_in, cond=cond)

        inner.forward = mm_sd_forward.__get__(inner)

    host.script_callbacks.callbacks["cfg_denoiser"].insert(0, install)
    status, answer = host.processing.answer(
        host.txt2img, host.processing.Processing(), {host.script.title(): [{"pag_scale": 3}]}
    )
    assert status == 422
    assert answer["body"]["neighbour"] == "AnimateDiff"
    assert "number of frames (4)" in answer["detail"]
