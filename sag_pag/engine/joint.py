"""The transformer of joint blocks (MMDiT, Stable Diffusion 3): its topology, and what a perturbed row does in it.

A joint block takes text and picture side by side, ``block(context, x, c=…)``, and gives both back; the last one gives
no text. A name is ``joint.N`` as the network counts its ``joint_blocks``; diffusers' ``blocks.N`` and
``transformer_blocks.N`` are understood too.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_pag.engine.blocks import NUMBER, AttentionSite, Half, Topology, between
from sag_pag.engine.perturbations import Perturbation, Place, Size, Where
from sag_pag.guidance import without_autocast, working_precision
from sag_pag.settings import IDENTITY, Settings, Value

_LISTS = r"(?:joint|joint_blocks|blocks?|transformer_blocks)"
JOINT_NAME = re.compile(
    rf"{_LISTS}\.(?P<first>{NUMBER})(?:\.attn)?(?:\s*-\s*(?:{_LISTS}\.)?(?P<last>{NUMBER}))?"
)

TEXT_TOKENS = 154
"""Of a prompt that fits one chunk: 77 of CLIP, and as many of T5, which are there without T5 too."""

LOGITS_BUDGET = 16 * 1024 * 1024
"""Logits of picture tokens on the text that are held at a time (64 MiB in float32)."""

NO_SAG = "SAG is defined for the U-Net's attention among the places of a picture, not for one that holds text too"
ONLY_IDENTITY = "defined for the U-Net's attention among the places of a picture, not for one that holds text too"


class JointTokens(NamedTuple):
    """What a joint block gets: text ``(rows, text, channels)``, picture ``(rows, places, channels)``, modulation
    ``(rows, channels)``.
    """

    context: Tensor
    x: Tensor
    c: Tensor


@dataclass(frozen=True, eq=False)
class JointSite(AttentionSite):
    """The attention of one joint block; the block itself makes it. ``attention`` is the picture's half of it."""

    embedder: nn.Module  # cuts the latent into the picture's tokens
    patch: int  # latent pixels to a side of a token

    @property
    def name(self) -> str:
        return self.block_name

    @property
    def heads(self) -> int:
        return int(self.attention.num_heads)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        return int(self.attention.get_submodule("qkv").in_features)  # type: ignore[arg-type]

    @property
    def sized_by(self) -> tuple[nn.Module, int]:
        return self.embedder, self.patch

    def module_at(self, where: Where) -> nn.Module:
        return self.block

    def tokens(self, context: Tensor, x: Tensor, c: Tensor) -> JointTokens:
        return JointTokens(context, x, c)


def joint_identity(place: Place, tokens: JointTokens, _: Settings) -> tuple[Tensor | None, Tensor]:
    """A picture's token attends to itself and to all text, the text to everything: what the block then puts out.

    So diffusers' ``StableDiffusion3PAGPipeline`` masks the map. Here it is never held: one softmax over the text's
    logits and a token's own.
    """
    block = place.attention
    text, picture = block.get_submodule("context_block"), block.get_submodule("x_block")
    heads = int(picture.attn.num_heads)  # type: ignore[union-attr, arg-type]
    text_qkv, text_rest = text.pre_attention(tokens.context, tokens.c)  # type: ignore[operator]
    picture_qkv, picture_rest = picture.pre_attention(tokens.x, tokens.c)  # type: ignore[operator]
    cq, ck, cv = (_by_head(part, heads) for part in text_qkv)
    xq, xk, xv = (_by_head(part, heads) for part in picture_qkv)
    attended = attend_to_self_and_text(xq, xk, xv, text_key=ck, text_value=cv)
    x: Tensor = picture.post_attention(_merged(attended), *picture_rest)  # type: ignore[operator]
    if text.pre_only:
        return None, x
    read = F.scaled_dot_product_attention(cq, torch.cat([ck, xk], dim=2), torch.cat([cv, xv], dim=2))
    return text.post_attention(_merged(read), *text_rest), x  # type: ignore[operator]


