"""The grid's command line: pictures are written, wrong arguments get one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from sag_pag.demo import cli, grid
from sag_pag.demo.model import load
from sag_pag.demo.sampling import Recipe, sample
from sag_pag.settings import Settings


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
        (["--weights", "nothing"], "there are no weights"),
        (["--bogus"], "unrecognized arguments: --bogus"),
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
    assert "'full' or 'partial' or 'snf'. " in " ".join(done.stdout.split()), "what may be chosen"
    assert "page" in done.stdout
