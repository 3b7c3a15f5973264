"""What ``evaluate`` has measured, and the CSV files that keep it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from lab.metrics import Change, Estimate
from lab.points import DEFAULT, MODES, PARTS, Part, Point, default_points, sweep_points


@dataclass(frozen=True)
class Setup:
    """How a line was measured: on how many pictures, in which groups of seeds, against how many drawn ones of what.

    ``drawn_of`` is ``any captions``, or ``the same captions``, where chance in the captions is no part of the distance.
    """

    samples: int
    groups: int
    first_group: int
    drawn: int
    drawn_of: str
    computed_in: str


@dataclass(frozen=True)
class Result:
    """One point's numbers; ``change`` is the Fréchet distance's relative to no guidance, from the same seeds.

    ``against`` is that of a mix relative to each of its parts, where that has been measured. ``sizes_off`` and
    ``shapes_off`` say how far the sizes and shapes that the classifier sees (of the left object) are from being as
    frequent as among drawn pictures: the share that would have to be others. ``two_objects`` is the share of pictures
    in which it sees two objects.
    """

    point: Point
    setup: Setup
    frechet: Estimate
    change: Change | None
    precision: Estimate
    recall: Estimate
    agreement: Estimate
    sizes_off: Estimate
    shapes_off: Estimate
    two_objects: Estimate
    gigaflops: float
    against: Mapping[Part, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """What as many drawn pictures as a point has samples get, and their distance after encoding and decoding.

    The latter is what a perfect U-Net would get, whose latents this autoencoder decodes.
    """

    frechet: Estimate
    decoded: Estimate
    precision: Estimate
    recall: Estimate
    sizes_off: Estimate
    shapes_off: Estimate
    two_objects: Estimate


@dataclass(frozen=True)
class Sweep:
    """The results of one sweep (at least one), and what drawn pictures get."""

    results: list[Result]
    floor: Floor

    @property
    def name(self) -> str:
        return self.results[0].point.sweep


DRAWN, DECODED = "drawn pictures", "drawn pictures, encoded and decoded"
"""The two lines of a CSV whose mode is no mode."""
_SETUP = tuple(entry.name for entry in fields(Setup))
_OF_DRAWN = ("frechet", "precision", "recall", "sizes_off", "shapes_off", "two_objects")
_ESTIMATES = ("frechet", "precision", "recall", "agreement", "sizes_off", "shapes_off", "two_objects")
_CHANGES = ("change", *(f"against_{part}" for part in PARTS))


def _estimate_columns(name: str) -> tuple[str, str]:
    return name, f"{name}_margin"


def _change_columns(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


COLUMNS = (
    "sweep", "mode", "label", "cfg", "steps", *_SETUP, *_estimate_columns("frechet"),
    *(column for name in _CHANGES for column in _change_columns(name)),
    *(column for name in _ESTIMATES[1:] for column in _estimate_columns(name)), "gflop_per_picture",
)  # fmt: skip
"""Margins are half-widths of 95 % intervals, low and high their ends."""


def _cells(name: str, value: Estimate | Change | None) -> dict[str, str]:
    """Empty for what is not known."""
    if value is None or math.isnan(value.value):
        return {}
    columns = _estimate_columns(name) if isinstance(value, Estimate) else _change_columns(name)
    return {column: f"{number:.6f}" for column, number in zip(columns, asdict(value).values(), strict=True)}


def _row(result: Result) -> dict[str, object]:
    point = result.point
    row: dict[str, object] = {
        "sweep": point.sweep,
        "mode": point.mode,
        "label": point.label,
        "cfg": f"{point.recipe.cfg:g}",
        "steps": point.recipe.steps,
        "gflop_per_picture": f"{result.gigaflops:.4f}",
        **asdict(result.setup),
        **_cells("change", result.change),
    }
    for part, change in result.against.items():
        row |= _cells(f"against_{part}", change)
    for name in _ESTIMATES:
        row |= _cells(name, getattr(result, name))
    return row


def write_csv(sweep: Sweep, path: Path) -> None:
    """One result a line, and two lines of drawn pictures."""
    about = {"sweep": sweep.name, **asdict(sweep.results[0].setup)}
    drawn: dict[str, object] = {**about, "mode": DRAWN}
    for name in _OF_DRAWN:
        drawn |= _cells(name, getattr(sweep.floor, name))
    decoded = {**about, "mode": DECODED, **_cells("frechet", sweep.floor.decoded)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*(_row(result) for result in sweep.results), drawn, decoded])


def _estimate(row: Mapping[str, str], name: str) -> Estimate:
    value, margin = (float(row[column] or math.nan) for column in _estimate_columns(name))
    return Estimate(value, margin)


def _change(row: Mapping[str, str], name: str) -> Change | None:
    if not row[name]:
        return None
    return Change(*(float(row[column]) for column in _change_columns(name)))


@cache
def _points(sweep: str, steps: int) -> dict[tuple[str, str], Point]:
    """By mode and label."""
    points = default_points(steps) if sweep == DEFAULT else sweep_points(sweep, modes=MODES, steps=steps)
    return {(point.mode, point.label): point for point in points}


def _result(row: Mapping[str, str]) -> Result:
    against = {part: _change(row, f"against_{part}") for part in PARTS}
    numbers = {name: int(row[name]) for name in _SETUP if name not in ("drawn_of", "computed_in")}
    return Result(
        point=_points(row["sweep"], int(row["steps"]))[row["mode"], row["label"]],
        setup=Setup(**numbers, drawn_of=row["drawn_of"], computed_in=row["computed_in"]),
        change=_change(row, "change"),
        gigaflops=float(row["gflop_per_picture"]),
        against={part: change for part, change in against.items() if change is not None},
        **{name: _estimate(row, name) for name in _ESTIMATES},
    )


def read_csv(path: Path) -> Sweep:
    """What :func:`write_csv` wrote. Raises ``ValueError`` for other files."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        (drawn,), (decoded,) = ([row for row in rows if row["mode"] == mode] for mode in (DRAWN, DECODED))
        floor = Floor(decoded=_estimate(decoded, "frechet"), **{name: _estimate(drawn, name) for name in _OF_DRAWN})
        results = [_result(row) for row in rows if row["mode"] not in (DRAWN, DECODED)]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no results of this version's sweeps: {error}") from error
    if not results:
        raise ValueError(f"{path} holds no results")
    return Sweep(results, floor)
