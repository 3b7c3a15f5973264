"""Results as CSV, tables and plots."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lab import cli, report
from lab.evaluate import Evaluation
from lab.points import MODES, Point
from lab.results import Result, read_csv

REPOSITORY = Path(__file__).parents[2]
KEPT = sorted(cli.KEPT.glob("*.csv"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tests here need the same ones."""
    return tmp_path_factory.mktemp("samples")


def test_results_are_written(judge: Evaluation, wanted: list[Point], tmp_path: Path) -> None:
    judge.make_all(wanted)
    written = report.write_all(judge, {"default": wanted}, out=tmp_path, plots=report.can_plot())
    assert all(path.is_file() for path in written)
    with (tmp_path / "default.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] in MODES]
    assert [row["label"] for row in rows] == ["none", "SAG", "PAG 0.5", "SAG+PAG 0.5", "PAG 3"] * 2
    assert [row["change"] == "" for row in rows] == [True, False, False, False, False] * 2
    assert all(
        float(row["change_low"]) < float(row["change"]) < float(row["change_high"]) for row in rows if row["change"]
    )
    assert [row["agreement"] == "" for row in rows] == [True] * 5 + [False] * 5
    assert float(rows[1]["gflop_per_picture"]) > 1.9 * float(rows[0]["gflop_per_picture"])
    table = (tmp_path / "default.md").read_text()
    assert table.count("\n| ") == 1 + 10 + 2 + 2
    assert "8 samples a line, in 2 groups of seeds, 0 to 1" in table
    assert "from 200 drawn pictures of any captions, precision and recall are against 8 of any. 8 other" in table
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


def numbers(result: Result) -> list[float]:
    estimates = (result.frechet, result.precision, result.recall, result.agreement)
    seen = (result.sizes_off, result.shapes_off, result.two_objects)
    changes = [result.change, *result.against.values()]
    values = [number for estimate in (*estimates, *seen) for number in (estimate.value, estimate.margin)]
    return [*values, *(number for change in changes if change for number in (change.value, change.low, change.high))]


def test_a_csv_holds_all_that_was_measured(judge: Evaluation, wanted: list[Point], tmp_path: Path) -> None:
    judge.make_all(wanted)
    report.write_all(judge, {"default": wanted}, out=tmp_path, plots=False)
    kept = read_csv(tmp_path / "default.csv")
    for result, point in zip(kept.results, wanted, strict=True):
        measured = judge.result(point)
        assert (result.point, result.setup) == (point, measured.setup)
        assert list(result.against) == list(measured.against)
        assert numbers(result) == pytest.approx(numbers(measured), abs=1e-6, nan_ok=True)
        assert result.gigaflops == pytest.approx(measured.gigaflops, abs=1e-4)
    assert kept.results[3].against
    floor = judge.floor(wanted[0])
    for name in ("frechet", "decoded", "precision", "recall", "sizes_off", "shapes_off", "two_objects"):
        assert getattr(kept.floor, name).value == pytest.approx(getattr(floor, name).value, abs=1e-6)


def test_tables_and_plots_of_the_kept_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots = report.can_plot()
    cli.main(["tables", "--out", str(tmp_path), *([] if plots else ["--no-plots"])])
    endings = (".md", ".png") if plots else (".md",)
    written = [tmp_path / f"{path.stem}{ending}" for path in KEPT for ending in endings]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]
    assert all(path.stat().st_size > 1000 for path in written)
    table = (tmp_path / "chosen.md").read_text(encoding="utf-8")
    assert "| unconditional | SAG | 155.82 ± 20.33 | -22 % (-28 to -16) | 69.0 ± 2.4 % |" in table
    assert "| captioned | SAG+PAG 0.5 | -3 % (-36 to +46) | +29 % (+16 to +43) |" in table
    assert "2000 samples a line, in 40 groups of seeds, 10 to 49" in table
    assert "distance of 9.04 ± 3.1, and of 16 ± 6 after the autoencoder" in table


@pytest.mark.parametrize("change", [("label", "labels"), ("chosen,unconditional,SAG,", "chosen,unconditional,SAD,")])
def test_files_of_something_else_are_refused(
    change: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (cli.KEPT / "chosen.csv").read_text(encoding="utf-8")
    (tmp_path / "other.csv").write_text(text.replace(*change, 1), encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["tables", "--data", str(tmp_path), "--no-plots"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'other.csv'} holds no results of this version's sweeps" in line


def test_intervals_on_the_pages_are_the_kept_ones() -> None:
    kept = [result for path in KEPT for result in read_csv(path).results]
    changes = [change for result in kept for change in (result.change, *result.against.values()) if change]
    pages = (REPOSITORY / "README.md", REPOSITORY / "docs" / "demo-evaluation.md")
    text = " ".join(word for page in pages for word in page.read_text(encoding="utf-8").split())
    shown = re.findall(r"([+-]\d+) % \(([+-]\d+) to ([+-]\d+)\)", text)
    assert len(shown) > 20
    for texts in shown:
        rounded = pytest.approx([int(number) / 100 for number in texts], abs=0.00505)
        assert any([change.value, change.low, change.high] == rounded for change in changes), texts
