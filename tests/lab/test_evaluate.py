"""Evaluation: samples are made once and only for what they are of, and numbers mean what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lab import classifier, data
from lab.evaluate import REDRAWN, Evaluation, Size, redrawn_pictures
from lab.metrics import Moments, frechet_distance
from lab.points import Point, default_points, sweep_points
from sag_pag.demo.captions import SHAPES
from sag_pag.demo.model import DemoModel
from sag_pag.demo.unet import redraw_


def test_evaluation_is_resumed_group_by_group(judge: Evaluation, wanted: list[Point]) -> None:
    assert len(judge.missing(wanted)) == 20
    judge.make(wanted[0], 0)
    judge.make(wanted[0], 1)
    assert len(judge.missing(wanted)) == 18
    assert sorted(judge.missing(wanted), key=str) == sorted(
        judge.missing(wanted, part=1, parts=2) + judge.missing(wanted, part=2, parts=2), key=str
    )
    first = load_file(judge.path(wanted[0], 0))
    assert first["features"].shape == (4, classifier.FEATURES)
    judge.path(wanted[0], 0).unlink()
    judge.make(wanted[0], 0)
    assert torch.equal(load_file(judge.path(wanted[0], 0))["features"], first["features"])


def test_samples_of_other_weights_are_not_taken(judge: Evaluation, wanted: list[Point]) -> None:
    other = redraw_(DemoModel(), seed=1)
    assert isinstance(other, DemoModel)
    model, classifier_too = (
        Evaluation(*models, out=judge.out, size=judge.size, bf16=False)
        for models in ((other, judge.classifier), (judge.model, classifier.Classifier()))
    )
    point = wanted[0]
    paths = {evaluation.path(point, 0) for evaluation in (judge, model, classifier_too)}
    assert len({*paths, judge.path(wanted[1], 0)}) == 4


def test_other_groups_are_other_seeds(judge: Evaluation, wanted: list[Point]) -> None:
    later = Evaluation(judge.model, judge.classifier, out=judge.out, size=replace(judge.size, first=1), bf16=False)
    point = wanted[0]
    judge.make_all([point])
    assert [group for _, group in later.missing([point])] == [2]
    later.make_all([point])
    first, second = (load_file(judge.path(point, group))["features"] for group in (1, 2))
    assert not torch.equal(first, second)
    assert later.result(point).frechet != judge.result(point).frechet


def test_samples_are_shared_by_what_makes_the_same_pictures(judge: Evaluation, wanted: list[Point]) -> None:
    """What is switched off has no part in a recipe's name."""
    none, sag, pag, both = wanted[:4]
    scale = next(point for point in sweep_points("sag-scale", steps=2) if point.label == "0.75")
    assert judge.path(scale, 0) == judge.path(sag, 0) == judge.path(both.alone("sag"), 0)
    assert judge.path(pag, 0) == judge.path(both.alone("pag"), 0) != judge.path(both, 0)
    assert judge.path(sag.baseline, 0) == judge.path(none, 0)


def test_bfloat16_pictures_are_those_of_float32(judge: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    """To less than one of 256 steps of brightness on average, as ``evaluate`` says of itself."""
    point = default_points(steps=8)[-1]
    pictures = []
    embed = judge.classifier.embed
    monkeypatch.setattr(judge.classifier, "embed", lambda made: (pictures.append(made), embed(made))[1])
    for bf16 in (True, False):
        judge.bf16 = bf16
        judge.make(point, 0)
    half, full = torch.cat(pictures[:2]), torch.cat(pictures[2:])
    assert not torch.equal(half, full)
    assert (half - full).abs().mean() < 1 / 256


def test_real_pictures_are_close_to_real_pictures(judge: Evaluation) -> None:
    judge = Evaluation(judge.model, judge.classifier, out=judge.out, size=Size(groups=2, group=100))
    floor = judge.floor(default_points()[0])
    noise = Moments.of(judge.classifier.embed(torch.rand(200, 3, 64, 64)))
    assert floor.frechet.value < floor.decoded.value < 0.1 * frechet_distance(judge.reference, noise)
    assert floor.precision.value > 0.5
    assert floor.recall.value > 0.5
    assert floor.two_objects.value == pytest.approx(data.TWO_OBJECTS, abs=0.1)
    assert floor.sizes_off.value < 0.1
    assert floor.shapes_off.value < 0.2


def test_mixes_with_cfg_are_measured_from_drawn_pictures_of_the_same_captions(judge: Evaluation) -> None:
    """Which captions a group happens to have is no part of the distance: other drawn pictures of them come close."""
    judge = Evaluation(judge.model, judge.classifier, out=judge.out, size=Size(groups=2, group=20), bf16=False)
    mix = sweep_points("best-mix", steps=2)
    matched, any_captions = judge.floor(mix[0]), judge.floor(default_points()[0])
    assert 0 < matched.frechet.value < 0.6 * any_captions.frechet.value
    assert matched.frechet.value < matched.decoded.value < any_captions.decoded.value
    judge.make_all(mix[:2])
    result = judge.result(mix[1])
    assert (result.setup.drawn, result.setup.drawn_of) == (2 * 20 * REDRAWN, "the same captions")
    own = Moments.of(torch.cat([judge.classifier.embed(redrawn_pictures(group, 20)) for group in (0, 1)]))
    made = [Moments.of(torch.cat([load_file(judge.path(point, group))["features"] for group in (0, 1)]))
            for point in mix[:2]]  # fmt: skip
    first, second = (frechet_distance(own, moments) for moments in made)
    assert result.frechet.value == pytest.approx(second)
    assert result.change is not None
    assert result.change.value == pytest.approx(second / first - 1)
    assert result.against == {"cfg": result.change}  # SAG beside the best CFG, which is CFG alone at the same scale too
    assert judge.setup(default_points()[0]).drawn_of == "any captions"


def test_what_is_off_about_pictures_that_are_all_alike_in_one_respect(judge: Evaluation) -> None:
    scenes = data.draw_scenes(200, torch.Generator().manual_seed(1))
    big = data.draw_scenes(200, torch.Generator().manual_seed(2))
    big.size[:], big.radius[:] = 2, torch.where(big.two, 0.2, 0.35)[:, None]
    stars = replace(scenes, shape=torch.full_like(scenes.shape, SHAPES.index("star")))
    found = {}
    for name, pictures in (("drawn", scenes), ("big", big), ("stars", stars)):
        features = judge.classifier.embed(data.render(pictures))
        found[name] = judge.seen(torch.split(features, 100))
    assert found["big"]["sizes_off"].value == pytest.approx(2 / 3, abs=0.1)
    assert found["stars"]["shapes_off"].value == pytest.approx(7 / 8, abs=0.1)
    for name, which in (("drawn", "sizes_off"), ("drawn", "shapes_off"), ("big", "shapes_off"), ("stars", "sizes_off")):
        assert found[name][which].value < 0.2
