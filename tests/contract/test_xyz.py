"""The axes of the X/Y/Z plot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from double import SCRIPT_FILES, TITLE, Host
from torch import Tensor

from sag_pag.settings import PARAMETERS

CELLS: dict[str, tuple[str, Any]] = {  # for each parameter a cell as typed, and its value
    "sag_enabled": ("True", True), "sag_scale": ("1.5", 1.5), "sag_threshold": ("0.9", 0.9),
    "sag_blur_sigma": ("2", 2.0), "sag_block": ("output.0", "output.0"), "sag_start": ("0.1", 0.1),
    "sag_end": ("0.6", 0.6), "pag_enabled": ("True", True), "pag_scale": ("5", 5.0),
    "pag_blocks": ("input.3, d1", "input.3, d1"), "pag_start": ("0.2", 0.2), "pag_end": ("0.7", 0.7),
    "pag_fade": ("True", True), "rescale": ("0.5", 0.5), "rescale_mode": ("partial", "partial"),
    "hires_pass": ("first pass", "first pass"), "hires_own_scales": ("True", True), "hires_sag_scale": ("2", 2.0),
    "hires_pag_scale": ("1", 1.0), "sag_show": ("True", True),
    "pag_perturbation": ("swapped tokens", "swapped tokens"), "pag_query_blur": ("2", 2.0), "pag_swap": ("0.3", 0.3),
    "pag_every": ("2", 2), "sag_every": ("3", 3),
}
BASE = {"sag_scale": 1, "pag_scale": 3, "rescale": 0.3}


@contextmanager
def refused(field: str) -> Iterator[pytest.ExceptionInfo[ValueError]]:
    """Refused for this field: by its label on the page, by its name for programs."""
    with pytest.raises(ValueError, match=re.escape(PARAMETERS[field].label)) as raised:
        yield raised
    assert raised.value.detail.startswith(f"{field}: ")  # type: ignore[attr-defined]


def plot(host: Host, p: Any, axes: dict[str, list[str]]) -> list[Tensor | None]:
    """The cells' latents; ``None`` for one that failed."""
    results = host.txt2img.find("X/Y/Z plot").run(p, axes)
    return [result.latents[0] if result.latents else None for result in results]


def label(host: Host, name: str) -> str:
    """The label of a parameter's axis."""
    parameter = PARAMETERS[name]
    group = {"sag": "[SAG]", "pag": "[PAG]", "both": "[SAG/PAG]"}[parameter.feature]
    same_name = {"sag_scale": "Scale", "pag_scale": "Scale"}
    text = "Enable" if name.endswith("_enabled") else same_name.get(name, parameter.label)
    text = {"start": "Start", "end": "End", "every": "Every n-th step"}.get(name[4:], text)
    assert f"{group} {text}" in labels(host)
    return f"{group} {text}"


def labels(host: Host) -> list[str]:
    data = next(d for d in host.scripts.scripts_data if d.path == str(SCRIPT_FILES[0]))
    return [option.label for option in data.module.axis_options]


def test_one_axis_for_every_parameter_however_often_the_ui_is_made(host: Host) -> None:
    ours = [text for text in labels(host) if text.startswith(("[SAG]", "[PAG]", "[SAG/PAG]"))]
    assert len(set(ours)) == len(ours) == len(PARAMETERS)
    for _ in range(2):
        host.script_callbacks.run("before_ui")
    assert [text for text in labels(host) if text in ours] == ours
    host.scripts.load_scripts(*SCRIPT_FILES)
    host.script_callbacks.run("before_ui")
    assert [text for text in labels(host) if text in ours] == ours
    assert "Nothing" in labels(host)


def test_axes_without_a_user_interface(host: Host) -> None:
    """An API server alone makes the scripts' controls before it tells anybody that a UI is coming."""
    host.scripts.load_scripts(*SCRIPT_FILES)
    runner = host.scripts.ScriptRunner()
    runner = host.scripts.ScriptRunner()  # default values are read from controls made once more
    host.script_callbacks.run("before_ui")
    script = runner.find("X/Y/Z plot")
    assert label(host, "pag_scale") in [option.label for option in script.current_axis_options]


@pytest.mark.parametrize(("name", "arguments"), [*((name, tuple) for name in CELLS), ("pag_scale", list)])
def test_every_axis(host: Host, name: str, arguments: Any) -> None:
    """A cell is the picture that the same settings make without the plot; the shared arguments stay as they are."""
    text, value = CELLS[name]
    fields = {"enable_hr": name.startswith("hires"), "steps": 2}
    p = host.processing_for(BASE, **fields)
    p.script_args = arguments(p.script_args)
    before = arguments(p.script_args)
    cells = plot(host, p, {label(host, name): [text] * (2 if arguments is list else 1)})
    assert p.script_args == before
    assert type(p.script_args) is arguments
    expected = host.generate({**BASE, name: value}, **fields)[0]
    for cell in cells:
        assert cell is not None
        assert torch.equal(cell, expected)


