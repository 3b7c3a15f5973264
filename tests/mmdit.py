"""A small transformer of joint blocks with the names and the interface that the WebUI's SD3 model has.

Text and picture run side by side and attend together: q, k and v of both are put behind each other. Each half is
modulated by a vector made of timestep and pooled text; the last block gives no text. As there, there are as many heads
as blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2


@dataclass(frozen=True)
class Shape:
    """``head`` is 64 in SD3, and ``grid`` 192: the most tokens to a side."""

    depth: int = 6
    head: int = 8
    latents: int = 16
    context: int = 12
    pooled: int = 10
    grid: int = 24
    sinusoids: int = 32

    @property
    def width(self) -> int:
        """Channels of each token."""
        return self.depth * self.head


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class VectorEmbedder(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.mlp(y)
        return out


class TimestepEmbedder(VectorEmbedder):
    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__(sinusoids, width)
        self.sinusoids = sinusoids

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        half = self.sinusoids // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        return super().forward(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, *, pre_only: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if not pre_only:
            self.proj = nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class DismantledBlock(nn.Module):
    """One half of a joint block; with ``pre_only`` it gives q, k and v and no more."""

    def __init__(self, width: int, heads: int, *, pre_only: bool) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.attn = SelfAttention(width, heads, pre_only=pre_only)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if pre_only else 6) * width))
        if not pre_only:
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(width)

    def pre_attention(self, x: Tensor, c: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.pre_only else 6, dim=1)
        q, k, v = self.attn.qkv(modulated(self.norm1(x), shift, scale)).chunk(3, dim=-1)
        qkv = q, k, v.unflatten(-1, (self.attn.num_heads, -1))  # there, too, the values alone are parted by head
        return qkv, None if self.pre_only else (x, *rest)

    def post_attention(
        self, attended: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor
    ) -> Tensor:
        x = x + gate[:, None] * self.attn.proj(attended)
        return x + mlp_gate[:, None] * self.mlp(modulated(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    def __init__(self, width: int, heads: int, *, pre_only: bool) -> None:
        super().__init__()
        self.context_block = DismantledBlock(width, heads, pre_only=pre_only)
        self.x_block = DismantledBlock(width, heads, pre_only=False)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor]:
        return joined(self, context, x, c, allowed=None)


def joined(
    block: JointBlock, context: Tensor, x: Tensor, c: Tensor, *, allowed: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """A joint block in which query ``i`` may attend to key ``j`` where ``allowed[i, j]``: text first, then picture."""
    text_qkv, text_rest = block.context_block.pre_attention(context, c)
    picture_qkv, picture_rest = block.x_block.pre_attention(x, c)
    heads = block.x_block.attn.num_heads
    q, k, v = (
        torch.cat(pair, dim=1).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
        for pair in zip(text_qkv, picture_qkv, strict=True)
    )
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
    text, picture = attended[:, : context.shape[1]], attended[:, context.shape[1] :]
    assert picture_rest is not None
    x = block.x_block.post_attention(picture, *picture_rest)
    return None if text_rest is None else block.context_block.post_attention(text, *text_rest), x


def literal_mask(text: int, picture: int) -> Tensor:
    """PAG's mask as diffusers makes it: the text sees everything, a picture's token the text and itself."""
    allowed = torch.ones(text + picture, text + picture, dtype=torch.bool)
    allowed[text:, text:] = torch.eye(picture, dtype=torch.bool)
    return allowed


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, PATCH * PATCH * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        out: Tensor = self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))
        return out


class MMDiT(nn.Module):
    """``forward(x, t, y=…, context=…)`` gives the velocity of latents ``x``, ``(rows, latents, height, width)``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.shape, self.patch_size, self.in_channels = shape, PATCH, shape.latents
        self.x_embedder = PatchEmbed(shape.latents, width)
        self.t_embedder = TimestepEmbedder(shape.sinusoids, width)
        self.y_embedder = VectorEmbedder(shape.pooled, width)
        self.context_embedder = nn.Linear(shape.context, width)
        self.register_buffer("pos_embed", torch.zeros(1, shape.grid**2, width))
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, shape.depth, pre_only=index == shape.depth - 1) for index in range(shape.depth)
        )
        self.final_layer = FinalLayer(width, shape.latents)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        height, width = (side // PATCH for side in x.shape[-2:])
        top, left = (self.shape.grid - height) // 2, (self.shape.grid - width) // 2
        places = self.pos_embed.unflatten(1, (self.shape.grid, self.shape.grid))
        tokens = self.x_embedder(x) + places[:, top : top + height, left : left + width].flatten(1, 2)
        c = self.t_embedder(t, dtype=x.dtype) + self.y_embedder(y)
        text = self.context_embedder(context)
        for block in self.joint_blocks:
            text, tokens = block(text, tokens, c=c)
        out: Tensor = self.final_layer(tokens, c)
        patches = out.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (height, width))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def redrawn(shape: Shape, *, seed: int, dtype: torch.dtype = torch.float32) -> MMDiT:
    """One whose every parameter is drawn anew, so that attention and modulation matter."""
    model = MMDiT(shape).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in (*model.named_parameters(), ("pos_embed", model.pos_embed)):
        gain = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        gain = 0.5 if name == "pos_embed" else 1.5 * gain if name.endswith("qkv.weight") else gain
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain)
    return model.to(dtype)
