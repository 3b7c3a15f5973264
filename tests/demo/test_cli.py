"""The command line: pictures and results are written, wrong arguments get one line."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from sag_pag.demo import classifier, cli, data, evaluate, grid, points, report
from sag_pag.demo.captions import SHAPES
from sag_pag.demo.evaluate import Evaluation, Size
from sag_pag.demo.metrics import Moments, frechet_distance
from sag_pag.demo.model import DemoModel, load
from sag_pag.demo.points import Point, default_points, sweep_points
from sag_pag.demo.sampling import Recipe, sample
from sag_pag.demo.unet import redraw_
from sag_pag.settings import Settings


@pytest.fixture(autouse=True)
def _same_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_grid_is_written_and_costs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    cli.main(["--seeds", "1-2", "--steps", "2", "--output", str(out), "--pag-scale", "2", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(str(out))
    assert lines[0].endswith(" s)")
    assert len(lines) == 1 + 8
    counted = [float(line.rsplit(" ", 1)[1].rstrip("x)")) for line in lines[1:]]
    assert counted[0] == counted[4] == 1
    assert counted[1] == pytest.approx(2, abs=0.06)
    assert counted[5] == pytest.approx(1.5, abs=0.04)
    assert 1.3 < counted[2] < 1.95
    assert 1.2 < counted[6] < 1.45
    image = Image.open(out)
    assert image.size[0] > 2 * 128
    assert image.size[1] > 8 * 128


def test_grid_with_one_prompt_for_all_and_no_cfg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--seeds", "3", "--steps", "1", "--cfg", "1", "--prompt", "ring", "--output", str(tmp_path / "x.jpg")])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


@pytest.mark.parametrize(
    ("sampler", "values"), [("euler", {}), ("heun", {}), ("dpm++2m", {"pag_end": 0.6}), ("euler", {"sag_start": 0.3})]
)
def test_counted_cost_is_that_of_all_steps(sampler: str, values: dict[str, object]) -> None:
    model = load()
    settings = Settings.from_dict({"sag_enabled": True, "pag_enabled": True, **values})
    recipe = Recipe(settings, cfg=3.0, steps=5, sampler=sampler)
    with FlopCounterMode(display=False) as counter:
        sample(model, ["ring"], seeds=[0], recipe=recipe)
    counted = grid.gigaflops_a_step(model, "ring", recipe=recipe)
    assert counted == pytest.approx(counter.get_total_flops() / 1e9 / 5, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "red dog"], "unknown word 'dog'"),
        (["--pag-scale", "99"], "pag_scale: '99' can't be used; allowed: a number from 0 to 20"),
        (["--pag-blocks", "input.9"], "allowed: input.1, middle, output.0, output.1"),
        (["--sag-block", "middle, output.0"], "one block"),
        (["--pag-start", "0.8", "--pag-end", "0.2"], "pag_start"),
        (["--steps", "0"], "'0' is no whole number from 1 to 1000"),
        (["--seeds", "5-1"], "0 seeds"),
        (["--seeds", "one"], "'one' are no seeds"),
        (["--cfg", "nan"], "'nan' is no CFG scale"),
        (["--output", "picture.txt"], "'picture.txt' is no picture's name"),
        (["--output", "/no/such/folder/x.png"], "there is no folder"),
        (["--output", "/"], "can't write to /"),
        (["--prompt", "ring", "--prompt", "moon", "--seeds", "1"], "2 prompts for 1 seeds"),
        (["--prompt", "red star and"], "ends in 'and'"),
        (["--weights", __file__], "holds other weights, or none"),
        (["gird"], "unknown command 'gird'; known are grid, page"),
        (["train", "--device", "mps"], "'mps' is no device; use cpu, cuda or cuda:1"),
        (["train", "--learning-rate", "nan"], "learning_rate: nan can't be used"),
        (["train", "--out", __file__], "File exists"),
        (["train-classifier", "--out", "/"], "can't write to /"),
        (["evaluate", "--groups", "2", "--group-size", "3"], "more than 3 samples must be left"),
        (["evaluate", "--all", "--sweep", "range"], "not allowed with"),
        (["evaluate", "--part", "1/2", "--docs", "page.md"], "a part has no results"),
        (["evaluate", "--classifier", "nothing"], "there are no weights at nothing"),
        (["--weights", "nothing"], "there are no weights"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["train", "--steps", "0"], "steps: 0 can't be used; allowed: a whole number from 1 on"),
        (["evaluate", "--group-size", "1"], "'1' is no whole number from 2 to 1000"),
        (["evaluate", "--sweep", "magic"], "invalid choice: 'magic'"),
        (["evaluate", "--part", "3/2"], "'3/2' is no part"),
        (["evaluate", "--docs", "/no/such/page.md"], "has no marks"),
        (["page", "--port", "70000"], "'70000' is no whole number from 0 to 65535"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "sag_pag.demo", "--help"], capture_output=True, text=True, check=True)
    assert "--pag-blocks" in done.stdout
    assert "evaluate" in done.stdout


def test_training_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = "--steps 1 --batch 2 --autoencoder-steps 2 --held-out 8 --threads 1 --device cpu"
    cli.main(["train", "--out", str(tmp_path / "run"), *few.split()])
    assert Path(capsys.readouterr().out.strip()).name == "weights.safetensors"
    monkeypatch.setattr(classifier, "HELD_OUT", 50)
    judge = tmp_path / "judge.safetensors"
    cli.main(["train-classifier", "--out", str(judge), "--steps", "1", "--threads", "1"])
    assert "accuracy by slot" in capsys.readouterr().out
    assert judge.is_file()


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    monkeypatch.setattr(evaluate, "REFERENCE", 200)
    size = Size(groups=2, group=4, batch=3)
    return Evaluation(load(), classifier.load_classifier(), out=tmp_path / "samples", size=size)


def points_of_two_steps() -> list[Point]:
    return [point for point in default_points(steps=2) if point.mode != "captioned"]


def test_evaluation_is_resumed_group_by_group(judge: Evaluation) -> None:
    wanted = points_of_two_steps()
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


def test_samples_of_other_weights_are_not_taken(judge: Evaluation, tmp_path: Path) -> None:
    other = redraw_(DemoModel(), seed=1)
    assert isinstance(other, DemoModel)
    model, classifier_too = (
        Evaluation(*models, out=tmp_path / "samples", size=judge.size)
        for models in ((other, judge.classifier), (judge.model, classifier.Classifier()))
    )
    point = points_of_two_steps()[0]
    paths = {evaluation.path(point, 0) for evaluation in (judge, model, classifier_too)}
    assert len({*paths, judge.path(points_of_two_steps()[1], 0)}) == 4


def test_other_groups_are_other_seeds(judge: Evaluation) -> None:
    later = Evaluation(judge.model, judge.classifier, out=judge.out, size=replace(judge.size, first=1))
    point = points_of_two_steps()[0]
    judge.make_all([point])
    assert [group for _, group in later.missing([point])] == [2]
    later.make_all([point])
    first, second = (load_file(judge.path(point, group))["features"] for group in (1, 2))
    assert not torch.equal(first, second)
    assert later.result(point).frechet != judge.result(point).frechet


def test_samples_are_shared_by_what_makes_the_same_pictures(judge: Evaluation) -> None:
    """What is switched off has no part in a recipe's name."""
    points = points_of_two_steps()
    none, sag, pag, both = points[:4]
    scale = next(point for point in sweep_points("sag-scale", steps=2) if point.label == "0.75")
    assert judge.path(scale, 0) == judge.path(sag, 0) == judge.path(both.alone("sag"), 0)
    assert judge.path(pag, 0) == judge.path(both.alone("pag"), 0) != judge.path(both, 0)
    assert judge.path(sag.baseline, 0) == judge.path(none, 0)