@pytest.mark.parametrize("name", [n for n in CELLS if n.startswith(("sag_", "pag_"))])
def test_an_axis_switches_its_feature_on(host: Host, name: str) -> None:
    text, value = CELLS[name]
    cell, = plot(host, host.processing_for({}, steps=2), {label(host, name): [text]})
    assert cell is not None
    assert torch.equal(cell, host.generate({name: value}, steps=2)[0])
    assert not torch.equal(cell, host.plain(steps=2)[0])


@pytest.mark.parametrize("feature", ["sag", "pag"])
def test_an_axis_of_the_hires_scales_has_an_effect(host: Host, feature: str) -> None:
    """To plot the scale of the hires pass is to want another one there."""
    p = host.processing_for({f"{feature}_scale": 1}, enable_hr=True, steps=2)
    first, second = plot(host, p, {label(host, f"hires_{feature}_scale"): ["0", "4"]})
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


@pytest.mark.parametrize("order", [1, -1], ids=["enable first", "enable last"])
def test_enable_and_another_axis(host: Host, order: int) -> None:
    """A cell that says "Enable: False" is plain, in whichever order the axes are."""
    axes = {label(host, "pag_enabled"): ["False", "True"], label(host, "pag_scale"): ["1", "4"]}
    cells = plot(host, host.processing_for({}), dict(list(axes.items())[::order]))
    off = cells[:2] if order == 1 else cells[::2]
    for cell in off:
        assert cell is not None
        assert torch.equal(cell, host.plain()[0])


def test_disabling(host: Host) -> None:
    off, on = plot(host, host.processing_for({"pag_scale": 3}), {label(host, "pag_enabled"): ["False", "true"]})
    assert off is not None
    assert on is not None
    assert torch.equal(off, host.plain()[0])
    assert torch.equal(on, host.generate({"pag_scale": 3})[0])


def test_with_an_axis_of_the_host(host: Host) -> None:
    axes = {"Seed": ["1", "2"], label(host, "pag_scale"): ["0", "3"]}
    cells = plot(host, host.processing_for({}), axes)
    expected = [host.generate({"pag_scale": scale}, seed=seed)[0] for seed in (1, 2) for scale in (0, 3)]
    for cell, e in zip(cells, expected, strict=True):
        assert cell is not None
        assert torch.equal(cell, e)


def test_dict_arguments_with_what_follows(host: Host) -> None:
    """The API fills the rest of the script's arguments with defaults."""
    p = host.processing_for({"sag_scale": 1, "pag_blocks": "input.3"})
    cell, = plot(host, p, {label(host, "pag_scale"): ["2"]})
    assert cell is not None
    assert torch.equal(cell, host.generate({"sag_scale": 1, "pag_blocks": "input.3", "pag_scale": 2})[0])


def test_other_scripts_arguments_stay_in_place(host: Host) -> None:
    p = host.processing_for({})
    p.script_args = (*p.script_args, "theirs")
    seen: list[Any] = []
    p.callback = lambda step: None
    original = host.processing.process_images

    def watching(pc: Any) -> Any:
        seen.append(pc.script_args)
        return original(pc)

    host.processing.process_images = watching
    plot(host, p, {label(host, "pag_scale"): ["2"]})
    assert len(seen[0]) == len(p.script_args)
    assert (seen[0][0], seen[0][-1]) == (p.script_args[0], "theirs")


BAD = [
    ("sag_scale", ["1", "99"]), ("sag_scale", ["-0.5"]), ("sag_threshold", ["nan"]), ("sag_end", ["inf"]),
    ("pag_blocks", ["middle", "centre"]), ("pag_blocks", ["output.7"]), ("sag_block", ["input.1, middle"]),
    ("rescale_mode", ["full", "fully"]), ("hires_pass", ["third"]), ("pag_enabled", ["yes"]), ("pag_fade", [""]),
    ("pag_blocks", [""]), ("sag_block", [""]),
]


@pytest.mark.parametrize(("name", "cells"), BAD)
def test_a_bad_value_is_refused_before_the_first_picture(host: Host, name: str, cells: list[str]) -> None:
    p = host.processing_for({"pag_scale": 1})
    before = len(host.calls)
    with refused(name) as raised:
        plot(host, p, {label(host, name): cells})
    assert raised.value.status_code == 422  # type: ignore[attr-defined]
    assert len(host.calls) == before


