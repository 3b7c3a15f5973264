"""What a model has, and when: refiners, hires checkpoints, wrapped blocks, merged tokens, "Tiling"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import TITLE, Host
from torch import Tensor, nn

NOTE = "SAG/PAG note"


def infotext(host: Host, *args: Any, **fields: Any) -> str:
    text, = host.processing.process_images(host.processing_for(*args, **fields)).infotexts
    return str(text)


@pytest.mark.parametrize(("extra", "noted"), [
    ({}, True), ({"pag_end": 0.4}, False), ({"pag_start": 0.3, "pag_end": 0.5}, False), ({"pag_fade": True}, True),
    ({"pag_end": 0.4, "sag_scale": 1}, False),
])
def test_a_note_only_where_guidance_would_have_acted(host: Host, extra: dict[str, Any], noted: bool) -> None:
    """The refiner, which lacks the block, takes over at 0.5; out of its range it would have done nothing anyway."""
    text = infotext(
        host, {"pag_scale": 3, "pag_blocks": "input.1, middle", **extra}, refiner=host.checkpoint("refiner"), steps=4
    )
    assert (NOTE in text) is noted


def test_no_note_at_scale_0(host: Host) -> None:
    settings = {"pag_scale": 0, "pag_blocks": "input.1, middle"}
    assert NOTE not in infotext(host, settings, refiner=host.checkpoint("refiner"), steps=4)


class TestAnotherModel:
    """The blocks are checked against the model that is guided first, wherever that comes in."""

    def test_only_the_hires_pass_is_guided(self, host: Host) -> None:
        settings = {"pag_scale": 3, "pag_blocks": "middle.1", "hires_pass": "hires pass"}
        p = host.processing_for(settings, enable_hr=True, hr_checkpoint=host.checkpoint("sdxl"))
        result = host.processing.process_images(p)
        assert NOTE not in result.infotexts[0]
        assert "PAG blocks: middle.1" in result.infotexts[0]
        plain = host.plain(enable_hr=True, hr_checkpoint=host.checkpoint("sdxl"))
        assert not torch.equal(result.latents[0], plain[0])

    def test_only_the_refiner_is_guided(self, host: Host) -> None:
        host.use("refiner")
        settings = {"pag_scale": 3, "pag_blocks": "input.1", "pag_start": 0.6}
        assert NOTE not in infotext(host, settings, refiner=host.checkpoint("sd1"), steps=4)

    @pytest.mark.parametrize(("settings", "fields"), [
        ({"pag_blocks": "output.9", "hires_pass": "hires pass"}, {"enable_hr": True, "hr_checkpoint": "sdxl"}),
        ({"pag_blocks": "input.1", "pag_start": 0.6}, {"refiner": "refiner", "steps": 4}),
    ])
    def test_a_block_that_it_lacks_is_refused(
        self, host: Host, settings: dict[str, Any], fields: dict[str, Any]
    ) -> None:
        given = {name: host.checkpoint(value) if isinstance(value, str) else value for name, value in fields.items()}
        p = host.processing.Processing(**given)
        status, body = host.processing.answer(host.txt2img, p, {TITLE: [settings]})
        assert (status, body["body"]["field"]) == (422, "pag_blocks")

    def test_a_word_that_is_no_block_is_refused_at_once(self, host: Host) -> None:
        before = len(host.calls)
        p = host.processing.Processing(enable_hr=True, hr_checkpoint=host.checkpoint("sdxl"))
        settings = {"pag_blocks": "centre", "hires_pass": "hires pass"}
        assert host.processing.answer(host.txt2img, p, {TITLE: [settings]})[0] == 422
        assert len(host.calls) == before

    def test_the_first_pass_is_guided_too(self, host: Host) -> None:
        """Then the first model is the one that is asked, before anything is computed."""
        before = len(host.calls)
        p = host.processing.Processing(enable_hr=True, hr_checkpoint=host.checkpoint("sdxl"))
        assert host.processing.answer(host.txt2img, p, {TITLE: [{"pag_blocks": "middle.1"}]})[0] == 422
        assert len(host.calls) == before


@pytest.mark.parametrize("settings", [
    {"pag_scale": 3}, {"sag_scale": 1}, {"pag_blocks": "middle", "sag_block": "middle"},
])
def test_a_model_without_the_default_block(host: Host, settings: dict[str, Any]) -> None:
    """Nobody has typed it: the nearest block stands in, and the picture says which."""
    host.use("no-middle")
    p = host.processing_for(settings)
    result = host.processing.process_images(p)
    feature = "PAG" if "pag_scale" in settings or "pag_blocks" in settings else "SAG"
    assert f"{feature} at input.3, this model has no middle" in result.infotexts[0]
    named = {name: value for name, value in settings.items() if name not in ("pag_blocks", "sag_block")}
    blocks = {f"{name}_{'blocks' if name == 'pag' else 'block'}": "input.3" for name in ("pag", "sag")
              if any(key.startswith(name) for key in settings)}  # fmt: skip
    assert torch.equal(result.latents[0], host.generate({**named, **blocks})[0])
    assert not torch.equal(result.latents[0], host.plain()[0])


class Scaler(nn.Module):
    """Kohya's hires. fix puts one around a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.block(h, *args, **kwargs)
        return out


