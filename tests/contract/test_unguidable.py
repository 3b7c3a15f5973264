"""A model that can't be guided makes its picture unguided, and the metadata and the log say so."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host
from torch import nn

NOTE = "SAG/PAG note"
BOTH = {"sag_scale": 1, "pag_scale": 3, "rescale": 0.5, "pag_fade": True}


def make_unguidable(host: Host, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    model = host.shared.sd_model
    if how == "TensorRT":
        unet = SimpleNamespace(option=SimpleNamespace(label="[TRT] small"))
        monkeypatch.setattr(host.sd_unet, "current_unet", unet)
        return
    if how == "SD3":
        fake = SimpleNamespace(diffusion_model=nn.Module())
    elif how == "no model inside":
        fake = SimpleNamespace()
    else:
        unet = nn.Module()
        unet.input_blocks = unet.output_blocks = nn.ModuleList()
        unet.middle_block = nn.Module()
        fake = SimpleNamespace(diffusion_model=unet)

    class Elsewhere:
        """Looks like another model to whoever asks, and works as the standing one."""

        model = fake

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    monkeypatch.setattr(host.sd_models, "model_data", SimpleNamespace(sd_model=Elsewhere()))


HOW = ["TensorRT", "SD3", "no model inside", "no attention"]


@pytest.mark.parametrize("how", HOW)
def test_note(host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str) -> None:
    expected = host.plain(n_iter=2)
    p = host.processing_for(BOTH, n_iter=2)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        make_unguidable(host, patch, how)
        result = host.processing.process_images(p)
    for actual, e in zip(result.latents, expected, strict=True):
        assert torch.equal(actual, e)
    assert list(p.extra_generation_params) == [NOTE]
    for infotext in result.infotexts:
        assert NOTE in infotext
        assert "not applied" in infotext
        assert "PAG scale" not in infotext
    assert len(caplog.records) == 1
    assert "not applied" in caplog.text
    if how == "TensorRT":
        assert "[TRT] small" in p.extra_generation_params[NOTE]


@pytest.mark.parametrize("how", HOW)
def test_the_next_picture_is_guided_again(host: Host, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    expected = host.generate(BOTH)
    p = host.processing_for(BOTH)
    with monkeypatch.context() as patch:
        make_unguidable(host, patch, how)
        host.processing.process_images(p)
    result = host.processing.process_images(p)
    assert torch.equal(result.latents[0], expected[0])
    assert NOTE not in p.extra_generation_params
    assert p.extra_generation_params["SAG"] == "True"


@pytest.mark.parametrize("how", HOW)
def test_off_says_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    p = host.processing_for({})
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        make_unguidable(host, patch, how)
        host.processing.process_images(p)
    assert p.extra_generation_params == {}
    assert caplog.records == []


@pytest.mark.parametrize("how", HOW)
def test_bad_settings_are_refused_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with monkeypatch.context() as patch:
        make_unguidable(host, patch, how)
        for bad in ({"sag_scale": 99}, {"pag_blocks": "centre"}):
            with pytest.raises(ValueError, match="can't be used"):
                host.generate(bad)


def test_a_model_that_takes_over_and_can_not_be_guided(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the second step on; the first one is guided, and the note says that the end was not."""
    p = host.processing_for(BOTH)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        p.callback = lambda step: make_unguidable(host, patch, "TensorRT")
        result = host.processing.process_images(p)
    assert "not applied to the end" in result.infotexts[0]
    assert len(caplog.records) == 1
    assert not torch.equal(result.latents[0], host.plain()[0])
