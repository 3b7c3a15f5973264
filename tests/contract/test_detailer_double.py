"""ADetailer: while a picture is seen to, it runs every script on copies, and a generation of its own inside.

Stands for 36189cb, with which ``tests/neighbours/test_nested_passes.py`` compares it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host

PAG = {"pag_scale": 3}
SHOWN = {"sag_scale": 1, "sag_show": True}
NESTED = {"seed": 9, "steps": 2}


class Detailer:
    """Sees to each picture before our script does, as the folders' names have it."""

    args_from = args_to = 0

    def __init__(self, host: Host, *, keeps: bool = True, before: Callable[[], None] = lambda: None) -> None:
        self.host, self.keeps, self.before = host, keeps, before
        self.latents: list[Any] = []
        self.texts: list[str] = []
        host.txt2img.alwayson_scripts.insert(0, self)  # type: ignore[attr-defined]

    def process(self, *_: Any, **__: Any) -> None:
        pass

    process_batch = postprocess_batch = postprocess = process

    def postprocess_image(self, p: Any, pp: Any) -> None:
        self.before()
        runner = p.scripts
        if p.batch_index == 0:
            runner.run_all("postprocess", copy(p), SimpleNamespace(images=[], infotexts=[], index_of_first_image=0))
        inner = self.host.processing.Processing(**NESTED, extra_generation_params=dict(p.extra_generation_params))
        inner.scripts, inner.script_args = copy(runner), p.script_args
        inner.scripts.alwayson_scripts = [
            script for script in runner.alwayson_scripts if self.keeps and script is not self
        ]
        made = self.host.processing.process_images(inner)
        self.latents, self.texts = made.latents, made.infotexts
        if p.batch_index == p.batch_size - 1:
            runner.run_all("process", copy(p))


@pytest.mark.parametrize("keeps", [True, False], ids=["in its list", "left out"])
def test_the_nested_pass_is_guided_if_our_script_is_in_its_list(host: Host, keeps: bool) -> None:
    alone = host.generate(PAG, batch_size=2)
    expected = host.generate(PAG, **NESTED) if keeps else host.plain(**NESTED)
    detailer = Detailer(host, keeps=keeps)
    made = host.processing.process_images(host.processing_for(PAG, batch_size=2))
    assert torch.equal(detailer.latents[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(made.latents, alone, strict=True))
    assert ["PAG: True" in text for text in made.infotexts] == [True, True]


@pytest.mark.parametrize("unguidable", ["the outer one", "the nested one"])
def test_each_says_what_is_true_of_itself(host: Host, monkeypatch: pytest.MonkeyPatch, unguidable: str) -> None:
    """ADetailer may load another checkpoint for its pass. The outer picture's text comes after it, and is its own."""
    other = SimpleNamespace(option=SimpleNamespace(label="[TRT] small"))
    outer, nested = (other, None) if unguidable == "the outer one" else (None, other)
    monkeypatch.setattr(host.sd_unet, "current_unet", outer)
    detailer = Detailer(host, before=lambda unet=nested: monkeypatch.setattr(host.sd_unet, "current_unet", unet))
    made = host.processing.process_images(host.processing_for(PAG, batch_size=2))
    for text, is_guided in ((made.infotexts[0], outer is None), (made.infotexts[1], outer is None),
                            (detailer.texts[0], nested is None)):
        assert ("PAG: True" in text, "[TRT] small" in text) == (is_guided, not is_guided)


def test_what_sag_saw_is_shown_once_for_each_picture(host: Host) -> None:
    """The stand-in for a result that it hands to the scripts of the second batch has no pictures to add to."""
    Detailer(host)
    made = host.processing.process_images(host.processing_for(SHOWN, batch_size=2, n_iter=2))
    assert len(made.images) == 4
    assert host.swallowed() == []
