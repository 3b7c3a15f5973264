"""Regional Prompter's latent mode sorts the conditional rows by sub-prompt for the time of the calls.

Stands for be62345, with which ``tests/neighbours/test_regions.py`` compares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from double import Host

BOTH = {"sag_scale": 1, "pag_scale": 3, "rescale": 0.5}
PROMPT = "a cat AND a dog :0.5 AND fog"


class Sorter:
    """Rows ``[every sub-prompt of each image]`` become ``[every image of each sub-prompt]``, and back afterwards."""

    def __init__(self, host: Host, *, images: int, prompts: int) -> None:
        self.order = [image * prompts + prompt for prompt in range(prompts) for image in range(images)]
        host.script_callbacks.on_cfg_denoiser(self.sort)
        host.script_callbacks.on_cfg_denoised(lambda params: self.put(params.x, params.x.clone(), back=True))

    def sort(self, params: Any) -> None:
        for rows in (params.x, params.image_cond, params.sigma, params.text_cond):
            self.put(rows, rows.clone())

    def put(self, rows: Any, before: Any, *, back: bool = False) -> None:
        for place, row in enumerate(self.order):
            rows[row if back else place] = before[place if back else row]


def generated(host: Host, settings: dict[str, Any], **fields: Any) -> Sequence[Any]:
    return host.generate(settings, prompt=PROMPT, batch_size=2, steps=2, **fields)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize("batched", [True, False])
def test_each_picture_gets_its_own_guidance(host: Host, batched: bool, sampler: str) -> None:
    host.shared.opts.batch_cond_uncond = batched
    expected = generated(host, BOTH, sampler_name=sampler)
    plain = generated(host, {}, sampler_name=sampler)
    Sorter(host, images=2, prompts=3)
    for actual, guided, unguided in zip(generated(host, BOTH, sampler_name=sampler), expected, plain, strict=True):
        torch.testing.assert_close(actual, guided, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(guided, unguided, atol=1e-2)


def test_latents_that_tell_no_order(host: Host) -> None:
    """An extension that gives the sub-prompts latents of their own: the rows are what the host has announced."""
    expected = generated(host, BOTH)
    seen: list[int] = []

    def change(params: Any) -> None:
        seen.append(len(params.x))
        params.x[0] += 1e-6

    host.script_callbacks.on_cfg_denoiser(change)
    for actual, guided in zip(generated(host, BOTH), expected, strict=True):
        torch.testing.assert_close(actual, guided, rtol=1e-3, atol=1e-3)
    assert seen


class Regions(Sorter):
    """Each sub-prompt's prediction stands in its own third of the width; elsewhere it is the unconditional one."""

    def put(self, rows: Any, before: Any, *, back: bool = False) -> None:
        super().put(rows, before, back=back)
        if back:
            width = rows.shape[-1]
            for image, prompt in ((image, prompt) for image in range(2) for prompt in range(3)):
                row, left = image * 3 + prompt, prompt * width // 3
                kept = rows[row, ..., left : left + width // 3].clone()
                rows[row] = rows[len(rows) - 2 + image]
                rows[row, ..., left : left + width // 3] = kept


@pytest.mark.parametrize("settings", [{"pag_scale": 3}, BOTH, {**BOTH, "rescale_mode": "partial"}], ids=str)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_a_prompt_guides_its_region_alone(host: Host, settings: dict[str, Any], sampler: str) -> None:
    """The same prompt in every region is that prompt in the whole picture."""
    fields = {"batch_size": 2, "steps": 2, "sampler_name": sampler}
    expected, plain = host.generate(settings, prompt="a cat", **fields), host.generate({}, prompt="a cat", **fields)
    Regions(host, images=2, prompts=3)
    regional = host.generate(settings, prompt="a cat AND a cat AND a cat", **fields)
    for actual, guided, unguided in zip(regional, expected, plain, strict=True):
        torch.testing.assert_close(actual, guided, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(guided, unguided, atol=1e-2)
