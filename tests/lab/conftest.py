"""What tests of the evaluation share: one of eight samples a line, and what it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import classifier, evaluate
from lab.evaluate import Evaluation, Size
from lab.points import Point, default_points
from sag_pag.demo.model import load


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Where they are kept."""
    return tmp_path / "samples"


@pytest.fixture
def judge(samples: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    """In float32, because bfloat16 is slow where the CPU has none."""
    monkeypatch.setattr(evaluate, "REFERENCE", 200)
    size = Size(groups=2, group=4, batch=3)
    return Evaluation(load(), classifier.load_classifier(), out=samples, size=size, bf16=False)


@pytest.fixture
def wanted() -> list[Point]:
    """Two steps each, in two of the modes."""
    return [point for point in default_points(steps=2) if point.mode != "captioned"]
