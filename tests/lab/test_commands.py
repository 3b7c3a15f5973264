"""The lab's command line: every command is listed, wrong arguments get one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lab import card, classifier, cli, points, readme
from lab.evaluate import Evaluation
from lab.points import Point


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["grid"], "invalid choice: 'grid'"),
        (["train", "--device", "mps"], "'mps' is no device; use cpu, cuda or cuda:1"),
        (["train", "--learning-rate", "nan"], "learning_rate: nan can't be used"),
        (["train", "--out", __file__], "File exists"),
        (["train-classifier", "--out", "/"], "can't write to /"),
        (["evaluate", "--groups", "2", "--group-size", "3"], "more than 3 samples must be left"),
        (["evaluate", "--all", "--sweep", "range"], "not allowed with"),
        (["evaluate", "--classifier", "nothing"], "there are no weights at nothing"),
        (["train", "--steps", "0"], "steps: 0 can't be used; allowed: a whole number from 1 on"),
        (["evaluate", "--group-size", "1"], "'1' is no whole number from 2 to 1000"),
        (["evaluate", "--sweep", "magic"], "invalid choice: 'magic'"),
        (["evaluate", "--part", "3/2"], "'3/2' is no part"),
        (["tables", "--data", "/no/such/folder"], "there are no CSV files in /no/such/folder"),
        (["degraded", "--output", "/no/such/folder/x.png"], "there is no folder"),
        (["benchmark", "--steps", "0"], "'0' is no whole number from 1"),
        (["card", "--bogus"], "unrecognized arguments: --bogus"),
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
    done = subprocess.run([sys.executable, "-m", "lab", "--help"], capture_output=True, text=True, check=True)
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


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


def test_what_guidance_leads_away_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["degraded", "--output", str(tmp_path / "x.png"), "--threads", "1"])
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "x.png"
    assert Image.open(tmp_path / "x.png").size == (150 + 8 * 134, 5 * 134)


@pytest.mark.parametrize(("command", "module", "name"), [("card", card, "CARD"), ("readme", readme, "PAGE")])
def test_tables_of_the_pages_are_written_anew(
    command: str, module: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is up to date, so a page whose table was lost becomes the page that is there."""
    page = tmp_path / "page.md"
    kept = getattr(module, name).read_text(encoding="utf-8")
    before, rest = kept.split(module.BEGIN)
    after = rest.split(module.END)[1]
    page.write_text(f"{before}{module.BEGIN}\nlost\n{module.END}{after}", encoding="utf-8")
    monkeypatch.setattr(module, name, page)
    cli.main([command])
    assert page.read_text(encoding="utf-8") == kept
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="has no marks <!-- "):
        module.write_table()


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
    assert {point.sweep for point in made} == {"default", *points.SWEEPS} - {"best-mix", "chosen"}
