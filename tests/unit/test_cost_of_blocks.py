"""The cost that is worked out from shapes, against operations counted in a run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lab.benchmark.steps import Method, step_config, step_flops
from sag_pag.demo.unet import UNetModel
from sag_pag.engine.cost import Pass, UNetCost, picture_cost
from sag_pag.engine.plan import plan_at
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "PAG": {"pag_enabled": True},
    "SEG, mean": {"pag_enabled": True, "pag_perturbation": "blurred queries"},
    "SEG": {"pag_enabled": True, "pag_perturbation": "blurred queries", "pag_query_blur": 3.0},
    "SSG": {"pag_enabled": True, "pag_perturbation": "swapped tokens"},
    "PAG early": {"pag_enabled": True, "pag_blocks": "input.7"},
    "PAG late": {"pag_enabled": True, "pag_blocks": "output.5"},
    "PAG in many": {"pag_enabled": True, "pag_blocks": "input.8, middle, output.0, output.3"},
    "SAG": {"sag_enabled": True},
    "SAG elsewhere": {"sag_enabled": True, "sag_block": "output.4"},
    "both": {"sag_enabled": True, "pag_enabled": True},
    "both in one place": {"sag_enabled": True, "pag_enabled": True, "sag_block": "input.5", "pag_blocks": "input.5"},
}


@functools.cache
def counted(layout: str, latent: int) -> dict[str, int]:
    config, _ = step_config(layout, small=True)
    methods = {name: Method(Settings(**values)) for name, values in valid(layout).items()}
    return step_flops(config, methods, latent=latent)


def valid(layout: str) -> dict[str, dict[str, Any]]:
    """Output 5 is SDXL's last with attention, output 3 of SD its first."""
    if layout != "sdxl":
        return CASES
    return {name: {**values, **({"pag_blocks": "middle.2-4, output.0.3"} if name == "PAG in many" else {})}
            for name, values in CASES.items()}


@functools.cache
def cost_of(layout: str, latent: int) -> UNetCost:
    config, _ = step_config(layout, small=True)
    with torch.device("meta"):
        return UNetCost(UNetTopology(UNetModel(**config)), (latent, latent))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("layout", "latent"), [("sd1", 32), ("sd2", 24), ("sdxl", 16)])
def test_a_step_costs_what_is_counted(layout: str, latent: int, case: str) -> None:
    cost, counts = cost_of(layout, latent), counted(layout, latent)
    plan = plan_at(Settings(**valid(layout)[case]), cost.topology, progress=0.5)
    assert 2 * cost.row == counts["nothing"]
    blur = 2 * 2 * 9 * 4 * latent**2 if "sag_enabled" in CASES[case] else 0  # of nine taps, in two directions
    assert cost.step(plan, rows=2) == pytest.approx((counts[case] - blur) / counts["nothing"], abs=1e-12)
    assert (case == "nothing") == (plan is None)


def test_sizes_that_do_not_halve_evenly() -> None:
    config, _ = step_config("sd1", small=True)
    with torch.device("meta"):
        cost = UNetCost(UNetTopology(UNetModel(**config)), (9, 14))
    sizes = {site.block_name: size for site, size in cost.map_sizes.items()}
    assert (sizes["input.1"], sizes["input.4"], sizes["middle"], sizes["output.3"], sizes["output.11"]) == (
        (9, 14), (5, 7), (2, 2), (3, 4), (9, 14),
    )


def test_a_picture_costs_the_mean_of_its_steps() -> None:
    cost = cost_of("sd1", 32)
    passes = [Pass(cost, 20)]
    everywhere = picture_cost(Settings(pag_enabled=True), passes)
    step = cost.step(plan_at(Settings(pag_enabled=True), cost.topology, progress=0), rows=2)
    assert everywhere.step == step == pytest.approx(everywhere.picture)
    half = picture_cost(Settings(pag_enabled=True, pag_end=0.5), passes)
    assert half.step == everywhere.step
    assert half.picture - 1 == pytest.approx((half.step - 1) / 2)
    nothing = picture_cost(Settings(), passes)
    assert nothing.step == nothing.picture == 1
    alone = picture_cost(Settings(pag_enabled=True), [Pass(cost, 1, rows=1)])
    assert alone.picture - 1 == pytest.approx(2 * (everywhere.picture - 1))


@pytest.mark.parametrize("which", ["both passes", "first pass", "hires pass"])
def test_two_passes_cost_what_is_counted(which: str) -> None:
    """Ten steps at the first size, four at twice its side: operations counted with PAG, over those without."""
    passes = [Pass(cost_of("sd1", 16), 10, hires="first pass"), Pass(cost_of("sd1", 32), 4, 0.3, "hires pass")]
    counts = [(10, counted("sd1", 16), "first pass"), (4, counted("sd1", 32), "hires pass")]
    guided = sum(n * count["PAG" if which in ("both passes", name) else "nothing"] for n, count, name in counts)
    found = picture_cost(Settings(pag_enabled=True, hires_pass=which), passes)
    assert found.picture == pytest.approx(guided / sum(n * count["nothing"] for n, count, _ in counts), abs=1e-12)
    own = {"pag_enabled": True, "hires_own_scales": True, "hires_pag_scale": 0}
    assert (picture_cost(Settings(**own), passes) == found) == (which == "first pass")


def test_each_pass_has_rows_of_its_own() -> None:
    """Ten steps with CFG, ten without: the second pass is half as dear without guidance, and no less dear with it."""
    cost = cost_of("sd1", 16)
    extra = cost.perturbed_row(cost.topology.resolve("middle"), Settings())
    passes = [Pass(cost, 10, hires="first pass"), Pass(cost, 10, 0.3, "hires pass", rows=1)]
    found = picture_cost(Settings(pag_enabled=True), passes)
    assert found.step == pytest.approx(1 + extra / cost.row)
    assert found.picture == pytest.approx(1 + 20 * extra / (30 * cost.row))
