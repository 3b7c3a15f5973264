"""What perturbed rows do, against references in float64 that are written from the papers with whole matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from sag_pag.demo.unet import CrossAttention, redraw_
from sag_pag.engine import perturbations as ours
from sag_pag.engine.attention import MapSize, unchanged_inputs
from sag_pag.engine.patching import Forward
from sag_pag.engine.perturbations import Place, blur_queries, blurred_queries, swap_least_alike, swapped_tokens
from sag_pag.engine.queries import QueryPatch
from sag_pag.guidance import MergedTokensError
from sag_pag.settings import BLURRED, SWAPPED, Settings

HEADS, WIDTH = 3, 12


def layer() -> CrossAttention:
    made = redraw_(CrossAttention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS), seed=1, gain=2.0)
    return made.requires_grad_(False)  # type: ignore[return-value]


def tokens(rows: int, count: int, channels: int = WIDTH, *, seed: int = 2) -> Tensor:
    return torch.randn(rows, count, channels, generator=torch.Generator().manual_seed(seed))


def seg(*, sigma: float) -> Settings:
    return Settings(pag_enabled=True, pag_perturbation=BLURRED, pag_query_blur=sigma)


def ssg(*, share: float) -> Settings:
    return Settings(pag_enabled=True, pag_perturbation=SWAPPED, pag_swap=share)


def blurred(
    attention: CrossAttention, x: Tensor, size: tuple[int, int], sigma: float, *, rows: Sequence[int] = (0, 1),
    host: Forward | None = None, **given: Any,
) -> Tensor:
    """What the attention, or a ``host`` in its place, puts out where these rows are perturbed."""
    map_size = MapSize()
    map_size.size = size
    place = Place(attention, size, unchanged_inputs)
    patch = QueryPatch(
        len(x), attention, map_size, lambda query: blurred_queries(place, query, seg(sigma=sigma)),
        [row for row in rows if row < len(x)],
    )
    made: Tensor = patch.wrap(host or attention.forward)(x, **given)
    assert patch.applied
    assert "forward" not in vars(attention.to_q)
    return made


def whole_map(attention: CrossAttention, x: Tensor, query: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Softmax attention with the whole map, head by head, for one row's queries ``(tokens, channels)``.

    ``x`` are what keys and values are made of.
    """
    weight = {name: getattr(attention, name).weight.double().numpy() for name in ("to_k", "to_v")}
    out = attention.to_out[0]
    key, value = (x.double().numpy() @ weight[name].T for name in ("to_k", "to_v"))
    parts = []
    for q, k, v in zip(*(np.split(a, HEADS, axis=-1) for a in (query, key, value)), strict=True):
        logits = q @ k.T / np.sqrt(k.shape[-1])
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        parts.append(e / e.sum(axis=-1, keepdims=True) @ v)
    return np.concatenate(parts, axis=-1) @ out.weight.double().numpy().T + out.bias.double().numpy()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5, 9.0, 99.5, 100.0])
