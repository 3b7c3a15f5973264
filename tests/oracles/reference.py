"""Both guidances once more, written for clarity alone: one image, one prompt, one whole U-Net pass at a time.

Shares nothing with the package: the U-Net gets other attention modules in the places of its own, found by their paths;
the attention map is held whole; the blur is a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ldm_host import Host, alphas_cumprod
from torch import Tensor, nn


class IdentityAttention(nn.Module):
    """The attention with the identity for its map."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.to_v = original.to_v
        self.to_out = original.to_out

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.to_out(self.to_v(x))
        return out


class RecordedAttention(nn.Module):
    """The attention as it is, keeping its map ``(batch, heads, queries, keys)``."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k = (
            layer(x).unflatten(-1, (self.original.heads, -1)).transpose(1, 2)
            for layer in (self.original.to_q, self.original.to_k)
        )
        self.map = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out: Tensor = self.original(x)
        return out


def transformer_path(block: str) -> str:
    """The path of ``input.N``, ``middle`` or ``output.N``'s transformer, which in ``ldm`` follows its ResBlock."""
    part, _, number = block.partition(".")
    return "middle_block.1" if part == "middle" else f"{part}_blocks.{number}.1"


def attention_paths(unet: nn.Module, block: str) -> list[str]:
    """The paths of a block's self-attentions; ``block`` may end in ``:K`` for one transformer block."""
    name, _, depth = block.partition(":")
    path = f"{transformer_path(name)}.transformer_blocks"
    depths = [int(depth)] if depth else range(len(list(unet.get_submodule(path).children())))
    return [f"{path}.{k}.attn1" for k in depths]


@contextmanager
def swapped(unet: nn.Module, paths: Iterable[str], make: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Runs with each of these modules exchanged for what ``make`` makes of it."""
    originals = {path: unet.get_submodule(path) for path in paths}
    for path, original in originals.items():
        _put(unet, path, make(original))
    try:
        yield
    finally:
        for path, original in originals.items():
            _put(unet, path, original)


def _put(unet: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(unet.get_submodule(parent), name, module)


def perturbed(host: Host, blocks: Iterable[str]) -> AbstractContextManager[None]:
    """Runs with identity attention in ``blocks`` for every row."""
    paths = [path for block in blocks for path in attention_paths(host.unet, block)]
    return swapped(host.unet, paths, IdentityAttention)


def reflected_gaussian(length: int, sigma: float) -> Tensor:
    """Gaussian blur with reflect padding along one axis, as a matrix."""
    radius = min(max(4, math.ceil(3 * sigma)), length - 1)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)]
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for k, weight in zip(range(-radius, radius + 1), weights, strict=True):
            j = abs(i + k)
            matrix[i, j if j < length else 2 * (length - 1) - j] += weight / sum(weights)
    return matrix


def nearest(mask: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height) * mask.shape[0] // height
    columns = torch.arange(width) * mask.shape[1] // width
    return mask[rows][:, columns]


@dataclass(frozen=True)
class Sag:
    """One image's SAG: the guidance and what it came from; all but the mask ``(1, channels, height, width)``."""

    delta: Tensor  # in the sampler's space, times the scale
    eps: Tensor
    degraded_eps: Tensor
    degraded_x: Tensor
    mask: Tensor


def self_attention_guidance(
    host: Host, x: Tensor, level: float, *, cond: Any, block: str, scale: float, threshold: float, sigma: float,
) -> Sag:
    """SAG of one image ``(1, channels, height, width)`` from one prediction."""
    sizes: list[tuple[int, int]] = []
    transformer = host.unet.get_submodule(transformer_path(block.partition(":")[0]))
    path = attention_paths(host.unet, block)[0]
    levels = torch.tensor([level], dtype=torch.float64)
    hook = transformer.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    with swapped(host.unet, [path], RecordedAttention):
        out = host(x, levels, cond=cond)
        attention_map = host.unet.get_submodule(path).map
    hook.remove()
    received = attention_map.mean(dim=1).sum(dim=1)[0]
    assert (received - threshold).abs().min() > 1e-6, "the mask hangs on rounding: take another seed"
    mask = nearest((received > threshold).view(sizes[0]), *x.shape[-2:])
    a = float(alphas_cumprod()[int(level)]) if host.sampler == "timestep" else 1 / (1 + level**2)
    if host.sampler == "timestep":
        eps, x0 = out, (x - (1 - a) ** 0.5 * out) / a**0.5
    else:
        eps, x0 = (x - out) / level, out
    blurred = reflected_gaussian(x.shape[2], sigma) @ x0 @ reflected_gaussian(x.shape[3], sigma).T
    degraded = torch.where(mask, blurred, x0)
    if host.sampler == "timestep":
        degraded_x = a**0.5 * degraded + (1 - a) ** 0.5 * eps
        degraded_eps = host(degraded_x, levels, cond=cond)
        delta = scale * (eps - degraded_eps)
    else:
        degraded_x = degraded + level * eps
        degraded_x0 = host(degraded_x, levels, cond=cond)
        degraded_eps = (degraded_x - degraded_x0) / level
        delta = scale * (degraded - degraded_x0)
    return Sag(delta, eps, degraded_eps, degraded_x, mask)
