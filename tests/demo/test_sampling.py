"""Sampling with the engine: plain sampling is exact, guidance changes what it should, seeds stay themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sag_pag.demo.captions import CaptionError
from sag_pag.demo.model import DemoModel
from sag_pag.demo.sampling import SAMPLERS, GuidedDenoiser, Recipe, noise_levels, noise_of, sample
from sag_pag.demo.unet import redraw_
from sag_pag.engine.step import GuidedStep
from sag_pag.settings import Settings

CAPTIONS = ["red star on green", "blue ring"]


@pytest.fixture(scope="module")
def model() -> DemoModel:
    model = redraw_(DemoModel(), seed=1, gain=0.7)
    assert isinstance(model, DemoModel)
    return model.eval().requires_grad_(False)


def gaussian(deviation: float) -> Callable[[Tensor, float], Tensor]:
    """The exact denoiser of zero-mean Gaussian data, whose flow has a closed form."""
    return lambda x, sigma: x * (deviation**2 / (deviation**2 + sigma**2))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm++2m", 2)])
def test_samplers_converge_with_their_order(sampler: str, order: int) -> None:
    """The flow keeps ``x / sqrt(deviation² + sigma²)``; from 10 to 0.1 the error falls by ``2^order`` a halving."""
    x = torch.tensor([7.0], dtype=torch.float64)
    exact = 7.0 * math.sqrt((0.5**2 + 0.1**2) / (0.5**2 + 10**2))

    def error(steps: int) -> float:
        levels = torch.logspace(1, -1, steps + 1, dtype=torch.float64).tolist()
        *_, last = SAMPLERS[sampler](gaussian(0.5), x, levels)
        return abs(float(last) - exact)

    assert 0.8 * 2**order < error(40) / error(80) < 1.25 * 2**order


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_last_step_ends_on_the_prediction(sampler: str) -> None:
    calls: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return torch.full_like(x, len(calls))

    *_, last = SAMPLERS[sampler](denoise, torch.ones(1), noise_levels(4))
    assert last.item() == len(calls)
    assert min(calls) > 0


def test_noise_levels_fall_from_pure_noise() -> None:
    levels = noise_levels(20)
    assert len(levels) == 21
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(100)
    assert levels[-1] == 0
    assert len(noise_levels(1)) == 2


def test_a_seed_is_the_same_in_any_batch(model: DemoModel) -> None:
    assert torch.equal(noise_of([5, 6], size=64)[1], noise_of([6], size=64)[0])
    recipe = Recipe(Settings.from_dict({"sag_scale": 1.0, "pag_scale": 2.0}), cfg=3, steps=3)
    both = sample(model, CAPTIONS, seeds=[5, 6], recipe=recipe, size=64)
    single = sample(model, CAPTIONS[1:], seeds=[6], recipe=recipe, size=64)
    torch.testing.assert_close(both[1:], single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_scale_zero_is_bit_identical_to_no_guidance(model: DemoModel, cfg: float) -> None:
    off = sample(model, CAPTIONS, seeds=[1, 2], recipe=Recipe(cfg=cfg, steps=2), size=64)
    zero = Settings.from_dict({"sag_scale": 0.0, "pag_scale": 0.0})
    assert torch.equal(off, sample(model, CAPTIONS, seeds=[1, 2], recipe=Recipe(zero, cfg=cfg, steps=2), size=64))
    for values in ({"sag_scale": 1.0}, {"pag_scale": 1.0}):
        guided = Recipe(Settings.from_dict(values), cfg=cfg, steps=2)
        assert not torch.equal(off, sample(model, CAPTIONS, seeds=[1, 2], recipe=guided, size=64))


def test_one_step_against_the_formula(model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """``uncond + w (cond - uncond) + s (cond - perturbed)``, the perturbed row by hand."""
    x, sigma = 3 * torch.randn(2, 8, 16, 16), torch.full((2,), 3.0)
    context, empty = model.context(CAPTIONS), model.context(["", ""])
    recipe = Recipe(Settings.from_dict({"pag_scale": 2.5}), cfg=4.0)
    guided = GuidedDenoiser(model, recipe, context=context, empty=empty)(x, 3.0)
    cond, uncond = (model.denoise(x, sigma, cond=rows) for rows in (context, empty))
    attention = model.unet.get_submodule("middle_block.1.transformer_blocks.0.attn1")
    to_v, to_out = attention.get_submodule("to_v"), attention.get_submodule("to_out")
    monkeypatch.setattr(attention, "forward", lambda h, context=None: to_out(to_v(h)))
    perturbed = model.denoise(x, sigma, cond=context)
    torch.testing.assert_close(guided, uncond + 4 * (cond - uncond) + 2.5 * (cond - perturbed), rtol=1e-4, atol=1e-4)


def test_guidance_in_every_second_step(model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    guided: list[int] = []
    finish = GuidedStep.finish

    def counting(step: GuidedStep) -> None:
        guided.append(1)
        finish(step)

    monkeypatch.setattr(GuidedStep, "finish", counting)
    settings = Settings.from_dict({"pag_scale": 1.0})
    sample(model, CAPTIONS, seeds=[1, 2], recipe=Recipe(settings.with_values({"pag_every": 2}), steps=5), size=64)
    assert len(guided) == 3
    settings = settings.with_values({"pag_start": 0.25, "pag_end": 0.7})
    sample(model, CAPTIONS, seeds=[1, 2], recipe=Recipe(settings, steps=5), size=64)
    assert len(guided) == 3 + 2


def test_sizes_and_steps_are_reported(model: DemoModel) -> None:
    steps: list[int] = []
    out = sample(model, CAPTIONS, seeds=[1, 2], recipe=Recipe(steps=3), size=40, on_step=lambda: steps.append(1))
    assert out.shape == (2, 8, 10, 10)
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"sampler": "magic"}, "unknown sampler 'magic'; known are euler, heun"),
    ],
)
def test_bad_recipes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)  # type: ignore[arg-type]


def test_bad_captions(model: DemoModel) -> None:
    with pytest.raises(CaptionError, match="unknown word 'cat'"):
        sample(model, ["cat"], seeds=[1], recipe=Recipe(steps=1))
    with pytest.raises(ValueError, match="2 captions for 1 seeds"):
        sample(model, CAPTIONS, seeds=[1], recipe=Recipe(steps=1))


def test_going_on_from_drawn_pictures(model: DemoModel) -> None:
    """The later it begins, the nearer the result stays to what was drawn; nothing to begin from is refused."""
    drawn = noise_of([8, 9], size=64)

    def distance(begin: float) -> float:
        recipe = Recipe(steps=10, begin=begin)
        return (sample(model, ["", ""], seeds=[1, 2], recipe=recipe, drawn=drawn) - drawn).square().mean().item()

    assert distance(0.9) < distance(0.6) < distance(0.3)
    assert noise_levels(10, 0.3) == noise_levels(10)[3:]
    with pytest.raises(ValueError, match="nothing to begin from"):
        sample(model, [""], seeds=[1], recipe=Recipe(begin=0.5))
    with pytest.raises(ValueError, match="begin must be"):
        Recipe(begin=1.0)
