"""Training: repeatable, resumable to the bit, and learning something."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab import card, classifier, degraded, evaluate
from lab.train import (
    HELD_OUT,
    HELD_OUT_SEED,
    Trainer,
    TrainError,
    TrainSettings,
    draw_batch,
    learning_rate,
    prepared_autoencoder,
    train,
)
from sag_pag.demo.captions import parse
from sag_pag.demo.model import load, read_metadata


def short(out: Path, *, steps: int = 6) -> TrainSettings:
    return TrainSettings(out=out, steps=steps, batch=4, warmup=2, checkpoint_every=3, held_out=8, autoencoder_steps=2)


def test_batches_depend_on_seed_and_step_only() -> None:
    first, again = (draw_batch(8, seed=1, step=5, caption_dropout=0.1) for _ in range(2))
    for name in ("pictures", "noise", "timesteps", "ids"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.pictures, draw_batch(8, seed=1, step=6, caption_dropout=0.1).pictures)
    assert not torch.equal(first.pictures, draw_batch(8, seed=2, step=5, caption_dropout=0.1).pictures)


def test_timesteps_are_stratified_and_captions_dropped() -> None:
    batch = draw_batch(500, seed=1, step=0, caption_dropout=0.5)
    assert ((batch.timesteps / (999 / 500)).floor() == torch.arange(500)).all()
    assert 0.4 < (batch.ids == 0).all(dim=1).double().mean() < 0.6


def test_learning_rate_warms_up_stays_and_falls() -> None:
    settings = TrainSettings(out=Path(), steps=1000, warmup=100, decay=0.2, learning_rate=1.0)
    rates = [learning_rate(settings, step) for step in (0, 49, 99, 500, 799, 900, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0.005])


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(short(tmp_path / "whole"))
    settings = short(tmp_path / "halves")
    halves = Trainer(settings, prepared_autoencoder(settings))
    for _ in range(3):
        halves.advance()
    halves.save()
    resumed = train(short(tmp_path / "halves"))
    for (name, value), other in zip(load_file(whole).items(), load_file(resumed).values(), strict=True):
        assert torch.equal(value, other), name


def test_curve_is_written_and_goes_on_when_a_finished_run_does(tmp_path: Path) -> None:
    train(short(tmp_path))
    weights = train(short(tmp_path, steps=9))
    assert json.loads(read_metadata(weights)["training"])["finished"] == [6]
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    assert all(0.5 < float(row["held_out_loss"]) < 1.5 for row in rows)


def taken(settings: TrainSettings, steps: int) -> Trainer:
    """A run that was stopped after so many steps."""
    trainer = Trainer(settings, prepared_autoencoder(settings))
    for _ in range(steps):
        trainer.advance()
    trainer.save()
    return trainer


def test_how_long_to_train_may_change_until_the_learning_rate_falls(tmp_path: Path) -> None:
    taken(short(tmp_path, steps=10), 7)
    early = Trainer(short(tmp_path, steps=20), load().first_stage_model)
    assert early.resume()
    assert early.finished == []
    taken(short(tmp_path, steps=10), 9)
    for steps, message in ((20, "nears its end at 10"), (8, "has taken 9 already")):
        with pytest.raises(TrainError, match=message):
            train(short(tmp_path, steps=steps))


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    prepared_autoencoder(short(tmp_path))
    with pytest.raises(TrainError, match="begun with autoencoder_steps 2, not 3"):
        train(replace(short(tmp_path), autoencoder_steps=3))
    before = train(short(tmp_path)).read_bytes()
    with pytest.raises(TrainError, match="begun with batch 4, not 5; seed 0, not 1: use these or another --out"):
        train(replace(short(tmp_path, steps=9), batch=5, seed=1))
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_shipped_weights_have_the_held_out_loss_that_they_state(tmp_path: Path) -> None:
    trainer = Trainer(replace(short(tmp_path), held_out=HELD_OUT), load().first_stage_model)
    trainer.average = load()
    assert trainer.held_out_loss() == pytest.approx(float(read_metadata()["held_out_loss"]), rel=0.005)


@torch.no_grad()
def test_shipped_autoencoder_keeps_the_picture_at_unit_variance() -> None:
    autoencoder = load().first_stage_model
    pictures = draw_batch(128, seed=3, step=0, caption_dropout=0).pictures
    latent = autoencoder.encode(pictures)
    assert latent.shape == (128, 8, 16, 16)
    assert latent.mean().abs() < 0.1
    assert latent.std() == pytest.approx(1, abs=0.1)
    error = (autoencoder.decode(latent) - pictures).square().mean()
    assert -10 * error.log10() > 27  # decibels


def test_the_model_card_is_that_of_the_weights() -> None:
    """``python -m lab card`` writes it anew."""
    assert card.weights_table() in card.CARD.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "from 1 on"),
        ("autoencoder_steps", -5, "from 1 on"),
        ("learning_rate", math.nan, "above 0"),
        ("learning_rate", -1.0, "above 0"),
        ("seed", HELD_OUT_SEED, "from 0 to 999999"),
    ],
)
def test_bad_numbers_are_refused(name: str, value: float, allowed: str) -> None:
    with pytest.raises(TrainError, match=rf"{name}: {value} can't be used; allowed: a (whole )?number {allowed}"):
        TrainSettings(out=Path(), **{name: value})


def test_random_numbers_of_different_uses_do_not_meet() -> None:
    """torch's generator takes a seed's lower 32 bits."""
    starts = {
        "training": (0, TrainSettings(out=Path()).steps),
        "autoencoder": (7 * 10**9, 3000),
        "classifier": (10**9, 2000),
        "held out": (HELD_OUT_SEED * 10**9, HELD_OUT),
        "held out of the classifier": (classifier.HELD_OUT_SEED * 10**9, 1),
        "reference": (evaluate.REFERENCE_SEED * 10**9, evaluate.REFERENCE),
        "drawn": (evaluate.REAL_SEED * 10**9, evaluate.REFERENCE),
        "captions": (evaluate.CAPTION_SEED * 10**9, 1000),
        "noise": (evaluate.NOISE_SEED * 10**9, evaluate.REFERENCE),
        "degraded": (degraded.SEED, 1),
    }
    used: dict[int, str] = {}
    for use, (first, count) in starts.items():
        for seed in range(first, first + count):
            assert used.setdefault(seed % 2**32, use) == use


def test_shipped_classifier_reads_the_pictures() -> None:
    model = classifier.load_classifier()
    assert classifier.WEIGHTS.stat().st_size < 2_000_000
    accuracy = classifier.accuracy(model, count=300)
    assert min(accuracy[1:3] + accuracy[4:]) > 0.97
    assert min(accuracy) > 0.9


def test_agreement_counts_the_words_that_are_seen() -> None:
    ids = torch.tensor([parse("red star on green"), parse("red star on green"), parse("")])
    answers = classifier.answers_of(
        torch.tensor([parse("red star on green"), parse("blue star on red"), parse("disc")])
    )
    logits = tuple(
        torch.nn.functional.one_hot(answers[:, index], count).float() for index, count in enumerate(classifier.ANSWERS)
    )
    torch.testing.assert_close(classifier.agreement(logits, ids), torch.tensor([1, 1 / 3, 1]))


def test_classifier_training_runs() -> None:
    model = classifier.train_classifier(steps=2, batch=4)
    assert model.embed(torch.rand(2, 3, 64, 64)).shape == (2, classifier.FEATURES)