@pytest.mark.parametrize(("base", "name", "cells"), [
    ({"sag_end": 0.5}, "sag_start", ["0.2", "0.8"]), ({"pag_start": 0.5}, "pag_end", ["0.9", "0.1"]),
])
def test_a_range_that_ends_before_it_starts(host: Host, base: dict[str, float], name: str, cells: list[str]) -> None:
    """The host swallows what a cell raises and goes on with a black picture: too late to refuse."""
    before = len(host.calls)
    with refused(f"{name[:4]}start"):
        plot(host, host.processing_for(base), {label(host, name): cells})
    assert len(host.calls) == before


def test_both_ends_of_a_range_as_axes(host: Host) -> None:
    """What the panel says for them does not matter."""
    axes = {label(host, "pag_start"): ["0", "0.5"], label(host, "pag_end"): ["0.6", "0.9"]}
    cells = plot(host, host.processing_for({"pag_end": 0.3}), axes)
    expected = [host.generate({"pag_start": s, "pag_end": e})[0] for s in (0.0, 0.5) for e in (0.6, 0.9)]
    for cell, e in zip(cells, expected, strict=True):
        assert cell is not None
        assert torch.equal(cell, e)


def test_blocks_and_checkpoints_as_axes(host: Host) -> None:
    """The blocks may be those of a checkpoint that is not loaded yet."""
    p = host.processing_for({})
    p.checkpoints = {"sdxl": host.checkpoint("sdxl")}
    cell, = plot(host, p, {"Checkpoint name": ["sdxl"], label(host, "pag_blocks"): ["middle.1"]})
    assert cell is not None
    assert torch.equal(cell, host.generate({"pag_blocks": "middle.1"})[0])


@pytest.mark.parametrize("start", ["sag_start", "rescale"])
def test_values_of_a_range_as_the_plot_computes_them(host: Host, start: str) -> None:
    """"0.4-1 (+0.2)" gives 1.0000000000000002 for 1."""
    cells = plot(host, host.processing_for({"pag_scale": 1}), {label(host, start): ["0.4", "1.0000000000000002"]})
    assert all(cell is not None for cell in cells)


@pytest.mark.parametrize(("name", "text", "cells"), [
    ("pag_end", "0.5-1 (+0.1)", 6), ("rescale", "0.7-1 (+0.3)", 2), ("pag_end", "0.4-1 (+0.2)", 4),
    ("rescale", "0.3-0 (-0.1)", 4),
])
def test_a_range_up_to_the_last_value_that_can_be_used(host: Host, name: str, text: str, cells: int) -> None:
    """The plot goes on until it is beyond the end: 1.0999999999999999 is nothing that anybody has asked for."""
    made = plot(host, host.processing_for({"pag_scale": 1}), {label(host, name): [text]})
    assert len(made) == cells
    assert all(cell is not None for cell in made)


@pytest.mark.parametrize("cells", [["0.5-1 (+0.1)", "1.3"], ["0.5-1.1 (+0.1)"], ["1", "1.1"], ["0-2 (+0.5)"]])
def test_a_range_beyond_what_can_be_used_is_refused(host: Host, cells: list[str]) -> None:
    with refused("pag_end"):
        plot(host, host.processing_for({"pag_scale": 1}), {label(host, "pag_end"): cells})


def test_blocks_of_a_checkpoint_that_is_yet_to_be_loaded(host: Host) -> None:
    """The generation names its own checkpoint, which is loaded after the plot has confirmed its values."""
    p = host.processing_for({}, checkpoint=host.checkpoint("sdxl"))
    p.override_settings = {"sd_model_checkpoint": "sdxl"}
    cell, = plot(host, p, {label(host, "pag_blocks"): ["middle.1"]})
    assert cell is not None
    host.use("sdxl")
    assert torch.equal(cell, host.generate({"pag_blocks": "middle.1"})[0])


def test_bad_arguments_besides(host: Host) -> None:
    with refused("sag_scale"):
        plot(host, host.processing_for({"sag_scale": 99}), {label(host, "pag_scale"): ["1"]})


def test_a_plot_whose_title_is_written_otherwise(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forge Classic's."""
    script = host.txt2img.find("X/Y/Z plot")
    monkeypatch.setattr(script, "title", lambda: "X/Y/Z Plot")
    with refused("pag_end"):
        script.run(host.processing_for({"pag_scale": 1}), {label(host, "pag_end"): ["2"]})


def test_metadata_of_the_cells(host: Host) -> None:
    p = host.processing_for({})
    axes = {label(host, "pag_scale"): ["2", "3.5"], label(host, "pag_enabled"): ["True", "False"]}
    results = host.txt2img.find("X/Y/Z plot").run(p, axes)
    lines = [result.infotexts[0].splitlines()[-1] for result in results]
    assert "PAG: True, PAG scale: 2" in lines[0]
    assert "PAG" not in lines[1]
    assert "PAG: True, PAG scale: 3.5" in lines[2]
    assert host.txt2img.find(TITLE).title() == TITLE
