"""What a perturbed row does at a chosen self-attention, by name: a new way is one function and one entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_pag.engine.attention import KeyValueInputs
from sag_pag.engine.operations import attention_channels, linear_operations, map_operations
from sag_pag.engine.patching import unhooked
from sag_pag.guidance import MergedTokensError, without_autocast, working_precision
from sag_pag.settings import BLURRED, IDENTITY, SWAPPED, WHOLE_MAP, Settings

Size = tuple[int, int]
"""Height and width of a feature map."""

SIMILARITIES_BUDGET = 16 * 1024 * 1024
"""Similarities of pairs that are held at a time (64 MiB in float32)."""


Where = Literal["attention", "queries", "block"]
"""Of which module a perturbation replaces the call, or what goes into it; or what its ``to_q`` puts out."""


@dataclass(frozen=True)
class Place:
    """Where a perturbation works: the module whose call makes the attention, the size of the map that the picture's
    tokens lie in, and what ``to_k`` and ``to_v`` of a U-Net's attention get.
    """

    attention: nn.Module
    size: Size
    inputs: KeyValueInputs


@dataclass(frozen=True)
class Perturbation:
    """``run`` makes of a perturbed row's tokens something else: of a U-Net's ``(rows, tokens, channels)``.

    At ``attention`` they are the self-attention's input and become its output; at ``queries`` they are its queries, and
    at ``block`` the transformer block's input, and remain that. ``operations`` is what that costs a row, with the
    attention itself where it still runs.
    """

    at: Where
    run: Callable[[Place, Any, Settings], Any]
    operations: Callable[[nn.Module, Size, Settings], int]


def identity_attention(place: Place, tokens: Tensor, _: Settings) -> Tensor:
    """The identity as the attention map, ``to_out(to_v(tokens))`` (PAG, arXiv 2403.17377)."""
    value: Tensor = unhooked(place.attention, "to_v")(place.inputs(tokens)[1])
    result: Tensor = unhooked(place.attention, "to_out")(value)
    return result


def _identity_operations(attention: nn.Module, size: Size, _: Settings) -> int:
    tokens = size[0] * size[1]
    return sum(linear_operations(attention.get_submodule(name), tokens) for name in ("to_v", "to_out"))


def blurred_queries(place: Place, query: Tensor, settings: Settings) -> Tensor:
    """Queries blurred over the feature map; keys, values and softmax stay (SEG, arXiv 2408.00760).

    Raises ``MergedTokensError`` if the tokens do not fill the map.
    """
    return blur_queries(query, place.size, sigma=settings.pag_query_blur)


def blur_queries(query: Tensor, size: Size, *, sigma: float) -> Tensor:
    """``query``, ``(rows, tokens, channels)``, blurred over the map that its tokens lie in, in float32 at least.

    A Gaussian of standard deviation ``sigma`` in tokens, the map being reflected at its edges as often as the Gaussian
    reaches beyond them; at ``WHOLE_MAP`` and above their mean, which is what an endless one gives. Raises
    ``MergedTokensError`` if the tokens do not fill the map.
    """
    height, width = size
    if query.shape[1] != height * width:
        raise MergedTokensError(f"{query.shape[1]} tokens do not fill a feature map of {height} x {width}")
    own = working_precision(query)
    if sigma >= WHOLE_MAP:
        return own.mean(dim=1, keepdim=True).to(query.dtype).expand_as(query)
    rows, columns = (reflected_gaussian(count, sigma=sigma, like=own) for count in size)
    with without_autocast(query.device):
        blurred = torch.einsum("yh,bhwc,xw->byxc", rows, own.view(len(own), height, width, -1), columns)
    return blurred.flatten(1, 2).to(query.dtype)


def reflected_gaussian(count: int, *, sigma: float, like: Tensor) -> Tensor:
    """The blur of a line of ``count`` values as a matrix ``(count, count)``, rows of sum 1.

    Taps reach three standard deviations; the line goes on beyond its ends as its reflection (without the end itself).
    """
    radius = math.ceil(3 * sigma)
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)  # not on the device: some have no float64
    weights = torch.softmax(-0.5 * (taps / sigma) ** 2, dim=0)
    if count == 1:
        return torch.ones(1, 1).to(like)
    period = 2 * (count - 1)
    reached = (torch.arange(count)[:, None] + torch.arange(-radius, radius + 1)) % period
    reached = torch.minimum(reached, period - reached)
    return torch.zeros(count, count, dtype=torch.float64).scatter_add_(
        1, reached, weights.expand(count, -1)
    ).to(like)


def _blurred_operations(attention: nn.Module, size: Size, settings: Settings) -> int:
    tokens, channels = size[0] * size[1], attention_channels(attention)
    blur = 0 if settings.pag_query_blur >= WHOLE_MAP else 2 * tokens * channels * sum(size)
    return linear_operations(attention, tokens) + 2 * map_operations(attention, tokens, tokens) + blur


def swapped_tokens(_: Place, tokens: Tensor, settings: Settings) -> Tensor:
    """Tokens, then channels, swapped in the pairs that are least alike (SSG, arXiv 2604.08048)."""
    places = swap_least_alike(tokens, share=settings.pag_swap)
    return swap_least_alike(places.transpose(1, 2), share=settings.pag_swap).transpose(1, 2)


def swap_least_alike(x: Tensor, *, share: float) -> Tensor:
    """``x``, ``(rows, items, features)``, with the items of the pairs of lowest cosine similarity exchanged.

    As many pairs as ``share`` of the items, rounded down, of each row. Pairs may have an item in common: then, as in
    the authors' code, of the pairs in which an item comes second, or else of those in which it comes first, the one
    most alike says what takes its place.
    """
    items = x.shape[1]
    count = int(items * share)
    if not count:
        return x
    first, second = _least_alike_pairs(working_precision(x), count)
    order = torch.arange(count, device=x.device).expand_as(first)
    source = torch.arange(items, device=x.device).repeat(len(x), 1)
    for place, other in ((first, second), (second, first)):
        last = torch.full_like(source, -1).scatter_reduce_(1, place, order, reduce="amax")
        source = torch.where(last >= 0, other.gather(1, last.clamp_min(0)), source)
    return x.gather(1, source[..., None].expand_as(x))


def _least_alike_pairs(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` pairs of lowest cosine similarity in each row, the lowest first: two ``(rows, count)`` of items.

    Each pair once, its first item before its second. The similarities are never held whole.
    """
    rows, items, _ = x.shape
    unit = F.normalize(x, dim=2)
    columns = torch.arange(items, device=x.device)
    chunk = max(1, SIMILARITIES_BUDGET // (rows * items))
    best = x.new_full((rows, 0), 0.0)
    pairs = torch.zeros(rows, 0, dtype=torch.long, device=x.device)
    for start in range(0, items, chunk):
        here = columns[start : start + chunk]
        with without_autocast(x.device):
            alike = unit[:, start : start + chunk] @ unit.transpose(1, 2)
        alike = alike.masked_fill(columns <= here[:, None], math.inf).flatten(1)
        number = (here[:, None] * items + columns).flatten().expand(rows, -1)
        candidates, numbers = torch.cat([best, alike], dim=1), torch.cat([pairs, number], dim=1)
        best, kept = candidates.topk(min(count, candidates.shape[1]), dim=1, largest=False)
        pairs = numbers.gather(1, kept)
    return pairs // items, pairs % items


def _swapped_operations(attention: nn.Module, size: Size, settings: Settings) -> int:
    tokens, channels = size[0] * size[1], attention_channels(attention)
    compared = sum(items for items in (tokens, channels) if int(items * settings.pag_swap))
    whole = linear_operations(attention, tokens) + 2 * map_operations(attention, tokens, tokens)
    return whole + 2 * tokens * channels * compared


PERTURBATIONS: Mapping[str, Perturbation] = {
    IDENTITY: Perturbation("attention", identity_attention, _identity_operations),
    BLURRED: Perturbation("queries", blurred_queries, _blurred_operations),
    SWAPPED: Perturbation("block", swapped_tokens, _swapped_operations),
}
