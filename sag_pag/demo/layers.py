"""The layers of the U-Net in :mod:`sag_pag.demo.unet`, with the names they have in the CompVis ``ldm`` layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
"""Groups of every group norm: a constant of the layout, so channel counts are multiples of it."""


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of ``(B,)`` timesteps, which may be fractional: ``(B, dim)`` float32, cosines first."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) / half * steps)
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return F.pad(embedding, (0, dim % 2))


def zeroed(module: nn.Module) -> nn.Module:
    """Zero a layer that ends a residual branch, so that an untrained block is the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


class GEGLU(nn.Module):
    """A GELU-gated linear unit (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Identity(), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of ``(B, N, query_dim)`` to a ``(B, M, context_dim)`` context, or to itself without one."""

    def __init__(self, query_dim: int, context_dim: int | None = None, *, heads: int, dim_head: int) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``mask``: ``(B, M)`` boolean, true where a context token may be seen."""
        context = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        # Plain matrix products, not a fused kernel: a FLOP counter sees these on every device.
        logits = (q @ k.transpose(-1, -2)).float() * self.scale
        if mask is not None:
            logits = logits.masked_fill(~mask.flatten(1)[:, None, None, :], -torch.finfo(logits.dtype).max)
        weights = logits.softmax(dim=-1)
        out: Tensor = self.to_out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


def fused_forward(self: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    """A forward with torch's fused kernel for any ``ldm``-like ``CrossAttention``, in the precision of its input."""
    source = x if context is None else context
    q, k, v = (
        t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(source), self.to_v(source))
    )
    result: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return result


@contextmanager
def fused_attention() -> Iterator[None]:
    """Runs with torch's fused kernel on the attention class, as the WebUI's attention optimisations do."""
    original = CrossAttention.forward
    CrossAttention.forward = fused_forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        CrossAttention.forward = original  # type: ignore[method-assign]


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, *, heads: int, dim_head: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=heads, dim_head=dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads=heads, dim_head=dim_head)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a ``(B, C, H, W)`` feature map, as a residual."""

    def __init__(
        self, in_channels: int, *, heads: int, dim_head: int, depth: int, context_dim: int, use_linear: bool
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(GROUPS, in_channels, eps=1e-6)
        self.proj_in: nn.Module = (
            nn.Linear(in_channels, inner_dim) if use_linear else nn.Conv2d(in_channels, inner_dim, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, heads=heads, dim_head=dim_head, context_dim=context_dim)
            for _ in range(depth)
        )
        self.proj_out = zeroed(
            nn.Linear(inner_dim, in_channels) if use_linear else nn.Conv2d(inner_dim, in_channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()
        if self.use_linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context=context)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, size).contiguous()
        if not self.use_linear:
            h = self.proj_out(h)
        out: Tensor = h + x
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class ResBlock(nn.Module):
    def __init__(self, channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm32(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


class TimestepEmbedSequential(nn.Sequential):
    """Layers in order, each given what it takes: the time embedding, the context, or neither."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x
