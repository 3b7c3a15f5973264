"""Does guidance improve pictures? Fréchet distance, precision, recall and caption agreement of many samples.

Samples are made in groups of seeds; a finished group is a small file, so an interrupted run goes on where it was, and
memory holds one batch of pictures and the features. After a change of the code, begin in another folder: files tell
other weights and other recipes apart, not other code. Every point uses the same seeds and captions. The U-Net computes
in bfloat16 unless told otherwise, with torch's fused attention: half the time, and pictures that differ from float32's
by less than one of 256 steps of brightness on average.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab import data, metrics
from lab.classifier import Classifier, agreement
from lab.files import written_whole
from lab.metrics import Change, Estimate, Moments
from lab.points import Part, Point
from lab.results import Floor, Result, Setup
from sag_pag.demo.captions import SHAPE_SLOTS, SIZE_SLOTS, describe
from sag_pag.demo.layers import fused_attention
from sag_pag.demo.model import DemoModel
from sag_pag.demo.progress import Progress
from sag_pag.demo.sampling import count_gigaflops, sample

REFERENCE_SEED = 3 * 10**6
REAL_SEED = 4 * 10**6
CAPTION_SEED = 5 * 10**6
NOISE_SEED = 7 * 10**6
REDRAWN_SEED = 8 * 10**6
REFERENCE = 20_000
REDRAWN = 20
"""Drawn pictures of each caption, where the distance is from those of the same captions."""


@dataclass(frozen=True)
class Size:
    """How many samples a point gets: ``groups`` of ``group`` each, made ``batch`` at a time.

    ``first`` is the first group's number; other numbers are other seeds.
    """

    groups: int = 10
    group: int = 50
    batch: int = 20
    first: int = 0

    def __post_init__(self) -> None:
        if self.groups < 2 or self.group < 2 or self.batch < 1:
            raise ValueError("intervals need at least two groups of at least two samples")
        if self.total - self.group <= metrics.NEIGHBOURS:
            raise ValueError(f"more than {metrics.NEIGHBOURS} samples must be left without one group: take more")
        if self.total > REFERENCE:
            raise ValueError(f"{self.total} samples a line can't be used; allowed: at most {REFERENCE}")

    @property
    def total(self) -> int:
        return self.groups * self.group

    @property
    def numbers(self) -> range:
        """The groups' numbers."""
        return range(self.first, self.first + self.groups)


def fingerprint(*models: nn.Module) -> str:
    """A short hash of the weights: results of other weights are not taken for these."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def drawn_pictures(count: int, *, seed: int, chunk: int = 500) -> Iterator[Tensor]:
    """Freshly drawn pictures, ``(chunk, 3, 64, 64)`` at a time."""
    for index, start in enumerate(range(0, count, chunk)):
        generator = torch.Generator().manual_seed(seed * 10**9 + index)
        yield data.render(data.draw_scenes(min(chunk, count - start), generator))


def drawn_features(classifier: Classifier, count: int, *, seed: int) -> Tensor:
    """``(count, 96)`` features of freshly drawn pictures."""
    return torch.cat([classifier.embed(pictures) for pictures in drawn_pictures(count, seed=seed)])


def group_scenes(group: int, size: int) -> data.Scenes:
    """What the captions of one group say, drawn as training's are."""
    return data.draw_scenes(size, torch.Generator().manual_seed(CAPTION_SEED * 10**9 + group))


def redrawn_pictures(group: int, size: int) -> Tensor:
    """``(size * REDRAWN, 3, 64, 64)`` other drawn pictures of one group's captions."""
    scenes, generator = group_scenes(group, size), torch.Generator().manual_seed(REDRAWN_SEED * 10**9 + group)
    return torch.cat([data.render(data.redrawn(scenes, generator)) for _ in range(REDRAWN)])


