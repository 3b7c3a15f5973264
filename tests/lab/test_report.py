"""Results as CSV, tables and plots."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from lab import report
from lab.evaluate import Evaluation
from lab.points import Point


def test_results_are_written(judge: Evaluation, wanted: list[Point], tmp_path: Path) -> None:
    judge.make_all(wanted)
    written = report.write_all(judge, {"default": wanted}, out=tmp_path, plots=report.can_plot())
    assert all(path.is_file() for path in written)
    with (tmp_path / "default.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["none", "SAG", "PAG 0.5", "SAG+PAG 0.5", "PAG 3"] * 2
    assert [row["change"] == "" for row in rows] == [True, False, False, False, False] * 2
    assert all(
        float(row["change_low"]) < float(row["change"]) < float(row["change_high"]) for row in rows if row["change"]
    )
    assert [row["agreement"] == "" for row in rows] == [True] * 5 + [False] * 5
    assert float(rows[1]["gflop_per_picture"]) > 1.9 * float(rows[0]["gflop_per_picture"])
    table = (tmp_path / "default.md").read_text()
    assert table.count("\n| ") == 1 + 10 + 2 + 2
    assert "from 200 drawn pictures, precision and recall are against 8 of them. 8 other drawn pictures" in table
    together = [line for line in table.splitlines() if line.startswith("| unconditional | SAG+PAG 0.5 |")][1]
    both, pag = float(rows[3]["frechet"]), float(rows[2]["frechet"])
    assert together.split("|")[4].startswith(f" {100 * (both / pag - 1):+.0f} % (")


def test_plots_name_what_they_show(
    judge: Evaluation, wanted: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes may have other ways of guiding than each other, and each is drawn where its change is."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    wanted = [point for point in wanted if not (point.captioned and "SAG" in point.label)]
    judge.make_all(wanted)
    results = [judge.result(point) for point in wanted]
    report.plot_sweep(results, tmp_path / "plot.png", floor=1.0)
    panels = pyplot.gcf().axes
    assert [axes.get_title() for axes in panels] == list(dict.fromkeys(point.mode for point in wanted))
    for axes in panels:
        shown = [result for result in results if result.point.mode == axes.get_title() and result.change]
        assert [label.get_text() for label in axes.get_yticklabels()] == [result.point.label for result in shown]
        drawn = [tuple(container.lines[0].get_xydata()[0]) for container in axes.containers]
        assert drawn == [(pytest.approx(1 + result.change.value), place) for place, result in enumerate(shown)]
    assert len({axes.get_xlim() for axes in panels}) == 1
    assert panels[-1].get_xlabel() == "relative Fréchet distance\n(95 % intervals)"


def test_plots_of_a_wide_range_say_that_they_are_logarithmic(
    judge: Evaluation, wanted: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    judge.make_all(wanted)
    results = [judge.result(point) for point in wanted]
    last = results[-1].change
    assert last is not None
    wide = replace(results[-1], change=replace(last, high=3.1))
    report.plot_sweep([*results[:-1], wide], tmp_path / "plot.png", floor=1.0)
    panels = pyplot.gcf().axes
    assert {axes.get_xscale() for axes in panels} == {"log"}
    assert panels[-1].get_xlabel() == "relative Fréchet distance\n(log scale, 95 % intervals)"


def test_ratios_are_named_beside_a_single_panel_too(
    judge: Evaluation, wanted: list[Point], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    wanted = [point for point in wanted if not point.captioned]
    judge.make_all(wanted)
    report.plot_sweep([judge.result(point) for point in wanted], tmp_path / "plot.png", floor=1.0)
    (panel,) = pyplot.gcf().axes
    assert panel.get_xlabel() == "relative Fréchet distance\n(95 % intervals)"
    assert panel.get_ylabel() == ""


def test_docs_get_the_tables_between_their_marks(judge: Evaluation, wanted: list[Point], tmp_path: Path) -> None:
    judge.make_all(wanted)
    page = tmp_path / "page.md"
    begin, end = report.marks("default")
    page.write_text(f"before\n{begin}\nold\n{end}\nbetween\n{begin.replace('default', 'range')}\nkept\n")
    plots = report.can_plot()
    for _ in range(2):
        report.write_all(judge, {"default": wanted}, out=tmp_path, plots=plots, docs=page)
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nbetween\n{begin.replace('default', 'range')}\nkept\n")
    assert "old" not in text
    assert text.count("| unconditional | PAG 0.5 |") == 1
    assert "8 samples a line, in 2 groups of seeds, 0 to 1" in text
    assert ("](page/default.png)" in text) == plots == (tmp_path / "page" / "default.png").is_file()
    assert (tmp_path / "page" / "default.csv").read_bytes() == (tmp_path / "default.csv").read_bytes()
