"""A compact U-Net in the CompVis ``ldm`` layout.

Module names, class names and state dict are those of ``ldm.modules.diffusionmodules.openaimodel.UNetModel`` with a
``SpatialTransformer`` (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv
2112.10752), so weights load strictly in both directions and the guidance engine finds the same attentions here as in
the WebUI. Added to it is what SDXL's U-Net needs (arXiv 2307.01952): a transformer depth per level and a vector
condition (``label_emb``). Left out is what no Stable Diffusion model uses.

Every class can be built under ``torch.device("meta")``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_pag.demo.layers import (
    GEGLU,
    GROUPS,
    BasicTransformerBlock,
    CrossAttention,
    Downsample,
    GroupNorm32,
    ResBlock,
    SpatialTransformer,
    TimestepEmbedSequential,
    Upsample,
    timestep_embedding,
    zeroed,
)

__all__ = [
    "GEGLU",
    "BasicTransformerBlock",
    "CrossAttention",
    "Downsample",
    "ResBlock",
    "SpatialTransformer",
    "TimestepEmbedSequential",
    "UNetKwargs",
    "UNetModel",
    "Upsample",
    "redraw_",
    "sd2_config",
    "sd15_config",
    "sdxl_config",
    "timestep_embedding",
]


class UNetKwargs(TypedDict, total=False):
    """Keyword arguments of :class:`UNetModel`; the names are those of ``ldm`` and ``sgm`` configs."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    context_dim: int
    num_heads: int
    num_head_channels: int
    transformer_depth: int | Sequence[int]
    transformer_depth_middle: int | None
    use_linear_in_transformer: bool
    num_classes: Literal["sequential"] | None
    adm_in_channels: int | None


def sd15_config() -> UNetKwargs:
    """The U-Net of Stable Diffusion 1.x (860 M parameters)."""
    return UNetKwargs(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        context_dim=768,
        num_heads=8,
    )


def sd2_config() -> UNetKwargs:
    """The U-Net of Stable Diffusion 2.x (866 M parameters)."""
    return UNetKwargs(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2, 1),
        context_dim=1024,
        num_head_channels=64,
        use_linear_in_transformer=True,
    )


def sdxl_config() -> UNetKwargs:
    """The U-Net of Stable Diffusion XL base (2.57 G parameters)."""
    return UNetKwargs(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(4, 2),
        context_dim=2048,
        num_head_channels=64,
        transformer_depth=(1, 2, 10),
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
    )


class UNetModel(nn.Module):
    """The denoising U-Net: ``(B, in_channels, H, W)`` and ``(B,)`` timesteps to ``(B, out_channels, H, W)``.

    Heads are given either by number (``num_heads``, Stable Diffusion 1) or by width (``num_head_channels``).
    ``attention_resolutions`` are downsampling factors; ``transformer_depth`` is one number or one per level, the
    middle block's defaults to the last. Heights and widths need not be divisible by the downsampling: features are
    resized (nearest) to the skip connection they meet, which is what the WebUI does.

    Raises ``ValueError`` for contradictory arguments.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        context_dim: int,
        num_heads: int = -1,
        num_head_channels: int = -1,
        transformer_depth: int | Sequence[int] = 1,
        transformer_depth_middle: int | None = None,
        use_linear_in_transformer: bool = False,
        num_classes: Literal["sequential"] | None = None,
        adm_in_channels: int | None = None,
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        depths = [transformer_depth] * levels if isinstance(transformer_depth, int) else list(transformer_depth)
        if len(depths) != levels:
            raise ValueError(f"transformer_depth has {len(depths)} entries for {levels} levels")
        if (num_heads == -1) == (num_head_channels == -1):
            raise ValueError("give either num_heads or num_head_channels")
        if (num_classes is None) != (adm_in_channels is None):
            raise ValueError("num_classes='sequential' and adm_in_channels go together")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        emb_dim = model_channels * 4

        def transformer(channels: int, depth: int) -> SpatialTransformer:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            return SpatialTransformer(
                channels,
                heads=heads,
                dim_head=channels // heads,
                depth=depth,
                context_dim=context_dim,
                use_linear=use_linear_in_transformer,
            )

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if adm_in_channels is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(adm_in_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            )

        ch = model_channels
        first = TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))
        self.input_blocks = nn.ModuleList([first])
        skips = [ch]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(ch, emb_dim, mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(transformer(ch, depths[level]))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < levels - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch)))
                skips.append(ch)

        middle_depth = depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        self.middle_block = TimestepEmbedSequential(
            ResBlock(ch, emb_dim, ch), transformer(ch, middle_depth), ResBlock(ch, emb_dim, ch)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [ResBlock(ch + skips.pop(), emb_dim, mult * model_channels)]
                ch = mult * model_channels
                if 2**level in attention_resolutions:
                    layers.append(transformer(ch, depths[level]))
                if level and index == num_res_blocks:
                    layers.append(Upsample(ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            GroupNorm32(GROUPS, ch), nn.SiLU(), zeroed(nn.Conv2d(model_channels, out_channels, 3, padding=1))
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which the blocks compute."""
        return self.time_embed[0].weight.dtype  # type: ignore[return-value]

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """``context``: ``(B, M, context_dim)``; ``y``: ``(B, adm_in_channels)`` where the model has ``label_emb``."""
        if (y is None) != (self.num_classes is None):
            raise ValueError("y is needed by, and only by, a model with a vector condition")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(self.dtype))
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:
                h = F.interpolate(h, skip.shape[-2:], mode="nearest")
            h = block(torch.cat((h, skip), dim=1), emb, context)
        out: Tensor = self.out(h)
        return out.to(x.dtype)


@torch.no_grad()
def redraw_(module: nn.Module, *, seed: int, gain: float = 1.0) -> nn.Module:
    """Redraw every parameter in place and return the module.

    A freshly built U-Net returns exact zeros (its residual branches end in zeroed layers), so with one every mistake
    passes a comparison. Norm weights become ``1 ± 0.1``, biases ``± 0.1``, all others normal with a standard deviation
    of ``gain / sqrt(fan in)``. A parameter's values depend on its name, its shape and ``seed`` only.
    """
    norms = {
        id(parameter)
        for child in module.modules()
        if isinstance(child, (nn.GroupNorm, nn.LayerNorm))
        for name, parameter in child.named_parameters(recurse=False)
        if name == "weight"
    }
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        values = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in norms:
            values = 1 + 0.1 * values
        elif parameter.ndim < 2:
            values = 0.1 * values
        else:
            values = values * gain / math.sqrt(parameter[0].numel())
        parameter.copy_(values)
    return module
