"""One processing object used many times, copied, and wrapped by others."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
from double import TITLE, Host
from torch import Tensor

PAG = {"pag_scale": 3}
Sample = Callable[..., Tensor]


def arguments(host: Host, settings: Any) -> tuple[Any, ...]:
    return tuple(host.txt2img.arguments({TITLE: [settings]}))


def run(host: Host, p: Any) -> list[Tensor]:
    latents: list[Tensor] = host.processing.process_images(p).latents
    return latents


def abort_batch(host: Host, p: Any) -> None:
    """A prompt that can't be parsed: the batch ends after the scripts have had their turn, before sampling."""
    def fail() -> None:
        raise ValueError("prompt")

    p.setup_conds = fail
    with pytest.raises(ValueError, match="prompt"):
        host.processing.process_images(p)
    del p.setup_conds


def test_several_batches(host: Host) -> None:
    batches = host.generate(PAG, n_iter=3)
    for iteration, actual in enumerate(batches):
        p = host.processing_for(PAG)
        p.noise = lambda size, n=iteration: host.sd_models.seeded(f"noise 0 {n} False", 1, 4, *size)
        assert torch.equal(run(host, p)[0], actual)


def test_several_runs(host: Host) -> None:
    """As the loopback script does."""
    p = host.processing_for(PAG)
    first = run(host, p)
    assert "sample" not in vars(p)
    assert torch.equal(run(host, p)[0], first[0])
    p.script_args = arguments(host, {})
    assert torch.equal(run(host, p)[0], host.plain()[0])
    assert p.extra_generation_params == {}
    p.script_args = arguments(host, PAG)
    assert torch.equal(run(host, p)[0], first[0])
    assert p.extra_generation_params["PAG scale"] == "3"


@pytest.mark.parametrize("then", [PAG, {}, {"sag_scale": 1}])
def test_after_an_aborted_batch(host: Host, then: dict[str, Any]) -> None:
    p = host.processing_for(PAG)
    abort_batch(host, p)
    p.script_args = arguments(host, then)
    assert torch.equal(run(host, p)[0], host.generate(then)[0])
    assert "sample" not in vars(p)


@pytest.mark.parametrize("then", [PAG, {}, {"sag_scale": 1}])
def test_a_copy_after_an_aborted_batch(host: Host, then: dict[str, Any]) -> None:
    """The copy is a generation of its own, whatever still hangs on the original."""
    p = host.processing_for(PAG)
    abort_batch(host, p)
    other = copy(p)
    other.seed, other.script_args = 5, arguments(host, then)
    assert torch.equal(run(host, other)[0], host.generate(then, seed=5)[0])
    assert "sample" not in vars(other)
    assert torch.equal(run(host, p)[0], host.generate(PAG)[0])


@pytest.mark.parametrize("settings", [{}, {"sag_scale": 1}], ids=["off", "guided"])
def test_a_copy_made_and_run_by_another_script_before_sampling(host: Host, settings: Any) -> None:
    """Another extension makes a picture of its own from a copy when its turn comes, after ours."""
    results: list[Tensor] = []

    def process_batch(p: Any, *_: Any, **__: Any) -> None:
        if p.seed == 5:
            return
        other = copy(p)
        other.seed, other.extra_generation_params = 5, {}
        other.script_args = arguments(host, settings)
        results.extend(run(host, other))

    add_script(host, process_batch)
    actual = host.generate(PAG)
    host.txt2img.alwayson_scripts.pop()
    expected = host.plain(seed=5) if not settings else host.generate(settings, seed=5)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(actual[0], host.generate(PAG)[0])


def add_script(host: Host, process_batch: Callable[..., None], *, first: bool = False) -> None:
    """Another extension's always-on script."""
    script = host.scripts.Script()
    script.title = lambda: "other"
    script.args_from = script.args_to = len(host.txt2img.defaults)
    script.process_batch = process_batch
    host.txt2img.alwayson_scripts.insert(0 if first else len(host.txt2img.alwayson_scripts), script)


class Wrapper:
    """Another extension's stand-in for ``p.sample``."""

    def __init__(self, p: Any, *, gives_back: bool) -> None:
        self.p, self.gives_back = p, gives_back
        self.original: Sample = p.sample
        self.calls = 0
        p.sample = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        result = self.original(*args, **kwargs)
        if self.gives_back:
            self.p.sample = self.original
        return result


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("gives_back", [True, False])
@pytest.mark.parametrize("every_batch", [True, False])
def test_another_wrapper(host: Host, first: bool, gives_back: bool, every_batch: bool) -> None:
    made: list[Wrapper] = []

    def process_batch(p: Any, *_: Any, batch_number: int, **__: Any) -> None:
        if every_batch or batch_number == 0:
            made.append(Wrapper(p, gives_back=gives_back))

    expected = host.generate(PAG, n_iter=3)
    plain = host.plain(n_iter=3)
    add_script(host, process_batch, first=first)
    p = host.processing_for(PAG, n_iter=3)
    for actual, e in zip(run(host, p), expected, strict=True):
        assert torch.equal(actual, e)
    assert all(wrapper.calls for wrapper in made)
    p.script_args = arguments(host, {})
    for actual, e in zip(run(host, p), plain, strict=True):
        assert torch.equal(actual, e)


def test_a_wrapper_around_ours_when_the_batch_is_aborted(host: Host) -> None:
    """What was meant for the aborted batch is not for the next one, though ours can no longer be taken off."""
    add_script(host, lambda p, *_, **__: Wrapper(p, gives_back=False))
    p = host.processing_for(PAG)
    abort_batch(host, p)
    p.script_args = arguments(host, {})
    assert torch.equal(run(host, p)[0], host.plain()[0])


def test_a_sample_of_its_own_is_given_back(host: Host) -> None:
    p = host.processing_for(PAG)
    original = p.sample

    def own(**kwargs: Any) -> Tensor:
        return original(**kwargs)

    p.sample = own
    assert torch.equal(run(host, p)[0], host.generate(PAG)[0])
    assert vars(p)["sample"] is own


def test_sample_is_called_with_what_the_host_gives(host: Host) -> None:
    p = host.processing_for(PAG)
    seen: list[dict[str, Any]] = []
    original = p.sample

    def own(*args: Any, **kwargs: Any) -> Tensor:
        seen.append({"args": args, **kwargs})
        return original(**kwargs)

    p.sample = own
    run(host, p)
    assert seen == [{"args": (), "conditioning": p.c, "unconditional_conditioning": p.uc}]