def test_results_are_written(judge: Evaluation, tmp_path: Path) -> None:
    wanted = points_of_two_steps()
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


def test_plots_name_what_they_show(judge: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes may have other ways of guiding than each other, and each is drawn where its change is."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    wanted = [point for point in points_of_two_steps() if not (point.captioned and "SAG" in point.label)]
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
    judge: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    wanted = points_of_two_steps()
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
    judge: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    wanted = [point for point in points_of_two_steps() if not point.captioned]
    judge.make_all(wanted)
    report.plot_sweep([judge.result(point) for point in wanted], tmp_path / "plot.png", floor=1.0)
    (panel,) = pyplot.gcf().axes
    assert panel.get_xlabel() == "relative Fréchet distance\n(95 % intervals)"
    assert panel.get_ylabel() == ""


def test_axes_of_sweeps_are_titled() -> None:
    assert points.axis_title("pag-input-start") == "PAG start (PAG blocks input.1, PAG scale 3)"


def test_docs_get_the_tables_between_their_marks(judge: Evaluation, tmp_path: Path) -> None:
    wanted = points_of_two_steps()
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
    floor = judge.floor()
    noise = Moments.of(judge.classifier.embed(torch.rand(200, 3, 64, 64)))
    assert floor.frechet.value < floor.decoded.value < 0.1 * frechet_distance(judge.reference, noise)
    assert floor.precision.value > 0.5
    assert floor.recall.value > 0.5
    assert floor.two_objects.value == pytest.approx(data.TWO_OBJECTS, abs=0.1)
    assert floor.sizes_off.value < 0.1
    assert floor.shapes_off.value < 0.2


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


@pytest.mark.parametrize("sweep", points.SWEEPS)
def test_sweeps_start_from_their_baseline(sweep: str) -> None:
    wanted = sweep_points(sweep)
    for mode in ("unconditional", "captioned, CFG 3"):
        chosen = [point for point in wanted if point.mode == mode]
        assert not chosen[0].recipe.settings.enabled
        assert all(point.recipe.settings.enabled or point.recipe.begin for point in chosen[1:])
        assert all(point.baseline.recipe == chosen[0].recipe for point in chosen)
        assert len({point.label for point in chosen}) == len(chosen) >= 3


@pytest.mark.parametrize("sweep", points.SWEEPS)
def test_sweeps_have_modes_of_their_own(sweep: str) -> None:
    """What is asked of every mode is measured in every one."""
    wanted = points.MODES if sweep in ("chosen", "pag-input-start") else ("unconditional", "captioned, CFG 3")
    assert tuple(dict.fromkeys(point.mode for point in sweep_points(sweep))) == wanted


def key_of(point: Point) -> str:
    return point.key(judged="weights", group_size=50, bf16=True)


def test_what_the_grid_shows_is_measured_on_fresh_seeds_in_every_mode() -> None:
    shown = [point for point in default_points() if point.label != f"PAG {points.PANEL_PAG_SCALE:g}"]
    fresh = sweep_points("chosen")
    assert len(shown) == 4 * len(points.MODES)
    assert {(point.mode, point.label, key_of(point)) for point in shown} <= {
        (point.mode, point.label, key_of(point)) for point in fresh
    }


def test_going_on_from_drawn_pictures_is_compared_with_beginning_from_noise() -> None:
    baseline, *others = sweep_points("begin", modes=["unconditional"])
    assert baseline.label == "from noise alone"
    assert [f"from noise level {point.x:.1f}" for point in others] == [point.label for point in others]
    assert [point.x for point in others] == sorted((point.x for point in others), reverse=True)


def test_unknown_sweep() -> None:
    with pytest.raises(ValueError, match="unknown sweep 'x'; known are pag-scale"):
        sweep_points("x")


def test_sweeps_in_a_chosen_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the three; the default set has them all."""
    made: list[Point] = []
    monkeypatch.setattr(Evaluation, "make_all", lambda self, points, **_: made.extend(points))
    command = ["evaluate", "--sweep", "default", "--sweep", "pag-scale", "--part", "1/2", "--out", str(tmp_path)]
    cli.main([*command, "--no-plots", "--mode", "captioned"])
    assert {point.mode for point in made if point.sweep == "pag-scale"} == {"captioned"}
    assert {point.mode for point in made if point.sweep == "default"} == set(points.MODES)


def test_all_leaves_out_what_is_for_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Point] = []
    monkeypatch.setattr(Evaluation, "make_all", lambda self, points, **_: made.extend(points))
    cli.main(["evaluate", "--all", "--part", "1/2", "--out", str(tmp_path), "--no-plots"])
    assert {point.sweep for point in made} == {"default", *points.SWEEPS} - {"chosen"}