@pytest.mark.parametrize("size", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_blurred_queries(size: tuple[int, int], sigma: float) -> None:
    """SEG: the Gaussian works over the map as it lies, reflected at its edges; endless, it gives the mean."""
    attention, x = layer(), tokens(2, size[0] * size[1])
    made = blurred(attention, x, size, sigma)
    for row in range(2):
        expected = whole_map(attention, x[row], naive_blur(attention, x[row], size, sigma))
        torch.testing.assert_close(made[row].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def naive_blur(attention: CrossAttention, x: Tensor, size: tuple[int, int], sigma: float) -> np.ndarray[Any, Any]:
    query = x.double().numpy() @ attention.to_q.weight.double().numpy().T
    grid = query.reshape(*size, WIDTH)
    if sigma == 100:
        grid = np.broadcast_to(grid.mean(axis=(0, 1)), grid.shape)
    else:
        radius = int(np.ceil(3 * sigma))
        grid = ndimage.gaussian_filter(grid, sigma, axes=(0, 1), mode="mirror", radius=radius)
    return grid.reshape(-1, WIDTH)


def test_keys_and_values_are_what_the_host_gives_and_other_rows_stay() -> None:
    """A longer context, as ControlNet's reference modes hand over."""
    attention, x, context = layer(), tokens(3, 12), tokens(3, 20, seed=5)
    made, plain = blurred(attention, x, (3, 4), 2.0, rows=[2], context=context), attention(x, context=context)
    assert torch.equal(made[:2], plain[:2])
    expected = whole_map(attention, context[2], naive_blur(attention, x[2], (3, 4), 2.0))
    torch.testing.assert_close(made[2].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("down", "across"), [(1, 2), (2, 1), (2, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("sigma", [1.5, 100.0])
def test_attention_in_tiles(down: int, across: int, sigma: float) -> None:
    """As HyperTile cuts it: queries are those of the whole map, and see what is in their tile."""
    attention, x, size = layer(), tokens(3, 24), (4, 6)
    pattern = {"down": down, "across": across, "h": 4 // down, "w": 6 // across}

    def cut(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "b (down h across w) c -> (b down across) (h w) c", **pattern)

    def host(tensor: Tensor) -> Tensor:
        out = attention(cut(tensor)) if down * across > 1 else attention(tensor)
        return rearrange(out, "(b down across) (h w) c -> b (down h across w) c", **pattern)  # type: ignore[no-any-return]

    made = blurred(attention, x, size, sigma, rows=[0, 2], host=host)
    assert torch.equal(made[1], host(x)[1])
    for row in (0, 2):
        query = cut(torch.from_numpy(naive_blur(attention, x[row], size, sigma).copy())[None])
        parts = [whole_map(attention, own, q.numpy()) for own, q in zip(cut(x[row][None]), query, strict=True)]
        expected = rearrange(np.stack(parts), "(b down across) (h w) c -> b (down h across w) c", **pattern)[0]
        torch.testing.assert_close(made[row].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_what_is_cut_in_another_way_is_no_map() -> None:
    attention, x = layer(), tokens(2, 24)

    def host(tensor: Tensor) -> Tensor:
        return attention(tensor.reshape(4, 12, WIDTH)).reshape(2, 24, WIDTH)  # type: ignore[no-any-return]

    assert blurred(attention, x, (4, 6), 2.0, host=host).isfinite().all(), "two tiles, one below the other"
    with pytest.raises(MergedTokensError, match="2 x 12 tokens are no tiles of a feature map of 3 x 8"):
        blurred(attention, x, (3, 8), 2.0, host=host)
    with pytest.raises(MergedTokensError, match="12 tokens do not fill a feature map of 4 x 6"):
        blurred(attention, x[:, ::2], (4, 6), 2.0)


def test_calls_of_to_q_with_other_rows_are_the_hosts() -> None:
    """An extension's own, within the attention's."""
    attention, x = layer(), tokens(3, 12)
    seen = []

    def host(tensor: Tensor) -> Tensor:
        seen.append(attention.to_q(tensor[:2]))
        return attention(tensor)  # type: ignore[no-any-return]

    blurred(attention, x, (3, 4), 2.0, rows=[0, 1], host=host)
    assert torch.equal(seen[0], attention.to_q(x[:2]))


def test_a_blur_of_nothing_is_attention() -> None:
    """Where all queries are alike a blur changes none."""
    attention, x = layer(), tokens(1, 1).expand(2, 12, -1)
    torch.testing.assert_close(blurred(attention, x, (3, 4), 3), attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 9.0, 100.0])
def test_precision_of_the_blur(dtype: torch.dtype, sigma: float, autocast: torch.dtype | None) -> None:
    """What is computed in float32 is the exact one but for its last rounding, also under autocast.

    The values are far from 0, and their sums beyond float16.
    """
    query = (tokens(1, 1600, 3) + 60).to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        made = blur_queries(query, (40, 40), sigma=sigma)
    assert made.dtype == dtype
    exact = blur_queries(query.double(), (40, 40), sigma=sigma)
    half_a_step = torch.finfo(dtype).eps / 2 * 64
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=max(1.01 * half_a_step, 1e-4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarities_under_autocast(dtype: torch.dtype) -> None:
    """Tokens that are much alike: rounded similarities would choose other pairs."""
    x = tokens(1, 1, 64) + 0.2 * tokens(2, 60, 64, seed=3)
    with torch.autocast("cpu", dtype):
        made = swap_least_alike(x, share=0.3)
    assert torch.equal(made, swap_least_alike(x.double(), share=0.3).float())


@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), sigma=st.floats(0.5, 100))
def test_a_blur_keeps_constants_and_stays_between(size: tuple[int, int], sigma: float) -> None:
    query = tokens(1, size[0] * size[1]).double()
    made = blur_queries(query, size, sigma=sigma)
    assert made.shape == query.shape
    assert (made <= query.amax(dim=1) + 1e-9).all()
    assert (made >= query.amin(dim=1) - 1e-9).all()
    ones = torch.ones_like(query)
    torch.testing.assert_close(blur_queries(ones, size, sigma=sigma), ones)


def test_tokens_that_do_not_fill_the_map() -> None:
    with pytest.raises(MergedTokensError, match="10 tokens do not fill a feature map of 3 x 4"):
        blur_queries(tokens(1, 10), (3, 4), sigma=1.0)


def naive_swap(items: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
    """Pair by pair, from the one least alike on: the second pass, over second items, goes over the first one."""
    unit = items / np.linalg.norm(items, axis=1, keepdims=True)
    count = len(items)
    pairs = sorted((float(unit[i] @ unit[j]), i, j) for i in range(count) for j in range(i + 1, count))
    chosen = pairs[: int(count * share)]
    source = list(range(count))
    for _, i, j in chosen:
        source[i] = j
    for _, i, j in chosen:
        source[j] = i
    return items[source]


@pytest.mark.parametrize("budget", [1, 100, 10**6])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("shape", [(20, 7), (33, 5), (9, 12)])
def test_swapping_the_least_alike(
    shape: tuple[int, int], share: float, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is held at a time."""
    monkeypatch.setattr(ours, "SIMILARITIES_BUDGET", budget)
    x = tokens(2, *shape).double()
    made = swap_least_alike(x, share=share)
    for row in range(2):
        np.testing.assert_array_equal(made[row].numpy(), naive_swap(x[row].numpy(), share))


def test_tokens_first_then_channels() -> None:
    x = tokens(2, 30).double()
    made = swapped_tokens(Place(layer(), (5, 6), unchanged_inputs), x, ssg(share=0.2))
    for row in range(2):
        expected = naive_swap(naive_swap(x[row].numpy(), 0.2).T, 0.2).T
        np.testing.assert_array_equal(made[row].numpy(), expected)


def test_too_few_to_swap() -> None:
    x = tokens(1, 9, 9)
    assert torch.equal(swapped_tokens(Place(layer(), (3, 3), unchanged_inputs), x, ssg(share=0.1)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_swapped_tokens_keep_their_values(dtype: torch.dtype) -> None:
    x = tokens(1, 40, 16).to(dtype)
    made = swapped_tokens(Place(layer(), (5, 8), unchanged_inputs), x, ssg(share=0.2))
    assert made.dtype == dtype
    assert set(made.flatten().tolist()) <= set(x.flatten().tolist())
    assert not torch.equal(made, x)