class Evaluation:
    """Makes what is missing of the samples' features, and turns features into results."""

    def __init__(
        self, model: DemoModel, classifier: Classifier, *, out: Path, size: Size, bf16: bool = True
    ) -> None:
        self.model = model
        self.bf16 = bf16
        self.classifier = classifier
        self.out = out
        self.size = size
        self.judged = fingerprint(model, classifier)
        self.costs: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def drawn(self) -> Tensor:
        """``(20000, 96)`` features of the pictures that samples are compared with."""
        return drawn_features(self.classifier, REFERENCE, seed=REFERENCE_SEED)

    @cached_property
    def reference(self) -> Moments:
        """What the Fréchet distance is measured from."""
        return Moments.of(self.drawn)

    @cached_property
    def redrawn(self) -> list[Moments]:
        """What it is measured from in a map of mixes with CFG: each group's captions, drawn anew."""
        return [
            Moments.of(self.classifier.embed(redrawn_pictures(group, self.size.group))) for group in self.size.numbers
        ]

    def _measured_from(self, point: Point) -> metrics.Reference:
        return self.redrawn if point.mixed else self.reference

    @property
    def manifold(self) -> Tensor:
        """As many drawn pictures' features as there are samples: what precision and recall are measured on."""
        return self.drawn[: self.size.total]

    def setup(self, point: Point) -> Setup:
        """How a point is measured."""
        return Setup(
            samples=self.size.total, groups=self.size.groups, first_group=self.size.first,
            drawn=self.size.total * REDRAWN if point.mixed else len(self.drawn),
            drawn_of="the same captions" if point.mixed else "any captions",
            computed_in="bfloat16" if self.bf16 else "float32",
        )  # fmt: skip

    def key(self, point: Point) -> str:
        return point.key(judged=self.judged, group_size=self.size.group, bf16=self.bf16)

    def path(self, point: Point, group: int) -> Path:
        return self.out / f"{self.key(point)}-{group:03}.safetensors"

    def missing(self, points: Sequence[Point], *, part: int = 1, parts: int = 1) -> list[tuple[Point, int]]:
        """Points and groups still to be made, each once: several sweeps share points."""
        wanted = {self.path(point, group): (point, group) for group in self.size.numbers for point in points}
        shares = list(wanted.items())[part - 1 :: parts]
        return [todo for path, todo in shares if not path.exists()]

    @torch.no_grad()
    def make(self, point: Point, group: int) -> None:
        """Sample one group and write its features and caption agreement."""
        size = self.size
        scenes = group_scenes(group, size.group)
        ids = data.caption_ids(scenes)
        drawn = self.model.first_stage_model.encode(data.render(scenes)).float() if point.recipe.begin else None
        captions = [describe(row) if point.captioned else "" for row in ids.tolist()]
        features, agreements = [], []
        for start in range(0, size.group, size.batch):
            rows = range(start, min(start + size.batch, size.group))
            seeds = [NOISE_SEED * 10**9 + group * size.group + row for row in rows]
            part = captions[rows.start : rows.stop]
            with fused_attention(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                latent = sample(
                    self.model, part, seeds=seeds, recipe=point.recipe,
                    drawn=None if drawn is None else drawn[rows.start : rows.stop],
                )  # fmt: skip
            pictures = self.model.first_stage_model.decode(latent)
            features.append(self.classifier.embed(pictures))
            agreements.append(agreement(self.classifier.answers(features[-1]), ids[rows.start : rows.stop]))
        tensors = {"features": torch.cat(features), "agreement": torch.cat(agreements)}
        with written_whole(self.path(point, group)) as partial:
            save_file(tensors, partial, metadata={"label": point.label, "mode": point.mode})

    def make_all(self, points: Sequence[Point], *, part: int = 1, parts: int = 1) -> None:
        """Make whatever is missing of the points; of several processes the ``part``-th takes its share."""
        todo = self.missing(points, part=part, parts=parts)
        with Progress("sampling", len(todo)) as bar:
            for done, (point, group) in enumerate(todo, start=1):
                self.make(point, group)
                bar.update(done, f"{point.sweep}: {point.label}, {point.mode}")

    def made(self, point: Point) -> bool:
        """Whether all groups of the point have been made."""
        return all(self.path(point, group).exists() for group in self.size.numbers)

    def moments(self, point: Point) -> list[Moments]:
        """Of the features of each group."""
        return [Moments.of(load_file(self.path(point, group))["features"]) for group in self.size.numbers]

    def change(self, point: Point, *, since: Point) -> Change:
        """The Fréchet distance relative to another point's, both made."""
        return metrics.relative_change(self._measured_from(point), self.moments(since), self.moments(point))

    def against(self, point: Point) -> dict[Part, Change]:
        """Of a mix the Fréchet distance relative to each of its parts, where that has been made."""
        return {part: self.change(point, since=alone) for part, alone in point.parts.items() if self.made(alone)}

    def result(self, point: Point) -> Result:
        """The numbers of one point, all of whose groups (and its baseline's) have been made."""
        loaded = [load_file(self.path(point, group)) for group in self.size.numbers]
        compared = self.key(point) != self.key(point.baseline) and self.made(point.baseline)
        features = [part["features"] for part in loaded]
        precision, recall = self._coverage(features)
        key = self.key(point)
        if key not in self.costs:
            caption = "red star on green" if point.captioned else ""
            self.costs[key] = count_gigaflops(self.model, caption, recipe=point.recipe)
        return Result(
            point=point,
            setup=self.setup(point),
            frechet=metrics.frechet_estimate(self._measured_from(point), [Moments.of(group) for group in features]),
            change=self.change(point, since=point.baseline) if compared else None,
            precision=precision,
            recall=recall,
            agreement=metrics.mean_estimate([part["agreement"] for part in loaded])
            if point.captioned
            else Estimate(math.nan, math.nan),
            **self.seen(features),
            gigaflops=self.costs[key],
            against=self.against(point),
        )

    def _frequencies(self, features: Tensor, slot: int) -> Tensor:
        """How often the classifier gives each answer to a slot's question."""
        logits = self.classifier.answers(features)[slot]
        return torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]).double() / len(features)

    def seen(self, groups: Sequence[Tensor]) -> dict[str, Estimate]:
        """What the classifier says of the samples, by the names of :class:`Result`."""

        def off(slot: int) -> Estimate:
            wanted = self._frequencies(self.drawn, slot)
            found = torch.stack([self._frequencies(group, slot) for group in groups])
            return metrics.jackknife(
                len(groups), lambda kept: (found[list(kept)].mean(dim=0) - wanted).abs().sum().item() / 2
            )

        (size, _), (shape, second) = SIZE_SLOTS, SHAPE_SLOTS
        two = [self.classifier.answers(group)[second].argmax(dim=1) > 0 for group in groups]
        return {"sizes_off": off(size), "shapes_off": off(shape), "two_objects": metrics.mean_estimate(two)}

    def _coverage(self, groups: Sequence[Tensor]) -> tuple[Estimate, Estimate]:
        """Precision over the groups of samples; recall once more without each group."""
        on_real, _ = metrics.precision_recall(self.manifold, torch.cat(list(groups)))

        def recall(kept: Sequence[int]) -> float:
            _, covered = metrics.precision_recall(self.manifold, torch.cat([groups[index] for index in kept]))
            return covered.double().mean().item()

        precision = metrics.mean_estimate(torch.split(on_real, [len(group) for group in groups]))
        return precision, metrics.jackknife(len(groups), recall)

    def floor(self, point: Point) -> Floor:
        """Of drawn pictures that are not those which the point is measured from."""
        first_stage, size = self.model.first_stage_model, self.size
        drawn, decoded = [], []
        same = (data.render(group_scenes(group, size.group)) for group in size.numbers)
        for pictures in same if point.mixed else drawn_pictures(size.total, seed=REAL_SEED):
            drawn.append(self.classifier.embed(pictures))
            decoded.append(self.classifier.embed(first_stage.decode(first_stage.encode(pictures))))
        groups, decoded_groups = (torch.split(torch.cat(parts), size.group) for parts in (drawn, decoded))
        precision, recall = self._coverage(groups)
        frechet, of_decoded = (
            metrics.frechet_estimate(self._measured_from(point), [Moments.of(group) for group in features])
            for features in (groups, decoded_groups)
        )
        return Floor(frechet, of_decoded, precision, recall, **self.seen(groups))
