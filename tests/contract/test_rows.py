"""Whatever rows the host's calls carry, the guidance is that of a naive reference with one row a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import Host
from naive import Naive, Wanted

BOTH = {"sag_scale": 0.75, "pag_scale": 3.0}
WANTED = Wanted(sag=0.75, pag=3.0)
SAMPLERS = ("Euler", "DDIM", "DDIM CFG++")


def compare(host: Host, settings: dict[str, Any], wanted: Wanted, **fields: Any) -> None:
    fields = {"steps": 2, **fields}
    model = host.shared.sd_model
    actual = host.generate(settings, **fields)
    host.shared.sd_model = model
    with host.without_extension(), Naive(host, wanted).registered():
        expected = host.processing.process_images(host.processing.Processing(**fields)).latents
        host.script_callbacks.clear()
    host.shared.sd_model = model
    assert len(actual) == len(expected) == fields.get("batch_size", 1) * fields.get("n_iter", 1)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_there_is_something_to_see(host: Host, sampler: str) -> None:
    """Each guidance changes the picture by far more than the tolerance."""
    plain = host.plain(sampler_name=sampler)[0]
    for settings in ({"sag_scale": 0.75}, {"pag_scale": 3.0}):
        guided = host.generate(settings, sampler_name=sampler)[0]
        assert torch.linalg.vector_norm(guided - plain) > 0.01 * torch.linalg.vector_norm(plain)


@pytest.mark.parametrize(("kind", "sampler"), [
    ("sd1", "Euler"), ("sd1", "DDIM"), ("sd1", "DDIM CFG++"), ("sd1-v", "Euler"), ("sd1-v", "DDIM"),
    ("sdxl", "Euler"), ("sdxl", "DDIM CFG++"), ("inpainting", "Euler"), ("inpainting", "DDIM"),
])
def test_models_and_samplers(host: Host, kind: str, sampler: str) -> None:
    host.use(kind)
    compare(host, BOTH, WANTED, sampler_name=sampler)


@pytest.mark.parametrize("settings", [{"sag_scale": 1.0}, {"pag_scale": 2.0}], ids=["sag", "pag"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_alone(host: Host, settings: dict[str, float], sampler: str) -> None:
    wanted = Wanted(sag=settings.get("sag_scale", 0.0), pag=settings.get("pag_scale", 0.0))
    compare(host, settings, wanted, sampler_name=sampler, n_iter=2)


LONG = "a very long prompt with more words than fit"
PROMPTS = {
    "one": "a cat",
    "and": "a cat AND a dog :0.5",
    "negative weight": "a cat AND a dog :-0.7 AND fog :0.25",
    "weight alone": "a cat :0.6",
    "different in each image": "a cat AND a dog :0.5\na house",
    "unequal length": LONG,
    "unequal length with and": f"{LONG} AND a dog :0.5\na house",
}


@pytest.mark.parametrize(("name", "batched"), [
    *((name, True) for name in PROMPTS), ("one", False), ("different in each image", False),
    ("unequal length with and", False),
])
def test_prompts(host: Host, name: str, batched: bool) -> None:
    host.shared.opts.batch_cond_uncond = batched
    compare(host, BOTH, WANTED, prompt=PROMPTS[name], batch_size=2)


@pytest.mark.parametrize("prompt", ["a cat", PROMPTS["unequal length with and"]])
def test_prompts_of_sdxl(host: Host, prompt: str) -> None:
    host.use("sdxl")
    compare(host, BOTH, WANTED, prompt=prompt, batch_size=2)


def test_a_long_negative_prompt(host: Host) -> None:
    compare(host, BOTH, WANTED, negative_prompt=LONG, batch_size=2)


@pytest.mark.parametrize("low_memory", ["lowvram", "batch off"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "inpainting"])
def test_short_of_memory(host: Host, kind: str, low_memory: str) -> None:
    model = host.use(kind)
    model.lowvram = low_memory == "lowvram"
    host.shared.opts.batch_cond_uncond = low_memory == "lowvram"
    assert max(host.rows(lambda: host.generate(BOTH, batch_size=2, steps=1))) <= (4 if model.lowvram else 2)
    compare(host, BOTH, WANTED, batch_size=2)


@pytest.mark.parametrize(("prompt", "batched"), [
    ("a cat AND a dog :0.5", False), (PROMPTS["unequal length with and"], True),
])
@pytest.mark.parametrize("how", ["all steps", "every other step", "early"])
def test_without_unconditional_rows(host: Host, how: str, prompt: str, batched: bool) -> None:
    host.shared.opts.batch_cond_uncond = batched
    host.shared.opts.s_min_uncond_all = how == "all steps"
    host.shared.opts.skip_early_cond = 0.4 if how == "early" else 0.0
    s_min_uncond = 0.0 if how == "early" else 100.0
    steps = 3 if how == "every other step" else 2
    compare(host, BOTH, WANTED, prompt=prompt, batch_size=2, s_min_uncond=s_min_uncond, steps=steps)


@pytest.mark.parametrize(("image_cfg_scale", "sampler"), [
    (1.5, "Euler"), (1.5, "DDIM"), (1.0, "Euler"), (None, "Euler"),
])
def test_instruct_pix2pix(host: Host, image_cfg_scale: float | None, sampler: str) -> None:
    host.use("edit")
    compare(host, BOTH, WANTED, image_cfg_scale=image_cfg_scale, sampler_name=sampler, batch_size=2)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masks(host: Host, sampler: str, kind: str) -> None:
    """k-diffusion blends before the last callback, the others before the U-Net call."""
    nmask = torch.rand(4, 8, 6, generator=torch.Generator().manual_seed(1))
    nmask = nmask.round() if kind == "hard" else nmask
    init = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    fields = {"nmask": nmask, "init_latent": init, "batch_size": 2, "sampler_name": sampler}
    compare(host, BOTH, WANTED, **fields)
    if kind == "hard" and sampler == "Euler":
        for guided, original in zip(host.generate(BOTH, **fields), init, strict=True):
            assert torch.equal(guided[nmask == 0], original[nmask == 0])


@pytest.mark.parametrize("scale", [1.0, 0.0, 15.0])
def test_cfg_scales(host: Host, scale: float) -> None:
    compare(host, BOTH, WANTED, cfg_scale=scale)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_refiner_takes_over(host: Host, sampler: str) -> None:
    """The topology is that of the model that runs, which has fewer blocks."""
    host.use("sd1")
    settings = {**BOTH, "pag_blocks": "input.1, middle", "sag_block": "output.0"}
    read = "output_blocks.0.1.transformer_blocks.0.attn1"
    refiner = host.checkpoint("refiner")

    class Live(Naive):
        def pag(self, row: int) -> torch.Tensor:
            on_refiner = self.host.shared.sd_model is refiner
            self.wanted.blocks = ("middle_block.1",) if on_refiner else ("input_blocks.1.1", "middle_block.1")
            return super().pag(row)

    fields = {"refiner": refiner, "sampler_name": sampler, "steps": 4}
    first = host.shared.sd_model
    actual = host.generate(settings, **fields)
    assert host.shared.sd_model is refiner
    host.shared.sd_model = first
    wanted = Wanted(sag=0.75, pag=3.0, read=read)
    with host.without_extension(), Live(host, wanted).registered():
        expected = host.processing.process_images(host.processing.Processing(**fields)).latents
        host.script_callbacks.clear()
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))


@pytest.mark.parametrize(("blocks", "noted"), [("input.1, middle", "input.1"), ("input.1", "input.1"), ("middle", "")])
def test_a_refiner_without_the_blocks_is_noted(host: Host, blocks: str, noted: str) -> None:
    """Said in the picture's metadata, and once in the log: the rest of the steps is guided less than it says."""
    host.use("sd1")
    p = host.processing_for({"pag_scale": 3, "pag_blocks": blocks}, refiner=host.checkpoint("refiner"), steps=4)
    infotext, = host.processing.process_images(p).infotexts
    if noted:
        assert f"not applied to the end in {noted}: a model that took over has no such block" in infotext
    else:
        assert "SAG/PAG note" not in infotext


@pytest.mark.parametrize(("hires_pass", "noted"), [("both passes", True), ("first pass", False)])
def test_a_pass_that_is_not_guided_needs_no_blocks(host: Host, hires_pass: str, noted: bool) -> None:
    """The hires checkpoint lacks a block: that is worth a note only if its pass is to be guided."""
    host.use("sd1")
    other = host.checkpoint("refiner")

    def after_step(step: int) -> None:
        if step == 1:
            host.shared.sd_model = other

    settings = {"pag_scale": 3, "pag_blocks": "input.1", "hires_pass": hires_pass}
    p = host.processing_for(settings, enable_hr=True, steps=2, callback=after_step)
    infotext, = host.processing.process_images(p).infotexts
    assert host.shared.sd_model is other
    assert ("not applied to the end in input.1" in infotext) is noted
