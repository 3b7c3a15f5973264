"""The transformer of joint blocks: its names, and perturbed rows against the literal mask over the whole map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmdit import PATCH, JointBlock, MMDiT, Shape, joined, literal_mask, redrawn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sag_pag.engine import branch as branch_module
from sag_pag.engine import joint
from sag_pag.engine.attention import unchanged_inputs
from sag_pag.engine.blocks import BlockNameError
from sag_pag.engine.branch import Branch, denoise_with_branch
from sag_pag.engine.calls import APART, JOINED, REPEATED, Manner
from sag_pag.engine.joint import JointTopology, attend_to_self_and_text
from sag_pag.engine.patching import Forward
from sag_pag.engine.topology import UNetTopology, check_names, topology_of
from sag_pag.neighbours import Neighbours
from sag_pag.settings import PERTURBATION_NAMES, Settings

SHAPE = Shape()
ROWS, TEXT, SIZE = 4, 5, (8, 12)
PLACES = SIZE[0] * SIZE[1] // PATCH**2
PERTURBED = ["joint.0", "joint.1", "joint.3", "joint.5", "joint.2, joint.4", "joint.0-5"]
manners = pytest.mark.parametrize("manner", [JOINED, APART, REPEATED], ids=["joined", "apart", "repeated"])


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return redrawn(SHAPE, seed=3, dtype=torch.float64)


def inputs(rows: Sequence[int] = range(ROWS)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, SHAPE.latents, *SIZE, generator=generator, dtype=torch.float64)
    t = torch.tensor([700.0, 500.0, 700.0, 300.0], dtype=torch.float64)
    context = torch.randn(ROWS, TEXT, SHAPE.context, generator=generator, dtype=torch.float64)
    vector = torch.randn(ROWS, SHAPE.pooled, generator=generator, dtype=torch.float64)
    own = list(rows)
    return x[own], t[own], {"crossattn": context[own], "vector": vector[own]}


class Denoise:
    """Notes the rows of its calls, and those of each joint block's."""

    def __init__(self, model: MMDiT) -> None:
        self.model = model
        self.rows: list[int] = []
        self.blocks: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        self.rows.append(len(x))
        hooks = [
            block.x_block.mlp.register_forward_pre_hook(partial(self._note, index))  # type: ignore[union-attr]
            for index, block in enumerate(self.model.joint_blocks)
        ]
        try:
            return plain(self.model, x, sigma, cond)
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, index: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.blocks.append((index, len(args[0])))


