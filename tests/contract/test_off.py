"""Switched off the extension is not there; switched on it is there for single U-Net calls only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import Host
from torch import Tensor

OFF = {"sag_enabled": False, "pag_enabled": False}
NOTHING_TO_DO: dict[str, dict[str, Any]] = {
    "off": {},
    "off with values": {**OFF, "sag_scale": 2, "pag_blocks": "input.1", "rescale": 1},
    "off with blocks that are not there": {**OFF, "pag_blocks": "output.77"},
    "off and backwards": {**OFF, "sag_start": 0.9, "sag_end": 0.2},
    "only what both share": {"rescale": 0.5, "hires_own_scales": True},
    "scales 0": {"sag_scale": 0, "pag_scale": 0.0, "rescale": 1.0},
    "SAG scale 0": {"sag_scale": 0},
    "PAG scale 0": {"pag_scale": 0},
    "blur 0": {"sag_blur_sigma": 0},
    "out of range": {"sag_end": 0.0, "pag_start": 1.0},
    "only in the hires pass": {
        "sag_scale": 1, "hires_pass": "hires pass", "hires_own_scales": True, "hires_sag_scale": 0,
    },
}
SAMPLERS = ("Euler", "DDIM", "DDIM CFG++")


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("name", "sampler"), [
    *((name, "Euler") for name in NOTHING_TO_DO), ("off", "DDIM"), ("scales 0", "DDIM"), ("scales 0", "DDIM CFG++"),
])
def test_bit_identical_at_no_cost(host: Host, name: str, sampler: str) -> None:
    settings = NOTHING_TO_DO[name]
    fields = {"sampler_name": sampler, "batch_size": 2, "prompt": "a cat AND a dog\na house", "steps": 2}
    fields["enable_hr"] = "hires_pass" in settings
    expected: list[Tensor] = []
    expected_rows = host.rows(lambda: expected.extend(host.plain(**fields)))
    results: list[Tensor] = []
    assert host.rows(lambda: results.extend(host.generate(settings, **fields))) == expected_rows
    assert same(results, expected)


@pytest.mark.parametrize("settings", [{}, {"sag_enabled": False}, [False]], ids=["none", "dict", "list"])
def test_off_installs_nothing(host: Host, settings: Any) -> None:
    args = settings if isinstance(settings, list) else [settings]
    p = host.processing_for(*args)
    host.shared.sd_model.before_call = host.assert_clean
    p.callback = lambda step: check_between_steps(host, p)
    host.processing.process_images(p)
    assert "sample" not in vars(p)
    assert set(p.extra_generation_params) == set()


def check_between_steps(host: Host, p: Any) -> None:
    host.assert_clean()
    assert "sample" not in vars(p)


def test_off_before_the_first_step(host: Host) -> None:
    """Nor is anything installed between the script's call and sampling."""
    p = host.processing_for({})
    host.txt2img.run_all("process", p)
    host.txt2img.run_all("process_batch", p)
    assert "sample" not in vars(p)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_and_off_again(host: Host, sampler: str) -> None:
    off = host.plain(sampler_name=sampler)
    guided = host.generate({"sag_scale": 1, "pag_scale": 3}, sampler_name=sampler)
    assert not torch.allclose(guided[0], off[0], atol=1e-3)
    assert same(host.generate({}, sampler_name=sampler), off)
    assert same(host.plain(sampler_name=sampler), off)
    assert same(host.generate({"sag_scale": 1, "pag_scale": 3}, sampler_name=sampler), guided)


@pytest.mark.parametrize("batched", [True, False])
def test_nothing_outlives_a_call(host: Host, batched: bool) -> None:
    """Between the steps, and while other callbacks run, no module of the model is changed."""
    host.shared.opts.batch_cond_uncond = batched
    denoisers: list[Any] = []
    changed: list[bool] = []

    def look(params: Any) -> None:
        denoisers.append(getattr(params, "denoiser", None))
        host.assert_clean()

    def between(step: int) -> None:
        host.assert_clean()
        assert "forward" not in vars(denoisers[0].inner_model)

    def during() -> None:
        changed.append(any("forward" in vars(module) for module in host.shared.sd_model.modules()))

    for kind in ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg"):
        host.script_callbacks.callbacks[kind].append(look)
    host.shared.sd_model.before_call = during
    host.generate({"sag_scale": 1, "pag_scale": 3}, callback=between)
    assert any(changed)


def test_rows_of_a_guided_step(host: Host) -> None:
    """PAG: the conditional rows once more in the same call. SAG: one row an image in a call of its own."""
    def rows(settings: dict[str, Any]) -> list[int]:
        return host.rows(lambda: host.generate(settings, batch_size=2, steps=1))

    assert rows({}) == [4]
    assert rows({"pag_scale": 3}) == [6]
    assert rows({"sag_scale": 1}) == [4, 2]
    assert rows({"sag_scale": 1, "pag_scale": 3}) == [6, 2]
    host.shared.opts.batch_cond_uncond = False
    assert rows({"sag_scale": 1, "pag_scale": 3}) == [2, 2, 2, 2]
    host.shared.opts.batch_cond_uncond = True
    host.shared.sd_model.lowvram = True
    assert rows({"sag_scale": 1, "pag_scale": 3}) == [4, 2, 2]


def test_no_extra_rows_out_of_range(host: Host) -> None:
    """DDIM's three steps are at progress 0.019, 0.499 and 0.979."""
    def rows(**settings: Any) -> list[int]:
        return host.rows(lambda: host.generate(settings, sampler_name="DDIM"))

    assert rows(pag_start=0.2, pag_end=0.6) == [2, 3, 2]
    assert rows(pag_end=0.499) == [3, 3, 2]
    assert rows(pag_start=0.5) == [2, 2, 3]
    assert rows(sag_start=0.499) == [2, 2, 1, 2, 1]
    assert rows(sag_end=0.1, pag_start=0.9) == [2, 1, 2, 3]
    assert rows(pag_fade=True, pag_end=0.979) == [3, 3, 2]  # faded to nothing
