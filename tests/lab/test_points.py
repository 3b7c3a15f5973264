"""What is measured: the default set and the sweeps."""

from __future__ import annotations

import pytest

from lab import points
from lab.points import Point, default_points, sweep_points


@pytest.mark.parametrize("sweep", [sweep for sweep in points.SWEEPS if "mix" not in sweep])
def test_sweeps_start_from_their_baseline(sweep: str) -> None:
    wanted = sweep_points(sweep)
    for mode in ("unconditional", "captioned, CFG 3"):
        chosen = [point for point in wanted if point.mode == mode]
        assert not chosen[0].recipe.settings.enabled
        assert all(point.recipe.settings.enabled or point.recipe.begin for point in chosen[1:])
        assert all(point.baseline.recipe == chosen[0].recipe for point in chosen)
        assert len({point.label for point in chosen}) == len(chosen) >= 3


def test_the_map_of_mixes_is_against_cfg_alone_at_its_best() -> None:
    first, *others = sweep_points("mix")
    assert (first.label, first.recipe.cfg, first.recipe.settings.enabled) == ("CFG alone, CFG 2", 2.0, False)
    assert all(point.baseline == first and point.captioned for point in others)
    assert len({point.label for point in others}) == len(others)
    mixes = [point for point in others if point.recipe.settings.enabled]
    assert {point.recipe.cfg for point in mixes} == {1.0, 1.5, 2.0, 3.0}
    alone = {point.recipe.cfg: point for point in (first, *others) if point not in mixes}
    assert all(point.parts == {"cfg": alone[point.recipe.cfg]} for point in mixes)
    assert not any(point.parts for point in alone.values())


def test_the_best_mixes_are_of_the_map() -> None:
    best = sweep_points("best-mix")
    assert {point.label for point in best} <= {point.label for point in sweep_points("mix")}
    assert len(best) == 3
    assert all(point.baseline == best[0] for point in best)


@pytest.mark.parametrize("sweep", points.SWEEPS)
def test_sweeps_have_modes_of_their_own(sweep: str) -> None:
    """What is asked of every mode is measured in every one."""
    wanted = points.MODES if sweep in ("chosen", "pag-input-start") else ("unconditional", "captioned, CFG 3")
    wanted = ("captioned",) if sweep in ("mix", "best-mix") else wanted
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


def test_axes_of_sweeps_are_titled() -> None:
    assert points.axis_title("pag-input-start") == "PAG start (PAG blocks input.1, PAG scale 3)"