def plain(model: MMDiT, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(x, t, y=cond["vector"], context=cond["crossattn"])
    return out


def with_literal_mask(model: MMDiT, text: str, rows: Sequence[int]) -> Tensor:
    """What the model gives when the named blocks mask their whole map."""
    sites = JointTopology(model).resolve(text)
    mask = literal_mask(TEXT, PLACES)

    def forward(block: JointBlock, context: Tensor, x: Tensor, c: Tensor) -> Any:
        return joined(block, context, x, c, allowed=mask)

    try:
        for site in sites:
            site.block.forward = MethodType(forward, site.block)  # type: ignore[method-assign]
        return plain(model, *inputs(rows))
    finally:
        for site in sites:
            del site.block.forward


def branch(model: MMDiT, text: str, rows: Sequence[int], manner: Manner) -> Branch:
    topology = topology_of(model)
    return Branch(
        topology, unchanged_inputs, rows=rows, perturbed=topology.resolve(text), manner=manner, watch=manner.watch()
    )


@manners
@pytest.mark.parametrize("rows", [[0, 1], [2, 0], [3]], ids=str)
@pytest.mark.parametrize("text", PERTURBED)
def test_perturbed_rows(model: MMDiT, text: str, rows: list[int], manner: Manner) -> None:
    x, t, cond = inputs()
    out, perturbed = denoise_with_branch(
        Denoise(model), x, t, cond=cond, branch=branch(model, text, rows, manner)
    )
    host = plain(model, x, t, cond)
    assert perturbed is not None
    torch.testing.assert_close(out, host, rtol=1e-12, atol=1e-12)
    assert manner is JOINED or torch.equal(out, host)
    torch.testing.assert_close(perturbed, with_literal_mask(model, text, rows), rtol=1e-11, atol=1e-11)
    assert (perturbed - host[rows]).abs().mean() > 1e-3
    assert all("forward" not in vars(module) for module in model.modules())


def test_which_blocks_run_with_which_rows(model: MMDiT) -> None:
    """Those before the first perturbed one with the host's rows alone; in a call of our own they do not run."""
    x, t, cond = inputs()
    denoise = Denoise(model)
    denoise_with_branch(denoise, x, t, cond=cond, branch=branch(model, "joint.2, joint.4", [0, 1], JOINED))
    assert denoise.rows == [6]
    # a perturbed block computes the host's rows and the others one after the other
    assert denoise.blocks == [(0, 4), (1, 4), (2, 2), (2, 4), (3, 6), (4, 2), (4, 4), (5, 6)]
    denoise = Denoise(model)
    denoise_with_branch(denoise, x, t, cond=cond, branch=branch(model, "joint.2", [0, 1], APART))
    assert denoise.rows == [4, 2]
    assert denoise.blocks == [*((n, 4) for n in range(6)), *((n, 2) for n in range(2, 6))]


def test_for_an_own_call_one_blocks_output_is_kept(model: MMDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: set[int] = set()

    class Record(branch_module.Record):
        def replaying(self, module: nn.Module, host: Forward) -> Forward:
            kept.add(len(self._out))
            return super().replaying(module, host)

    monkeypatch.setattr(branch_module, "Record", Record)
    x, t, cond = inputs()
    denoise_with_branch(Denoise(model), x, t, cond=cond, branch=branch(model, "joint.4", [0], APART))
    assert kept == {1}


@manners
@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_a_model_that_leaves_a_block_out(manner: Manner, left_out: int) -> None:
    """As Forge does when it is told to; also the last one before the perturbed one."""
    whole, less = (redrawn(SHAPE, seed=3, dtype=torch.float64) for _ in range(2))
    skipped = [block for index, block in enumerate(less.joint_blocks) if index != left_out]
    topology = topology_of(whole)
    run = type(whole).forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        kept = whole.joint_blocks
        whole.joint_blocks = nn.ModuleList(block for index, block in enumerate(kept) if index != left_out)
        try:
            return run(whole, *args, **kwargs)
        finally:
            whole.joint_blocks = kept

    less.joint_blocks = nn.ModuleList(skipped)
    whole.forward = forward  # type: ignore[method-assign]
    x, t, cond = inputs()
    _, perturbed = denoise_with_branch(Denoise(whole), x, t, cond=cond, branch=Branch(
        topology, unchanged_inputs, rows=[0, 1], perturbed=topology.resolve("joint.3"), manner=manner,
        watch=manner.watch(),
    ))
    assert perturbed is not None
    torch.testing.assert_close(perturbed, with_literal_mask(less, "joint.2", [0, 1]), rtol=1e-11, atol=1e-11)


@manners
@pytest.mark.parametrize("call", [0, 1])
def test_nothing_is_left_after_an_error(model: MMDiT, manner: Manner, call: int) -> None:
    def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        denoised.append(plain(model, x, sigma, cond))
        if len(denoised) > call:
            raise RuntimeError("here")
        return denoised[-1]

    denoised: list[Tensor] = []
    if call == 0 or manner is not JOINED:
        with pytest.raises(RuntimeError, match="here"):
            denoise_with_branch(denoise, *inputs()[:2], cond=inputs()[2], branch=branch(model, "joint.2", [0], manner))
    assert all("forward" not in vars(module) for module in model.modules())


def parts(*, dtype: torch.dtype = torch.float64, scale: float = 1.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = {"query": 33, "key": 33, "value": 33, "text_key": 7, "text_value": 7}
    return {
        name: (scale * torch.randn(2, 3, count, 8, generator=generator, dtype=torch.float64)).to(dtype)
        for name, count in tokens.items()
    }


def masked(query: Tensor, key: Tensor, value: Tensor, text_key: Tensor, text_value: Tensor) -> Tensor:
    mask = literal_mask(text_key.shape[2], query.shape[2])[text_key.shape[2] :]
    keys, values = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@pytest.mark.parametrize("budget", [joint.LOGITS_BUDGET, 2 * 3 * 8 * 10, 1], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1.3e-2), (torch.float16, 2e-3)], ids=str,
)
def test_attention_to_self_and_text(
    budget: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of any size; half precision rounds what comes out, and nothing on the way."""
    monkeypatch.setattr(joint, "LOGITS_BUDGET", budget)
    given = parts(dtype=dtype)
    made = attend_to_self_and_text(**given)
    expected = masked(**{name: part.double() for name, part in given.items()})
    assert made.dtype == dtype
    assert (made.double() - expected).abs().max() < tolerance * max(1.0, float(expected.abs().max()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend_to_self_and_text(**given), made)


def test_large_logits() -> None:
    """Logits of hundreds, as half precision could not hold them."""
    given = parts(dtype=torch.float16, scale=40.0)
    expected = masked(**{name: part.double() for name, part in given.items()})
    assert (attend_to_self_and_text(**given).double() - expected).abs().max() < 0.2


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_map_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "LOGITS_BUDGET", 4096)
    query = torch.zeros(1, 2, 4096, 4)
    text = torch.zeros(1, 2, 16, 4)
    with Largest() as largest:
        attend_to_self_and_text(query, query, query, text_key=text, text_value=text)
    assert 2048 < largest.elements <= query.numel()


@pytest.fixture(scope="module")
def full() -> JointTopology:
    """As many blocks as SD3-medium has."""
    with torch.device("meta"):
        return JointTopology(MMDiT(Shape(depth=24)))


def test_names(full: JointTopology) -> None:
    names = [f"joint.{n}" for n in range(24)]
    assert full.block_names() == names == [site.name for site in full.sites]
    assert full.describe() == "joint.0 to joint.23"
    assert {site.part for site in full.sites} == {"joint"}
    assert (full.sites[0].heads, full.sites[0].channels, full.downscale(full.sites[0])) == (24, 192, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joint.13", [13]), ("blocks.13", [13]), ("blocks.1", [1]), ("transformer_blocks.7", [7]), ("JOINT.2", [2]),
        ("transformer_blocks.7.attn", [7]), ("joint_blocks.3", [3]), ("block.3", [3]), ("joint.3-5", [3, 4, 5]),
        ("joint.3 - joint.5, joint.4", [3, 4, 5]), ("joint.5, joint.1", [1, 5]), ("blocks.22-23", [22, 23]),
    ],
)
def test_lists(full: JointTopology, text: str, expected: list[int]) -> None:
    assert [site.index for site in full.resolve(text)] == expected
    assert full.unknown(text) == []
    assert full.stand_in(text) == ()
    check_names(text)


@pytest.mark.parametrize("text", ["joint.24", "joint.22-24", "input.4", "output.3-5", "mid", "m0", "joint", "middle.0"])
def test_names_that_it_has_not(full: JointTopology, text: str) -> None:
    with pytest.raises(BlockNameError, match=r"joint\.0 to joint\.23"):
        full.resolve(text)
    assert [site.index for site in full.resolve_known(text)] == ([22, 23] if text == "joint.22-24" else [])


def test_what_may_have_been_meant(full: JointTopology) -> None:
    with pytest.raises(BlockNameError) as refused:
        full.resolve("13")
    assert refused.value.meant == ("joint.13",)


@pytest.mark.parametrize(("depth", "expected"), [(1, 0), (2, 1), (6, 3), (18, 9), (24, 13), (38, 20)])
def test_the_block_for_a_list_that_nobody_typed(depth: int, expected: int) -> None:
    """diffusers' example is block 13 of 24."""
    with torch.device("meta"):
        topology = JointTopology(MMDiT(Shape(depth=depth)))
    for text in ("middle", "output.0.0-5", *(["joint.13"] if depth <= 13 else [])):
        assert [site.index for site in topology.resolve(text)] == [expected]
        assert [site.index for site in topology.stand_in(text)] == [expected]


def test_sd3s_block_on_a_u_net() -> None:
    """The built-in preset for SD3, on another model."""
    from sag_pag.demo.unet import UNetModel, sd15_config

    with torch.device("meta"):
        topology = UNetTopology(UNetModel(**sd15_config()))
    assert [site.block_name for site in topology.resolve("joint.13")] == ["middle"]
    with pytest.raises(BlockNameError):
        topology.resolve("joint.12")


def test_what_the_family_can_not_do(full: JointTopology) -> None:
    assert "U-Net" in str(full.refuses("sag_enabled", True))
    assert full.refuses("sag_enabled", False) is None
    assert full.refuses("pag_enabled", True) is None
    assert [full.refuses("pag_perturbation", way) is None for way in PERTURBATION_NAMES] == [True, False, False]
    assert Settings().pag_perturbation in full.perturbations


def test_whether_it_is_still_the_same() -> None:
    model = redrawn(SHAPE, seed=1)
    topology = topology_of(model)
    assert topology.is_still(model)
    assert not topology.is_still(redrawn(SHAPE, seed=1))
    block = model.joint_blocks[2]
    model.joint_blocks[2] = JointBlock(SHAPE.width, SHAPE.depth, pre_only=False)
    assert not topology.is_still(model)
    model.joint_blocks[2] = block
    assert topology.is_still(model)
    attention = block.x_block.attn  # type: ignore[union-attr]
    block.x_block.attn = nn.Identity()  # type: ignore[union-attr]
    assert not topology.is_still(model)
    block.x_block.attn = attention  # type: ignore[union-attr]
    del model.joint_blocks
    assert not topology.is_still(model)


def test_joint_blocks_of_another_kind() -> None:
    model = redrawn(SHAPE, seed=1)
    model.joint_blocks[1].x_block.attn2 = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="attend twice"):
        topology_of(model)
    model = redrawn(SHAPE, seed=1)
    del model.joint_blocks[0].context_block
    with pytest.raises(TypeError, match="not those of SD3"):
        topology_of(model)


def test_who_else_is_in_the_model() -> None:
    """One that has replaced a block, or put its own in, gets the host's rows and no others."""
    model = redrawn(SHAPE, seed=1)
    assert Neighbours(topology_of(model)).manner(short_of_memory=False) == JOINED
    assert Neighbours(topology_of(model)).manner(short_of_memory=True).perturbed == "apart"
    model.joint_blocks[1].forward = lambda context, x, c: (context, x)  # type: ignore[method-assign]
    assert Neighbours(topology_of(model)).manner(short_of_memory=False).perturbed == REPEATED.perturbed
    del model.joint_blocks[1].forward

    class Wrapped(JointBlock):
        pass

    model.joint_blocks[1] = Wrapped(SHAPE.width, SHAPE.depth, pre_only=False)
    assert Neighbours(topology_of(model)).manner(short_of_memory=False).perturbed == REPEATED.perturbed
