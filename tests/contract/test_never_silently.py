"""A picture says that it is guided only if it is: the run counts its steps, whatever others do around it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host
from torch import Tensor

NOTE = "SAG/PAG note"
BOTH = {"sag_scale": 1, "pag_scale": 3}
PAG = {"pag_scale": 3}


def run(host: Host, p: Any) -> Any:
    return host.processing.process_images(p)


def is_unguided_and_says_so(result: Any, p: Any, expected: list[Tensor], reason: str) -> None:
    for actual, e in zip(result.latents, expected, strict=True):
        assert torch.equal(actual, e)
    assert list(p.extra_generation_params) == [NOTE]
    for infotext in result.infotexts:
        assert "PAG: True" not in infotext
        assert "not applied" in infotext
        assert reason in infotext


def test_a_sampler_that_announces_no_steps(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = host.plain(n_iter=2)
    p = host.processing_for(BOTH, n_iter=2)
    announced = host.script_callbacks.run
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(host.script_callbacks, "run", lambda kind, *args: "cfg_" in kind or announced(kind, *args))
        result = run(host, p)
    is_unguided_and_says_so(result, p, expected, "did not announce its steps")
    assert len(caplog.records) == 1
    assert NOTE not in run(host, p).infotexts[0]


def test_a_host_that_calls_its_model_elsewhere(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the denoiser's ``forward``, but what is inside."""
    expected = host.plain()
    kind = host.sd_models.SigmaDenoiser
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs))
    p = host.processing_for(BOTH)
    is_unguided_and_says_so(run(host, p), p, expected, "did not call the model in the WebUI's way")


def test_a_host_that_never_ends_a_step(host: Host) -> None:
    """Its after-CFG callback does not fire."""
    expected = host.plain()
    host.script_callbacks.callbacks["cfg_after_cfg"].clear()
    p = host.processing_for(PAG)
    is_unguided_and_says_so(run(host, p), p, expected, "no step came to its end")


def test_a_host_that_ends_only_some_steps(host: Host) -> None:
    ours, = host.script_callbacks.callbacks["cfg_after_cfg"]
    calls: list[int] = []

    def every_other(params: Any) -> None:
        calls.append(1)
        if len(calls) % 2:
            ours(params)

    host.script_callbacks.callbacks["cfg_after_cfg"][:] = [every_other]
    p = host.processing_for(PAG, steps=4)
    infotext, = run(host, p).infotexts
    assert "PAG: True" in infotext
    assert "applied in 2 of 4 steps" in infotext


