"""The engine on Stability's own U-Net class against whole, separate U-Net passes, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from ldm_cases import Case, engine_step, make_inputs, reference_sag, reference_step, relative_error
from ldm_host import Sampler, alphas_cumprod, float64_inference
from reference import perturbed

from sag_pag.engine.branch import Branch, denoise_with_branch
from sag_pag.engine.calls import APART, JOINED
from sag_pag.engine.topology import UNetTopology

TOLERANCE = 1e-10
pytestmark = pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")

PAG = [
    Case("middle", perturb=("middle",)),
    Case("middle, own call", perturb=("middle",), own_call=True),
    Case("early input", perturb=("input.1",)),
    Case("early input, own call", perturb=("input.1",), own_call=True),
    Case("late output", perturb=("output.8",)),
    Case("late output, own call", perturb=("output.8",), own_call=True),
    Case("several", perturb=("input.5", "middle", "output.4")),
    Case("several, own call", perturb=("input.5", "middle", "output.4"), own_call=True),
    Case("cond and uncond apart", perturb=("middle",), calls="cond and uncond apart"),
    Case("every row apart, own call", perturb=("output.3",), calls="every row apart", own_call=True),
    Case("AND", perturb=("middle",), prompts=((1.0, 0.6, -0.4), (1.2,))),
    Case("AND, rows apart", perturb=("middle",), prompts=((1.0, 0.6), (0.3, 1.0)), calls="every row apart"),
    Case("AND without uncond", perturb=("input.7",), prompts=((0.5, 0.5), (1.0,)), uncond=False),
    Case("no uncond", perturb=("middle",), uncond=False),
    Case("no uncond, own call", perturb=("output.1",), uncond=False, own_call=True),
    Case("one image", perturb=("middle",), prompts=((1.0,),)),
    Case("odd feature maps", perturb=("middle", "output.2"), size=(12, 20)),
    Case("small and narrow", perturb=("input.8",), size=(4, 24)),
    Case("checkpointing", perturb=("middle",), checkpointing=True),
    Case("SD2", layout="sd2", perturb=("middle",)),
    Case("SD2, first transformer block", layout="sd2", perturb=("middle:0",)),
    Case("SD2, second transformer block", layout="sd2", perturb=("middle:1",)),
    Case("SD2, second block, own call", layout="sd2", perturb=("output.1:1", "output.3:0"), own_call=True),
    Case("SD2, checkpointing", layout="sd2", perturb=("input.3:1",), checkpointing=True, calls="cond and uncond apart"),
    Case("SD2, v", layout="sd2", perturb=("middle",), prediction="v"),
    Case("rescale", perturb=("middle",), rescale=0.7),
    Case("rescale, AND", perturb=("middle",), rescale=1.0, rescale_mode="partial", prompts=((0.8, 0.6), (1.0,))),
]
SAG = [
    Case("middle", read="middle"),
    Case("early input", read="input.2"),
    Case("late output", read="output.7"),
    Case("cond and uncond apart", read="middle", calls="cond and uncond apart"),
    Case("every row apart", read="input.4", calls="every row apart"),
    Case("AND", read="middle", prompts=((1.0, 0.6), (1.2,))),
    Case("no uncond", read="middle", uncond=False),
    Case("AND without uncond", read="middle", prompts=((1.0,), (0.5, 0.5)), uncond=False, calls="every row apart"),
    Case("one image, late step", read="middle", prompts=((1.0,),), timestep=20),
    Case("odd feature maps", read="middle", size=(12, 20)),
    Case("narrower than the blur", read="input.7", size=(4, 24)),
    Case("wide blur, low threshold", read="input.5", size=(16, 24), blur_sigma=2.5, threshold=0.9),
    Case("high threshold", read="input.1", threshold=1.1),
    Case("checkpointing", read="middle", checkpointing=True),
    Case("SD2", layout="sd2", read="middle"),
    Case("SD2, second transformer block", layout="sd2", read="output.2:1"),
    Case("SD2, v", layout="sd2", read="middle", prediction="v"),
    Case("v, no uncond", read="output.2", prediction="v", uncond=False, size=(12, 20)),
    Case("rescale", read="middle", rescale=0.5),
]
BOTH = [
    Case("same block", perturb=("middle",), read="middle"),
    Case("same block, own call", perturb=("middle",), read="middle", own_call=True),
    Case("read before", perturb=("middle",), read="input.2"),
    Case("read before, own call", perturb=("middle",), read="input.2", own_call=True),
    Case("read before in the same transformer", layout="sd2", perturb=("middle:1",), read="middle:0"),
    Case("read after in the same transformer", layout="sd2", perturb=("middle:0",), read="middle:1"),
    Case("read after", perturb=("input.4",), read="output.6"),
    Case("read after, own call", perturb=("input.4",), read="output.6", own_call=True),
    Case("read between", perturb=("input.4", "output.4"), read="middle"),
    Case("read the second of two", perturb=("input.8", "output.0"), read="output.0", prompts=((1.0, 0.5), (1.0,))),
    Case("no uncond", perturb=("middle",), read="output.3", uncond=False),
    Case("rows apart, AND", perturb=("middle",), read="input.5", prompts=((1.0, 0.5), (1.0,)), calls="every row apart"),
    Case("v, odd feature maps", layout="sd2", perturb=("input.3",), read="middle", prediction="v", size=(6, 10)),
    Case("rescale", perturb=("middle",), read="middle", rescale=1.0),
]


@pytest.fixture(autouse=True)
def _float64_attention() -> Iterator[None]:
    with float64_inference():
        yield


def check(case: Case, sampler: Sampler) -> None:
    host = case.host(sampler)
    engine, reference = engine_step(case, host), reference_step(case, host)
    assert reference.delta.abs().max() > 1e-3 * reference.conds.abs().max(), "nothing to compare"
    assert relative_error(engine.conds, reference.conds) < TOLERANCE
    if reference.unconds is not None and engine.unconds is not None:
        assert relative_error(engine.unconds, reference.unconds) < TOLERANCE
    assert relative_error(engine.delta, reference.delta) < TOLERANCE
    assert relative_error(engine.guided, reference.guided) < TOLERANCE


@pytest.mark.parametrize("sampler", ["sigma", "timestep"])
@pytest.mark.parametrize("case", PAG, ids=lambda case: case.name)
def test_pag(case: Case, sampler: Sampler) -> None:
    check(case, sampler)


@pytest.mark.parametrize("sampler", ["sigma", "timestep"])
@pytest.mark.parametrize("case", SAG, ids=lambda case: case.name)
def test_sag(case: Case, sampler: Sampler) -> None:
    check(case, sampler)


@pytest.mark.parametrize("sampler", ["sigma", "timestep"])
@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_sag_and_pag(case: Case, sampler: Sampler) -> None:
    check(case, sampler)


@pytest.mark.parametrize("own_call", [False, True], ids=["in the host's call", "own call"])
@pytest.mark.parametrize("rows", [range(1), range(1, 3), range(4)], ids=str)
@pytest.mark.parametrize("block", ["input.2", "middle", "output.5"])
def test_any_rows_can_be_perturbed(block: str, rows: range, own_call: bool) -> None:
    case = Case("rows", perturb=(block,), prompts=((1.0, 1.0), (1.0, 1.0)))
    host = case.host("timestep")
    inputs = make_inputs(case, host)
    x, levels = inputs.x[[0, 0, 1, 1]], torch.tensor([900.0, 700, 500, 300], dtype=torch.float64)
    topology = UNetTopology(host.unet)
    out, worse = denoise_with_branch(host, x, levels, cond=inputs.conds, branch=Branch(
        topology, lambda tokens: (tokens, tokens), rows=rows, perturbed=topology.resolve(block),
        manner=APART if own_call else JOINED,
    ))
    assert worse is not None
    own = slice(rows.start, rows.stop)
    with perturbed(host, [block]):
        expected = host(x[own], levels[own], cond=inputs.conds[own])
    assert relative_error(worse, expected) < TOLERANCE
    assert relative_error(out, host(x, levels, cond=inputs.conds)) < TOLERANCE
    assert relative_error(out[own], expected) > 1e-3


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_sag_of_a_v_model_has_the_term_that_raw_v_outputs_drop(layout: str) -> None:
    """In eps space ``s * (eps_u - eps_d)`` with both eps computed from v at their own input."""
    case = Case("v", layout=layout, read="middle", prediction="v", prompts=((1.0,),))  # type: ignore[arg-type]
    host = case.host("sigma")
    inputs = make_inputs(case, host)
    sag = reference_sag(case, host, inputs, 0, 0)
    s, sigma = case.sag_scale, inputs.level
    a = float(alphas_cumprod()[case.timestep])
    context = inputs.unconds[:1]

    def v(x: torch.Tensor) -> torch.Tensor:
        return host.predict(a**0.5 * x, torch.tensor([case.timestep]).double(), context)

    def eps(x: torch.Tensor) -> torch.Tensor:
        return a**0.5 * v(x) + (1 - a) ** 0.5 * (a**0.5 * x)

    by_hand = s * (eps(inputs.x) - eps(sag.degraded_x))
    delta = engine_step(case, host).delta
    assert relative_error(-delta / sigma, by_hand) < TOLERANCE
    raw = s * a**0.5 * (v(inputs.x) - v(sag.degraded_x))
    dropped = s * (1 - a) ** 0.5 * a**0.5 * (inputs.x - sag.degraded_x)
    assert relative_error(raw + dropped, by_hand) < TOLERANCE
    assert relative_error(raw, by_hand) > 1e-2


def test_the_reference_can_tell_blocks_apart() -> None:
    """Every block's guidance differs from every other's, or agreement on a block would say nothing."""
    blocks = UNetTopology(Case("any").host("timestep").unet).block_names()
    assert blocks == [*(f"input.{n}" for n in (1, 2, 4, 5, 7, 8)), "middle", *(f"output.{n}" for n in range(9))]
    cases = [Case("one", perturb=(block,), prompts=((1.0,),), uncond=False) for block in blocks]
    deltas = [reference_step(case, case.host("timestep")).delta for case in cases]
    for delta, other in itertools.combinations(deltas, 2):
        assert relative_error(other, delta) > 1e-2
