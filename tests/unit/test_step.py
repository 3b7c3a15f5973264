"""A guided step: what it hands to the maths, and in which order rows may come."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_pag import guidance
from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_
from sag_pag.engine.calls import APART, JOINED, REPEATED, Manner
from sag_pag.engine.plan import plan_at
from sag_pag.engine.rows import Row, StepRows
from sag_pag.engine.spaces import SigmaSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

TINY = UNetKwargs(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(2, 1), context_dim=8, num_heads=2,
)
WEIGHTS = ((1.0, 0.5), (0.7, -0.3))
"""Of two images' sub-prompts."""
CONDS = [Row("cond", image, number, weight) for image, own in enumerate(WEIGHTS) for number, weight in enumerate(own)]
UNCONDS = [Row("uncond", image) for image in range(2)]
ROWS = StepRows((*CONDS, *UNCONDS))


@pytest.fixture(scope="module")
def unet() -> UNetModel:
    made: Any = redraw_(UNetModel(**TINY), seed=3, gain=1.5).double().requires_grad_(False)
    return made  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _float64_weights_compute_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda self: self)


def picture(row: Row) -> Tensor:
    return torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(row.image), dtype=torch.float64)


def prompt(row: Row) -> Tensor:
    seed = 10 + 5 * row.image + row.prompt + (100 if row.role == "uncond" else 0)
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made_step(
    unet: UNetModel, calls: Sequence[Sequence[Row]], *, manner: Manner = JOINED, **settings: Any
) -> tuple[GuidedStep, dict[Row, Tensor]]:
    """The step after the host's calls, each with some of the rows in some order, and what they put out."""
    topology = UNetTopology(unet)
    plan = plan_at(Settings(sag_enabled=True, pag_enabled=True, **settings), topology, progress=0.5)
    assert plan is not None
    step = GuidedStep(plan, topology=topology, rows=ROWS, space=SigmaSpace(), manner=manner)

    def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        out: Tensor = x - unet(x, sigma, context=cond["text"])
        return out

    outs: dict[Row, Tensor] = {}
    for rows in calls:
        x, text = torch.cat([picture(row) for row in rows]), torch.cat([prompt(row) for row in rows])
        out = step(denoise, x, torch.full((len(x),), 500.0, dtype=torch.float64), cond={"text": text}, rows=rows)
        outs |= dict(zip(rows, out, strict=True))
    step.finish()
    return step, outs


@pytest.mark.parametrize("manner", [JOINED, APART, REPEATED], ids=["joined", "apart", "repeated"])
@pytest.mark.parametrize("calls", [
    [[*UNCONDS, *CONDS]],
    [UNCONDS, CONDS],
    [CONDS[::-1], UNCONDS[::-1]],
    [[CONDS[2], UNCONDS[1], CONDS[0]], [UNCONDS[0], CONDS[3], CONDS[1]]],
    [[row] for row in (*UNCONDS, *CONDS)],
    [[row] for row in (*CONDS, *UNCONDS)],
], ids=["uncond first", "uncond first, apart", "backwards", "mixed", "one by one", "uncond last"])  # fmt: skip
def test_rows_may_come_in_any_order(unet: UNetModel, calls: list[list[Row]], manner: Manner) -> None:
    """Hosts have orders of their own: what counts is what a row is."""
    expected, outs = made_step(unet, [[*CONDS, *UNCONDS]])
    step, others = made_step(unet, calls, manner=manner)
    torch.testing.assert_close(step.delta(), expected.delta(), rtol=1e-9, atol=1e-9)
    for row, out in outs.items():
        torch.testing.assert_close(others[row], out, rtol=1e-9, atol=1e-9)
    combined = torch.stack([outs[row] for row in UNCONDS])
    torch.testing.assert_close(step.apply(combined), expected.apply(combined), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_without_unconditional_rows(unet: UNetModel, order: tuple[int, ...]) -> None:
    halves = [CONDS[:2], CONDS[2:]]
    expected, _ = made_step(unet, [CONDS])
    step, _ = made_step(unet, [halves[index] for index in order])
    torch.testing.assert_close(step.delta(), expected.delta(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("calls", [[CONDS[:3], UNCONDS], [CONDS, UNCONDS[:1]], [UNCONDS]])
def test_rows_that_are_missing(unet: UNetModel, calls: list[list[Row]]) -> None:
    with pytest.raises(RuntimeError, match="rows of 6"):
        made_step(unet, calls)


@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
def test_what_the_maths_gets(unet: UNetModel, mode: str) -> None:
    """The unconditional predictions, and the conditional one that the sub-prompts make together."""
    step, outs = made_step(unet, [[*CONDS, *UNCONDS]], rescale=0.7, rescale_mode=mode)
    uncond = torch.stack([outs[row] for row in UNCONDS])
    cond = torch.stack([
        uncond[image] + sum(row.weight * (outs[row] - uncond[image]) for row in CONDS if row.image == image)
        for image in range(2)
    ])
    combined = uncond + 7 * (cond - uncond)
    wanted = {"cond": cond, "uncond": uncond, "rescale": 0.7, "mode": mode}
    expected = guidance.add_guidance(combined, step.delta(), **wanted)
    torch.testing.assert_close(step.apply(combined), expected, rtol=1e-9, atol=1e-9)
    other = guidance.add_guidance(combined, step.delta(), **{**wanted, "uncond": cond, "cond": uncond})
    assert not torch.allclose(expected, other, atol=1e-3), "which is which must matter"
