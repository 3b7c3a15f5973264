"""Ranges, the fade and the passes of hires. fix, against the naive reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import Host
from naive import Naive, Wanted
from torch import Tensor

SAMPLERS = ("Euler", "DDIM", "DDIM CFG++")


class ByPass(Naive):
    """Other scales in the passes of hires. fix."""

    scales: dict[bool, tuple[float, float]]  # by is_hr_pass: SAG and PAG

    def _guide(self, after: Any) -> None:
        self.wanted.sag, self.wanted.pag = self.scales[self.params.denoiser.p.is_hr_pass]
        super()._guide(after)


def naive(host: Host, guidance: Naive, **fields: Any) -> Tensor:
    with host.without_extension(), guidance.registered():
        latents: list[Tensor] = host.processing.process_images(host.processing.Processing(**fields)).latents
        host.script_callbacks.clear()
    return latents[0]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("start", "end", "fade"), [(0.2, 0.7, False), (0.0, 0.5, True), (0.1, 1.0, True), (0.4, 0.4, True)]
)
def test_range_and_fade(host: Host, sampler: str, start: float, end: float, fade: bool) -> None:
    settings = {"pag_scale": 4, "pag_start": start, "pag_end": end, "pag_fade": fade}
    wanted = Wanted(pag=4.0, start=start, end=end, fade=fade and end > start)
    fields = {"sampler_name": sampler, "steps": 4}
    close(host.generate(settings, **fields)[0], naive(host, Naive(host, wanted), **fields))


@pytest.mark.parametrize(
    ("extra", "first", "hires"),
    [
        ({}, (1.0, 3.0), (1.0, 3.0)),
        ({"hires_pass": "first pass"}, (1.0, 3.0), (0.0, 0.0)),
        ({"hires_pass": "hires pass"}, (0.0, 0.0), (1.0, 3.0)),
        ({"hires_own_scales": False, "hires_sag_scale": 0.5, "hires_pag_scale": 1}, (1.0, 3.0), (1.0, 3.0)),
        ({"hires_sag_scale": 0.5, "hires_pag_scale": 1}, (1.0, 3.0), (0.5, 1.0)),  # to name them is to ask for them
        ({"hires_own_scales": True, "hires_sag_scale": 0.5, "hires_pag_scale": 1}, (1.0, 3.0), (0.5, 1.0)),
        ({"hires_own_scales": True, "hires_pag_scale": 0, "hires_sag_scale": 2}, (1.0, 3.0), (2.0, 0.0)),
        ({"hires_own_scales": True, "hires_pass": "first pass", "hires_pag_scale": 9}, (1.0, 3.0), (0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_hires_passes(
    host: Host, sampler: str, extra: dict[str, Any], first: tuple[float, float], hires: tuple[float, float]
) -> None:
    fields = {"sampler_name": sampler, "steps": 2, "enable_hr": True}
    guidance = ByPass(host, Wanted())
    guidance.scales = {False: first, True: hires}
    close(host.generate({"sag_scale": 1, "pag_scale": 3, **extra}, **fields)[0], naive(host, guidance, **fields))


@pytest.mark.parametrize("hires_pass", ["first pass", "hires pass", "both passes"])
def test_without_hires_fix_its_settings_do_not_matter(host: Host, hires_pass: str) -> None:
    expected = host.generate({"pag_scale": 3})[0]
    settings = {"pag_scale": 3, "hires_pass": hires_pass, "hires_own_scales": True, "hires_pag_scale": 9}
    assert torch.equal(host.generate(settings)[0], expected)


@pytest.mark.parametrize(
    ("text", "blocks", "read"),
    [
        ("middle", ("middle_block.1",), "middle_block.1.transformer_blocks.0.attn1"),
        ("input.1", ("input_blocks.1.1",), "input_blocks.1.1.transformer_blocks.0.attn1"),
        ("output.0-3", tuple(f"output_blocks.{n}.1" for n in range(4)), "output_blocks.3.1.transformer_blocks.0.attn1"),
        ("middle, output.2", ("middle_block.1", "output_blocks.2.1"), "input_blocks.3.1.transformer_blocks.0.attn1"),
    ],
)
@pytest.mark.parametrize("own_call", [False, True], ids=["extra rows", "own call"])
def test_blocks(host: Host, text: str, blocks: tuple[str, ...], read: str, own_call: bool) -> None:
    host.shared.sd_model.lowvram = own_call
    part, index = read.split("_blocks.")[0], read.split(".")[1]
    settings = {"pag_blocks": text, "sag_block": "middle" if part.startswith("middle") else f"{part}.{index}"}
    wanted = Wanted(sag=0.75, pag=3.0, blocks=blocks, read=read)
    close(host.generate(settings, steps=2)[0], naive(host, Naive(host, wanted), steps=2))


@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rescale_is_heard(host: Host, mode: str, sampler: str) -> None:
    fields = {"sampler_name": sampler, "steps": 2}
    plain, guided = host.plain(**fields)[0], host.generate({"pag_scale": 6}, **fields)[0]
    tamed = host.generate({"pag_scale": 6, "rescale": 1, "rescale_mode": mode}, **fields)[0]
    slightly = host.generate({"pag_scale": 6, "rescale": 1e-6, "rescale_mode": mode}, **fields)[0]
    assert tamed.isfinite().all()
    assert not torch.allclose(tamed, plain, atol=1e-3)
    assert not torch.allclose(tamed, guided, atol=1e-3)
    torch.testing.assert_close(slightly, guided, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("settings", "rows"), [
    ({"pag_scale": 3, "pag_every": 2}, [3, 2, 3, 2, 3]),
    ({"pag_scale": 3, "pag_every": 3}, [3, 2, 2, 3, 2]),
    ({"pag_scale": 3, "pag_every": 10}, [3, 2, 2, 2, 2]),
    ({"sag_scale": 1, "sag_every": 2}, [2, 1, 2, 2, 1, 2, 2, 1]),
    ({"sag_scale": 1, "sag_every": 2, "pag_scale": 3, "pag_every": 3}, [3, 1, 2, 2, 1, 3, 2, 1]),
    ({"pag_scale": 3, "pag_every": 2, "pag_start": 0.4}, [2, 2, 3, 2, 3]),
])
def test_every_nth_step(host: Host, sampler: str, settings: dict[str, Any], rows: list[int]) -> None:
    """Counted by the sampler's own steps from the first one on."""
    assert host.rows(lambda: host.generate(settings, steps=5, sampler_name=sampler)) == rows


def test_all_calls_of_a_step_are_guided_or_none(host: Host) -> None:
    """What a second-order sampler predicts last is its step: the first prediction alone would hardly count."""
    made = host.rows(lambda: host.generate({"pag_scale": 3, "pag_every": 2}, steps=5, sampler_name="DPM2"))
    assert made == [3, 3, 2, 2, 3, 3, 2, 2, 3]


def test_every_nth_step_of_each_pass(host: Host) -> None:
    made = host.rows(lambda: host.generate({"pag_scale": 3, "pag_every": 2}, steps=3, enable_hr=True))
    assert made == [3, 2, 3] * 2


class Steps(Naive):
    """Guides in every second step only."""

    def _guide(self, after: Any) -> None:
        if self.params.denoiser.step % 2 == 0:
            super()._guide(after)


def test_every_second_step_is_guided_as_each_would_be(host: Host) -> None:
    settings = {"sag_scale": 1, "sag_every": 2, "pag_scale": 3, "pag_every": 2}
    close(host.generate(settings, steps=4)[0], naive(host, Steps(host, Wanted(sag=1.0, pag=3.0)), steps=4))
