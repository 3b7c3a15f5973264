"""The attention that tokens receive, against whole maps in float64; identity attention; cutting arguments by row."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sag_pag.demo.unet import CrossAttention, redraw_
from sag_pag.engine import attention as ours
from sag_pag.engine.attention import (
    AttentionPatch,
    KeyValueInputs,
    MapCapture,
    MapSize,
    Perturb,
    attention_received,
    unchanged_inputs,
)
from sag_pag.engine.perturbations import Place, identity_attention
from sag_pag.engine.rows import take_rows
from sag_pag.settings import Settings


def layer(*, heads: int = 3, dim_head: int = 4, seed: int = 1) -> CrossAttention:
    made = CrossAttention(heads * dim_head, heads=heads, dim_head=dim_head)
    return redraw_(made, seed=seed, gain=2.0).requires_grad_(False)  # type: ignore[return-value]


def tokens(rows: int, count: int, channels: int = 12, *, seed: int = 2) -> Tensor:
    return torch.randn(rows, count, channels, generator=torch.Generator().manual_seed(seed))


def from_whole_map(attention: CrossAttention, x: Tensor) -> Tensor:
    """Mean over heads, sum over queries."""
    attention = attention.double()
    projections = attention.to_q, attention.to_k
    q, k = (f(x.double()).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for f in projections)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1).sum(dim=1)


@given(rows=st.integers(1, 3), count=st.integers(1, 40), heads=st.integers(1, 5), budget=st.integers(1, 5000))
def test_received_whatever_the_pieces(rows: int, count: int, heads: int, budget: int) -> None:
    x = tokens(rows, count, heads * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "LOGITS_BUDGET", budget)
        received = attention_received(layer(heads=heads), x, unchanged_inputs)
    torch.testing.assert_close(received.double(), from_whole_map(layer(heads=heads), x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(received.mean(dim=1), torch.ones(rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision_of_the_map(dtype: torch.dtype, autocast: bool) -> None:
    """The softmax is in float32 whatever the weights are."""
    x = tokens(2, 30).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        received = attention_received(layer().to(dtype), x, unchanged_inputs)
    wide = dtype == torch.float64  # autocast leaves it alone
    assert received.dtype == (torch.float64 if wide else torch.float32)
    coarse = (autocast and not wide) or dtype in (torch.float16, torch.bfloat16)
    exact = from_whole_map(layer(), x.float())
    torch.testing.assert_close(received.double(), exact, rtol=0, atol=0.2 if coarse else 1e-5)
    torch.testing.assert_close(received.mean(dim=1), torch.ones(2).to(received), rtol=1e-5, atol=1e-5)


def test_hypernetworks_change_keys_of_the_map() -> None:
    x = tokens(1, 9)
    received = attention_received(layer(), x, lambda t: (t.flip(1), t))
    torch.testing.assert_close(received.double(), from_whole_map(layer(), x).flip(1), rtol=1e-5, atol=1e-5)


def test_identity_attention_is_an_identity_map_put_in_the_middle() -> None:
    x, module = tokens(2, 7), layer()
    values = module.to_v(x).unflatten(-1, (3, 4)).transpose(1, 2)
    expected = module.to_out((torch.eye(7) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(identity(module)(x), expected)
    changed = identity(module, lambda t: (t * 9, t / 2))(x)
    torch.testing.assert_close(changed, identity(module)(x / 2))


SIZE = (1, 5)


def identity(module: CrossAttention, inputs: KeyValueInputs = unchanged_inputs) -> Perturb:
    return lambda x, **_: identity_attention(Place(module, SIZE, inputs), x, Settings())


@pytest.mark.parametrize("extra", [1, 2, 4])
def test_the_patch_perturbs_the_last_rows(extra: int) -> None:
    module, x = layer(), tokens(4, 5)
    patch = AttentionPatch(4, identity(module), range(4 - extra, 4), left_out=True)
    out = patch.wrap(module.forward)(x, context=None)
    kept = 4 - extra
    torch.testing.assert_close(out[:kept], module(x[:kept]))
    torch.testing.assert_close(out[kept:], identity(module)(x[kept:]))
    assert patch.applied


def test_the_patch_overwrites_rows_of_the_hosts() -> None:
    module, x = layer(), tokens(4, 5)
    patch = AttentionPatch(4, identity(module), [2, 0])
    out = patch.wrap(module.forward)(x, context=None)
    assert torch.equal(out[[1, 3]], module(x)[[1, 3]])
    torch.testing.assert_close(out[[2, 0]], identity(module)(x[[2, 0]]))


def test_the_patch_leaves_other_calls_alone() -> None:
    module = layer()
    read: list[Tensor] = []
    patch = AttentionPatch(4, identity(module), [2, 3], left_out=True, read=read.append)
    x = tokens(3, 5)
    assert torch.equal(patch.wrap(module.forward)(x), module(x))
    assert not patch.applied
    assert not read


def test_capture_reads_its_rows_in_their_order() -> None:
    module, x = layer(), tokens(4, 6)
    capture = MapCapture([3, 1], (2, 3))
    patch = AttentionPatch(4, read=lambda own: capture.read(module, own, unchanged_inputs))
    assert torch.equal(patch.wrap(module.forward)(x), module(x))
    assert capture.received is not None
    torch.testing.assert_close(capture.received.double(), from_whole_map(layer(), x[[3, 1]]), rtol=1e-5, atol=1e-5)
    size = MapSize()
    size.watch(nn.Identity())(torch.zeros(4, 12, 2, 3))
    assert size.known() == (2, 3)


def test_taking_the_first_rows() -> None:
    batch, other, scalar = torch.arange(5), torch.arange(4), torch.tensor(5)
    nested = {"a": [batch, other], "b": (batch, {"c": batch}), "d": None, "e": "text", "f": scalar, "g": 5}
    cut = take_rows(nested, range(2), total=5)
    assert torch.equal(cut["a"][0], batch[:2])
    assert cut["a"][1] is other
    assert torch.equal(cut["b"][1]["c"], batch[:2])
    assert isinstance(cut["b"], tuple)
    assert cut["f"] is scalar
    assert (cut["d"], cut["e"], cut["g"]) == (None, "text", 5)
    assert take_rows(OrderedDict(a=batch), range(1), total=5)["a"].tolist() == [0]
