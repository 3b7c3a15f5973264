"""The other perturbations through the script itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import TITLE, Host

BLURRED = {"pag_scale": 3, "pag_perturbation": "blurred queries"}
SWAPPED = {"pag_scale": 3, "pag_perturbation": "swapped tokens", "pag_blocks": "input.1"}
KINDS = [BLURRED, {**BLURRED, "pag_query_blur": 1.5}, SWAPPED, {**SWAPPED, "pag_swap": 0.4}]
named = pytest.mark.parametrize("settings", KINDS, ids=["mean", "blurred", "swapped", "more swapped"])


def infotext(host: Host, settings: dict[str, Any]) -> str:
    return str(host.processing.process_images(host.processing_for(settings)).infotexts[0])


@named
def test_each_is_a_guidance_of_its_own(host: Host, settings: dict[str, Any]) -> None:
    made = host.generate(settings)[0]
    others = [other for other in (*KINDS, {}, {"pag_scale": 3}) if other is not settings]
    assert all(not torch.allclose(made, host.generate(other)[0], atol=1e-3) for other in others)


@named
@pytest.mark.parametrize("way", ["own call", "batch off", "three apart"])
def test_whatever_calls_are_made(host: Host, settings: dict[str, Any], way: str) -> None:
    fields = {"prompt": "a cat AND a dog :0.5", "batch_size": 2}
    expected = host.generate(settings, **fields)
    host.shared.sd_model.lowvram = way == "own call"
    host.shared.opts.batch_cond_uncond = way != "batch off"
    if way == "three apart":
        fields["negative_prompt"] = "a very long prompt with more words than fit"
        host.shared.opts.batch_cond_uncond = True
        expected = host.generate(settings, **fields)
        host.shared.opts.batch_cond_uncond = False
    for a, e in zip(host.generate(settings, **fields), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@named
def test_at_scale_0_and_off_it_is_not_there(host: Host, settings: dict[str, Any]) -> None:
    expected = host.plain()[0]
    assert torch.equal(host.generate({**settings, "pag_scale": 0})[0], expected)
    assert torch.equal(host.generate({**settings, "pag_enabled": False})[0], expected)


def test_what_is_written_and_understood(host: Host) -> None:
    assert "PAG perturbation" not in infotext(host, {"pag_scale": 3})
    assert "PAG perturbation: blurred queries" in infotext(host, BLURRED)
    assert "PAG query blur" not in infotext(host, BLURRED)
    assert "PAG query blur: 1.5" in infotext(host, {**BLURRED, "pag_query_blur": 1.5})
    assert "PAG swap" not in infotext(host, {**BLURRED, "pag_swap": 0.4})
    assert "PAG swap: 0.4" in infotext(host, {**SWAPPED, "pag_swap": 0.4})


def test_naming_its_setting_chooses_it(host: Host) -> None:
    assert torch.equal(host.generate({"pag_query_blur": 2})[0],
                       host.generate({"pag_perturbation": "blurred queries", "pag_query_blur": 2})[0])


def test_old_lists_mean_what_they_meant(host: Host) -> None:
    old = [False, 0.75, 1.0, 1.0, "middle", 0.0, 1.0, True, 3.0, "middle", 0.0, 1.0, False, 0.0, "full", "both passes",
           False, 0.75, 3.0, False]  # fmt: skip
    assert torch.equal(host.generate(*old)[0], host.generate({"pag_scale": 3})[0])


@pytest.mark.parametrize("steps", [1, 3])
def test_merged_tokens_can_not_be_blurred(host: Host, steps: int) -> None:
    """The WebUI's own token merging leaves no map to blur over."""
    unet: Any = host.shared.sd_model.model.diffusion_model
    block = unet.get_submodule("output_blocks.3.1.transformer_blocks.0")
    attention = block.attn1

    def merging(x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        kept = attention(block.norm1(x[:, ::2])).repeat_interleave(2, dim=1)
        x = kept[:, : x.shape[1]] + x
        x = block.attn2(block.norm2(x), context=context) + x
        result: torch.Tensor = block.ff(block.norm3(x)) + x
        return result

    block.forward = merging
    try:
        p = host.processing.Processing(steps=steps)
        answer = host.processing.answer(host.txt2img, p, {TITLE: [{**BLURRED, "pag_blocks": "output.3"}]})
        assert (answer[0], answer[1]["body"]["field"]) == (422, "pag_blocks")
        assert "token merging" in answer[1]["detail"]
    finally:
        vars(block).pop("forward")