@pytest.mark.parametrize("name", ["input.1", "middle", "output.1"])
def test_a_block_in_a_wrapper(host: Host, name: str) -> None:
    """It is still the block of its name, and what is in it is found."""
    unet: Any = host.shared.sd_model.model.diffusion_model
    settings = {"pag_scale": 3, "pag_blocks": name, "sag_block": name, "sag_scale": 1}
    expected = host.generate(settings)[0]
    part, _, index = name.partition(".")
    holder, key = (unet, "middle_block") if part == "middle" else (getattr(unet, f"{part}_blocks"), index)
    block = holder._modules[key]
    holder._modules[key] = Scaler(block)
    try:
        result = host.processing.process_images(host.processing_for(settings))
    finally:
        holder._modules[key] = block
    assert NOTE not in result.infotexts[0]
    torch.testing.assert_close(result.latents[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_block_whose_tokens_are_merged(host: Host, steps: int) -> None:
    """The WebUI's own option halves the tokens that a self-attention sees: SAG can't read it, and says what to do."""
    unet: Any = host.shared.sd_model.model.diffusion_model
    block = unet.get_submodule("output_blocks.3.1.transformer_blocks.0")
    attention, forward = block.attn1, block.forward

    def merging(x: Tensor, context: Tensor | None = None) -> Tensor:
        kept = attention(block.norm1(x[:, ::2])).repeat_interleave(2, dim=1)
        x = kept[:, : x.shape[1]] + x
        x = block.attn2(block.norm2(x), context=context) + x
        result: Tensor = block.ff(block.norm3(x)) + x
        return result

    block.forward = merging
    try:
        p = host.processing.Processing(steps=steps)
        status, body = host.processing.answer(host.txt2img, p, {TITLE: [{"sag_block": "output.3"}]})
        assert (status, body["body"]["field"]) == (422, "sag_block")
        assert "token merging" in body["detail"]
        p = host.processing.Processing(steps=steps)
        assert host.processing.answer(host.txt2img, p, {TITLE: [{"pag_blocks": "output.3"}]})[0] == 200
    finally:
        vars(block).pop("forward")
    assert block.forward.__func__ is forward.__func__


def test_tiling(host: Host) -> None:
    """A picture whose edges meet may be rolled before or after: SAG's blur must not see an edge."""
    model = host.shared.sd_model
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    roll = {"shifts": (4, 2), "dims": (-2, -1)}
    noise = host.sd_models.seeded("tiled", 1, 4, 8, 8)

    def made(latent: Tensor) -> Tensor:
        p = host.processing_for({"sag_scale": 3, "sag_threshold": 0.5}, steps=2)
        p.noise = lambda size: latent
        result: Tensor = host.processing.process_images(p).latents[0]
        return result

    for layer in layers:
        layer.padding_mode = "circular"
    try:
        expected = torch.roll(made(noise), **roll)
        torch.testing.assert_close(made(torch.roll(noise, **roll)), expected, rtol=1e-4, atol=1e-3)
    finally:
        for layer in layers:
            layer.padding_mode = "zeros"
    assert not torch.allclose(made(torch.roll(noise, **roll)), torch.roll(made(noise), **roll), atol=1e-2)


@pytest.mark.parametrize("image_cfg_scale", [1.5, 1.0])
def test_weights_of_instruct_pix2pix(host: Host, image_cfg_scale: float) -> None:
    """Its CFG ignores a prompt's weight, and so does ours; at an image CFG scale of 1 it is CFG as usual."""
    host.use("edit")
    fields = {"image_cfg_scale": image_cfg_scale, "steps": 2}
    half = host.generate({"pag_scale": 3}, prompt="a cat :0.5", **fields)[0]
    whole = host.generate({"pag_scale": 3}, prompt="a cat", **fields)[0]
    assert torch.equal(half, whole) is (image_cfg_scale != 1.0)
