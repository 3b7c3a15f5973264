"""Training: repeatable, resumable to the bit, and learning something."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sag_pag.demo import classifier
from sag_pag.demo.captions import parse
from sag_pag.demo.model import load, read_metadata
from sag_pag.demo.progress import Progress
from sag_pag.demo.train import Trainer, TrainSettings, draw_batch, learning_rate, prepared_autoencoder, train


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


def test_curve_is_written_and_goes_on_when_resumed(tmp_path: Path) -> None:
    train(short(tmp_path))
    train(short(tmp_path, steps=9))
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    assert all(0.5 < float(row["held_out_loss"]) < 1.5 for row in rows)


def test_shipped_weights_have_the_held_out_loss_that_they_state(tmp_path: Path) -> None:
    trainer = Trainer(replace(short(tmp_path), held_out=64), load().first_stage_model)
    assert trainer.held_out_loss() == pytest.approx(1, abs=0.1)
    trainer.average = load()
    assert trainer.held_out_loss() == pytest.approx(float(read_metadata()["held_out_loss"]), rel=0.2)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        TrainSettings(out=Path(), steps=0)


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


def test_progress_in_a_log_and_on_a_terminal() -> None:
    log = io.StringIO()
    with Progress("work", 200, stream=log) as bar:
        for done in range(1, 201):
            bar.update(done)
    assert len(log.getvalue().splitlines()) == 2
    assert "200/200" in log.getvalue()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Progress("work", 5, stream=screen) as bar:
        bar.update(5, "done")
    assert screen.getvalue().startswith("\r")
    assert screen.getvalue().endswith("done\n")