def attend_to_self_and_text(
    query: Tensor, key: Tensor, value: Tensor, *, text_key: Tensor, text_value: Tensor
) -> Tensor:
    """Attention in which each of the picture's tokens has itself and the whole text to attend to.

    ``query``, ``key`` and ``value`` are the picture's, ``(rows, heads, places, size)``; ``text_key`` and
    ``text_value`` have the text's tokens for places. Softmax in float32 at least, in pieces of ``LOGITS_BUDGET``.
    """
    rows, heads, places, size = query.shape
    seen = text_key.shape[2] + 1
    chunk = max(1, LOGITS_BUDGET // (rows * heads * seen))
    with without_autocast(query.device):
        transposed, text = working_precision(text_key).transpose(-1, -2), working_precision(text_value)
        made = []
        for start in range(0, places, chunk):
            part = slice(start, start + chunk)
            q, k, v = (working_precision(whole[:, :, part]) for whole in (query, key, value))
            q = q * size**-0.5
            weights = torch.cat([q @ transposed, (q * k).sum(dim=-1, keepdim=True)], dim=-1).softmax(dim=-1)
            made.append((weights[..., :-1] @ text + weights[..., -1:] * v).to(value.dtype))
        return torch.cat(made, dim=2)


def _by_head(part: Tensor, heads: int) -> Tensor:
    """As ``(rows, heads, places, size)``; the WebUI's values are parted by head already, its queries and keys not."""
    return part.reshape(part.shape[0], part.shape[1], heads, -1).transpose(1, 2)


def _merged(by_head: Tensor) -> Tensor:
    """``(rows, heads, places, size)`` as ``(rows, places, channels)``."""
    return by_head.transpose(1, 2).flatten(2)


def map_products(block: nn.Module, size: Size) -> int:
    """Operations of a whole joint attention's products with its map, of a row."""
    return _products(block, (size[0] * size[1] + TEXT_TOKENS) ** 2)


def _identity_products(block: nn.Module, size: Size, _: Settings) -> int:
    places = size[0] * size[1]
    text = 0 if block.context_block.pre_only else TEXT_TOKENS * (places + TEXT_TOKENS)  # type: ignore[union-attr]
    return _products(block, places * TEXT_TOKENS + text)


def _products(block: nn.Module, pairs: int) -> int:
    return 4 * pairs * int(block.get_submodule("x_block.attn.qkv").in_features)  # type: ignore[arg-type]


class JointTopology(Topology):
    """The attentions of a transformer of joint blocks.

    Raises ``TypeError`` if its blocks are not of the known kind: two halves, ``context_block`` and ``x_block``, whose
    pictures attend once.
    """

    chained = True
    perturbations = {IDENTITY: Perturbation("attention", joint_identity, _identity_products)}  # noqa: RUF012

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        try:
            self.blocks = tuple(network.get_submodule("joint_blocks").children())
            embedder, patch = network.get_submodule("x_embedder"), int(network.patch_size)  # type: ignore[arg-type]
            halves = [(block.get_submodule("context_block"), block.get_submodule("x_block")) for block in self.blocks]
            attentions = [picture.get_submodule("attn") for _, picture in halves]
        except AttributeError as error:
            raise TypeError(f"the joint blocks of {type(network).__name__} are not those of SD3") from error
        if any(hasattr(picture, "attn2") or getattr(picture, "x_block_self_attn", False) for _, picture in halves):
            raise TypeError(f"the joint blocks of {type(network).__name__} attend twice")
        self.sites: tuple[JointSite, ...] = tuple(
            JointSite(part="joint", index=index, block=block, attention=attention, embedder=embedder, patch=patch)
            for index, (block, attention) in enumerate(zip(self.blocks, attentions, strict=True))
        )

    def is_still(self, network: nn.Module) -> bool:
        if network is not self.network:
            return False
        try:
            blocks = tuple(network.get_submodule("joint_blocks").children())
            return len(blocks) == len(self.blocks) and all(map(operator.is_, blocks, self.blocks)) and all(
                site.block.get_submodule("x_block.attn") is site.attention for site in self.sites
            )
        except AttributeError:
            return False

    def downscale(self, site: AttentionSite) -> int:
        return site.sized_by[1]

    def describe(self) -> str:
        return f"joint.0 to joint.{len(self.sites) - 1}" if len(self.sites) > 1 else "joint.0"

    def prefix(self, first: AttentionSite) -> list[nn.Module]:
        """Joint blocks alone: what runs before them takes next to nothing."""
        return list(self.blocks[: first.index])

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def levels(self) -> list[int]:
        return [0] * len(self.blocks)

    def labels(self) -> list[str]:
        return [str(index) for index in range(len(self.blocks))]

    def halves(self) -> list[Half]:
        return [Half("joint", "left", 0, len(self.blocks) - 1)]

    def refuses(self, name: str, value: Value) -> str | None:
        if name == "sag_enabled" and value:
            return NO_SAG
        if name == "pag_perturbation" and value not in self.perturbations:
            return ONLY_IDENTITY
        return None

    def _nearest(self, item: str) -> str:
        """Where diffusers' example is: block 13 of 24."""
        return f"joint.{len(self.blocks) * 13 // 24}"

    def _select(self, item: str, *, whole: bool) -> list[AttentionSite]:
        match = JOINT_NAME.fullmatch(item.lower())
        if match is None:
            return []
        numbers = [site.index for site in self.sites]
        return list(between(self.sites, numbers, match["first"], match["last"], whole=whole))