class HandsOnCopies:
    """AnimateDiff (a88e889): in the first step's callback, after ours, it puts a forward of its own on the denoiser,
    which hands rows on by their numbers, in windows of so many.
    """

    def __init__(self, host: Host, window: int) -> None:
        self.window = window
        host.shared.opts.batch_cond_uncond = False
        host.script_callbacks.on_cfg_denoiser(self.install)

    def install(self, params: Any) -> None:
        inner = params.denoiser.inner_model
        if params.denoiser.step == 0:
            original = inner.forward
            inner.forward = lambda x, sigma, cond: self.forward(original, x, sigma, cond)

    def forward(self, original: Callable[..., Tensor], x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        out = torch.zeros_like(x)
        for start in range(0, len(x), self.window):
            rows = list(range(start, start + self.window))
            own = {key: [value[0][rows]] for key, value in cond.items()}
            out[rows] = original(x[rows], sigma[rows], cond=own)
        return out


def test_copies_of_the_rows(host: Host) -> None:
    """Theirs is around ours in the first step, inside it afterwards: every step is guided."""
    fields = {"batch_size": 2, "steps": 2}
    host.shared.opts.batch_cond_uncond = False
    expected = host.generate(BOTH, **fields)
    HandsOnCopies(host, window=2)
    result = run(host, host.processing_for(BOTH, **fields))
    assert NOTE not in result.infotexts[0]
    for actual, e in zip(result.latents, expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-4)


def test_a_step_in_which_nobody_knows_the_rows(host: Host) -> None:
    """Its own windows in the first step alone; afterwards it hands on what it gets."""
    copies = HandsOnCopies(host, window=1)

    def whole(params: Any) -> None:
        copies.window = 1 if params.denoiser.step == 0 else 2

    host.script_callbacks.on_cfg_denoiser(whole)
    infotext = run(host, host.processing_for(PAG, batch_size=2, steps=3)).infotexts[0]
    assert "PAG: True" in infotext
    assert "not applied in 1 of 3 steps: another extension called the model in its own way" in infotext


def test_a_webui_that_does_not_tell_whose_step_it_is(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions before 1.8: an exception of ours that the host swallows must not leave an unguided picture."""
    kind = host.script_callbacks.CFGDenoiserParams

    def without_denoiser(*args: Any, **kwargs: Any) -> Any:
        params = kind(*args, **kwargs)
        del params.denoiser
        return params

    monkeypatch.setattr(host.script_callbacks, "CFGDenoiserParams", without_denoiser)
    with pytest.raises(AttributeError, match="denoiser"):
        host.generate(PAG)


class Twice:
    """Another extension's stand-in for ``p.sample``, which samples twice and keeps what it likes better."""

    def __init__(self, p: Any, kept: list[Tensor]) -> None:
        self.original: Callable[..., Tensor] = p.sample
        self.kept = kept
        p.sample = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.kept.append(self.original(*args, **kwargs))
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("early", [True, False], ids=["before ours", "after ours"])
def test_sampled_twice(host: Host, early: bool) -> None:
    """Every call of the batch is guided."""
    expected = host.generate(BOTH)[0]
    kept: list[Tensor] = []
    p = host.processing_for(BOTH)
    script = host.scripts.Script()
    script.title = lambda: "other"
    script.args_from = script.args_to = len(host.txt2img.defaults)
    script.process_batch = lambda p, *_, **__: Twice(p, kept)
    host.txt2img.alwayson_scripts.insert(0 if early else len(host.txt2img.alwayson_scripts), script)
    result = run(host, p)
    assert torch.equal(result.latents[0], expected)
    assert torch.equal(kept[0][0], expected)


def test_a_copy_made_before_sampling_samples_itself(host: Host) -> None:
    """The copy is another picture, and the outer one stays what it is; both are guided."""
    results: list[Tensor] = []

    def process_batch(p: Any, *_: Any, **__: Any) -> None:
        other = copy(p)
        other.seed = 5
        other.setup_conds()
        results.append(other.sample())

    script = host.scripts.Script()
    script.title = lambda: "other"
    script.args_from = script.args_to = len(host.txt2img.defaults)
    script.process_batch = process_batch
    expected = host.generate(BOTH)[0], host.generate(BOTH, seed=5)[0]
    host.txt2img.alwayson_scripts.append(script)
    assert torch.equal(host.generate(BOTH)[0], expected[0])
    assert torch.equal(results[0][0], expected[1])


def test_sampling_in_another_way(host: Host) -> None:
    """An extension that samples without ``sample``: its pictures say that they are not guided."""
    p = host.processing_for(PAG)
    p.sample = lambda **_: torch.zeros(1, 4, 8, 6)
    result = run(host, p)
    is_unguided_and_says_so(result, p, [torch.zeros(4, 8, 6)], "another extension sampled")
    p = host.processing_for({"pag_scale": 99})
    p.sample = lambda **_: torch.zeros(1, 4, 8, 6)
    is_unguided_and_says_so(run(host, p), p, [torch.zeros(4, 8, 6)], "pag_scale: 99")


@pytest.mark.parametrize("method", ["process", "process_batch", "postprocess_batch"])
def test_scripts_run_on_a_copy_after_sampling(host: Host, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """ADetailer does so with ``process`` and a copy, which shares the metadata: the note stays, no claim comes back."""
    unet = SimpleNamespace(option=SimpleNamespace(label="[TRT] small"))
    monkeypatch.setattr(host.sd_unet, "current_unet", unet)
    script = host.scripts.Script()
    script.title = lambda: "other"
    script.args_from = script.args_to = len(host.txt2img.defaults)
    script.postprocess_image = lambda p, *_: getattr(host.script, method)(copy(p), True, 0.75)
    host.txt2img.alwayson_scripts.insert(0, script)
    p = host.processing_for(BOTH, batch_size=2)
    for infotext in run(host, p).infotexts:
        assert "[TRT] small" in infotext
        assert "SAG: True" not in infotext


@pytest.mark.parametrize(("settings", "range_"), [
    ({"pag_scale": 3, "pag_start": 1.0}, "1 to 1"),
    ({"pag_scale": 3, "pag_start": 0.4, "pag_end": 0.6, "pag_every": 2}, "0.4 to 0.6, one step in 2"),
    ({"sag_scale": 1, "sag_end": 0.01}, "0 to 0.01"),
])
def test_a_run_without_a_step_in_range(host: Host, settings: dict[str, Any], range_: str) -> None:
    """As img2img at a low denoising strength is: every step was decided on, and none was to be guided."""
    expected = host.plain()
    p = host.processing_for(settings)
    is_unguided_and_says_so(run(host, p), p, expected, f"no step of this run lies in its range ({range_})")


def test_one_feature_has_no_step_in_range(host: Host) -> None:
    """The picture claims the other one, and is what that makes of it."""
    settings = {"sag_scale": 1, "sag_end": 0.01, "pag_scale": 3}
    result = run(host, host.processing_for(settings))
    assert torch.equal(result.latents[0], host.generate(PAG)[0])
    infotext, = result.infotexts
    assert "PAG: True" in infotext
    assert "SAG: True" not in infotext
    assert "SAG not applied, no step of this run lies in its range (0 to 0.01)" in infotext


@pytest.mark.parametrize("settings", [{"pag_scale": 0}, {"sag_scale": 1, "sag_blur_sigma": 0}])
def test_what_asks_for_nothing_needs_no_note(host: Host, settings: dict[str, Any]) -> None:
    infotext, = run(host, host.processing_for(settings)).infotexts
    assert NOTE not in infotext


def test_a_range_of_the_other_pass(host: Host) -> None:
    """The hires pass alone is to be guided: it has steps in the range, or it has none."""
    settings = {**PAG, "hires_pass": "hires pass"}
    infotext, = run(host, host.processing_for(settings, enable_hr=True)).infotexts
    assert "PAG: True" in infotext
    assert NOTE not in infotext
    p = host.processing_for({**settings, "pag_end": 0.01}, enable_hr=True)
    is_unguided_and_says_so(run(host, p), p, host.plain(enable_hr=True), "no step of this run lies in its range")


def test_a_hires_pass_that_did_not_run(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone was to be guided, and the user has stopped the picture before."""
    def first_pass_alone(self: Any, p: Any, noise: Tensor, **kwargs: Any) -> Tensor:
        return noise if p.is_hr_pass else sample(self, p, noise, **kwargs)

    sample = host.sd_samplers.Sampler.sample
    monkeypatch.setattr("modules.processing.Sampler.sample", first_pass_alone)
    expected = host.plain(enable_hr=True)
    p = host.processing_for({**PAG, "hires_pass": "hires pass"}, enable_hr=True)
    is_unguided_and_says_so(run(host, p), p, expected, "the hires pass did not run")


def test_the_picture_of_a_guided_one_that_is_made_larger(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gallery's button runs the hires pass alone: the text tells of the first one too, which was guided."""
    def hires_pass_alone(self: Any, p: Any, noise: Tensor, **kwargs: Any) -> Tensor:
        return sample(self, p, noise, **kwargs) if p.is_hr_pass else noise

    sample = host.sd_samplers.Sampler.sample
    monkeypatch.setattr("modules.processing.Sampler.sample", hires_pass_alone)
    infotext, = run(host, host.processing_for({**PAG, "hires_pass": "first pass"}, enable_hr=True)).infotexts
    assert "PAG: True" in infotext
    assert NOTE not in infotext


def test_a_model_that_no_step_could_be_guided_on(host: Host) -> None:
    """It took over before the first step of the range: there is no picture that was guided up to there."""
    unet = SimpleNamespace(option=SimpleNamespace(label="[TRT] small"))
    p = host.processing_for({**PAG, "pag_start": 0.3})
    expected = host.plain()
    p.callback = lambda step: setattr(host.sd_unet, "current_unet", unet)
    try:
        result = run(host, p)
    finally:
        host.sd_unet.current_unet = None
    is_unguided_and_says_so(result, p, expected, "[TRT] small")


def test_classes_get_their_sample_back(host: Host) -> None:
    """When the WebUI unloads scripts; what it loads then replaces it again."""
    kind = host.processing.Processing
    host.generate(PAG)
    host.script_callbacks.run("script_unloaded")
    assert vars(kind)["sample"].__qualname__ == "Processing.sample"
    assert vars(kind)["sample"].__code__.co_filename.endswith("processing.py")


def test_a_subclass_with_a_sample_of_its_own(host: Host) -> None:
    """Another extension's kind of generation."""
    class Other(host.processing.Processing):  # type: ignore[name-defined,misc]
        def sample(self, **kwargs: Any) -> Tensor:
            return super().sample(**kwargs) + 1  # type: ignore[no-any-return]

    p = Other()
    p.scripts, p.script_args = host.txt2img, host.processing_for(PAG).script_args
    assert torch.equal(run(host, p).latents[0], host.generate(PAG)[0] + 1)


def test_an_out_of_memory_lets_go_of_what_it_held(host: Host) -> None:
    """In SAG's own call, without the cyclic collector: the next picture must find the memory free."""
    held: list[weakref.ref[Tensor]] = []
    model = host.shared.sd_model
    start = len(model.calls)

    def before_call() -> None:
        if len(model.calls) - start == 2:
            activation = torch.zeros(1000)
            held.append(weakref.ref(activation))
            raise MemoryError

    model.before_call = before_call
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(MemoryError):
            host.generate({"sag_scale": 1})
        assert len(held) == 1
        assert held[0]() is None, "still held"
    finally:
        gc.enable()
        model.before_call = lambda: None
