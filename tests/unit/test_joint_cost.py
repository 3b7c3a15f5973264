"""SD3's cost that is worked out from shapes, against operations counted in a run on tensors without data."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdit import MMDiT, Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sag_pag.engine.calls import APART, JOINED, Manner
from sag_pag.engine.cost import Pass, cost_of, picture_cost
from sag_pag.engine.joint import TEXT_TOKENS
from sag_pag.engine.joint_cost import JointCost
from sag_pag.engine.plan import plan_at
from sag_pag.engine.rows import StepRows
from sag_pag.engine.spaces import SigmaSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import topology_of
from sag_pag.settings import Settings
from sag_pag.webui.blockmap import block_map

MEDIUM = Shape(depth=24, head=64, context=4096, pooled=2048, grid=192, sinusoids=256)
SMALL = Shape(depth=6, head=8)
BLOCKS = ["joint.1", "joint.7", "joint.13", "joint.19"]
REPOSITORY = Path(__file__).parents[2]


def counted(shape: Shape, latent: tuple[int, int], blocks: str | None, *, manner: Manner = JOINED) -> int:
    """Operations of a step of one picture with CFG, guided at ``blocks`` if there are any."""
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = MMDiT(shape)
        x, sigma = torch.randn(2, shape.latents, *latent), torch.rand(2)
        cond = {"crossattn": torch.randn(2, TEXT_TOKENS, shape.context), "vector": torch.randn(2, shape.pooled)}

        def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
            out: Tensor = model(x, 1000 * sigma, y=cond["vector"], context=cond["crossattn"])
            return out

        with FlopCounterMode(display=False) as counter:
            if blocks is None:
                denoise(x, sigma, cond=cond)
            else:
                topology, rows = topology_of(model), StepRows.plain(1)
                plan = plan_at(Settings(pag_enabled=True, pag_blocks=blocks), topology, progress=0.5)
                assert plan is not None
                step = GuidedStep(plan, topology=topology, rows=rows, space=SigmaSpace(), manner=manner)
                step(denoise, x, sigma, cond=cond, rows=rows.rows)
        return int(counter.get_total_flops())


@functools.cache
def cost(shape: Shape, latent: tuple[int, int]) -> JointCost:
    with torch.device("meta"):
        made = cost_of(topology_of(MMDiT(shape)), latent)
    assert isinstance(made, JointCost)
    return made


@functools.cache
def ratio(blocks: str) -> float:
    """Of SD3-medium at 1024 x 1024."""
    return counted(MEDIUM, (128, 128), blocks) / counted(MEDIUM, (128, 128), None)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_sd3_medium(blocks: str) -> None:
    """1 + (depth - k) / (2 depth), less what the map saves in one block."""
    block, made = int(blocks.split(".")[1]), cost(MEDIUM, (128, 128))
    assert made.perturbing_alone(made.topology.resolve(blocks)) == pytest.approx(ratio(blocks), abs=1e-12)
    assert 0 < 1 + (24 - block) / 48 - ratio(blocks) < 0.01


def test_the_documented_costs_are_the_counted_ones() -> None:
    text = (REPOSITORY / "docs" / "benchmark.md").read_text(encoding="utf-8")
    for blocks in BLOCKS:
        assert f"| PAG in `{blocks}` | {ratio(blocks):.3f} |" in text
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"`joint.13` of 24, {ratio('joint.13'):.2f}×" in readme


@pytest.mark.parametrize("latent", [(16, 24), (30, 18)], ids=str)
@pytest.mark.parametrize("blocks", ["joint.0", "joint.2", "joint.5", "joint.1, joint.3", "joint.2-5"])
def test_a_step_costs_what_is_counted(blocks: str, latent: tuple[int, int]) -> None:
    made = cost(SMALL, latent)
    assert 2 * made.row == counted(SMALL, latent, None)
    expected = counted(SMALL, latent, blocks) / counted(SMALL, latent, None)
    plan = plan_at(Settings(pag_enabled=True, pag_blocks=blocks), made.topology, progress=0.5)
    assert made.step(plan, rows=2) == pytest.approx(expected, abs=1e-12)


def test_an_own_call_costs_the_same_but_for_the_embedders() -> None:
    joined, apart = (counted(SMALL, (16, 24), "joint.3", manner=manner) for manner in (JOINED, APART))
    assert joined == apart


def test_a_picture_without_sag() -> None:
    """SAG does nothing here, so it costs nothing."""
    passes = [Pass(cost(SMALL, (16, 16)), 10)]
    assert picture_cost(Settings(sag_enabled=True), passes).picture == 1
    pag, both = Settings(pag_enabled=True), Settings(pag_enabled=True, sag_enabled=True)
    assert picture_cost(both, passes) == picture_cost(pag, passes)
    assert picture_cost(pag, passes).picture > 1.2


def test_the_map_fits_a_narrow_window() -> None:
    """Lines of twelve blocks, no two in one place."""
    drawn = block_map(cost(MEDIUM, (128, 128)), "joint.13", many=True)
    places = re.findall(r"--narrow-column: (\d+); --narrow-level: (\d+)", drawn)
    assert len(places) == len(set(places)) == 24
    assert {int(column) for column, _ in places} == set(range(2, 14))
    assert "--narrow-columns: 12" in drawn
