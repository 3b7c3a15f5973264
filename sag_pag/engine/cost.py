"""What guidance costs on the U-Net, and what a picture costs on any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sag_pag.engine.blocks import AttentionSite, Topology
from sag_pag.engine.joint import JointTopology
from sag_pag.engine.joint_cost import JointCost
from sag_pag.engine.model_cost import ModelCost, Size
from sag_pag.engine.operations import convolution_operations, linear_operations, map_operations
from sag_pag.engine.plan import HiresPass, choose_blocks, plan_step, scales_at
from sag_pag.engine.topology import UNetTopology, layers_of
from sag_pag.settings import Settings

TOKENS = 77
"""Of a prompt that fits one chunk."""


class UNetCost(ModelCost):
    """Operations of one row of a U-Net call for latents of ``latent_size`` (height, width)."""

    topology: UNetTopology

    def __init__(self, topology: UNetTopology, latent_size: Size, *, context_tokens: int = TOKENS) -> None:
        self.topology = topology
        self.context_tokens = context_tokens
        self.map_sizes = {}
        self._operations = {}
        self._blocks(latent_size)
        embedding = [topology.network.get_submodule("time_embed"), getattr(topology.network, "label_emb", None)]
        rest = sum(linear_operations(layer, 1) for layer in embedding if layer is not None)
        rest += convolution_operations(topology.network.get_submodule("out"), latent_size)
        self.row = rest + sum(self._operations[block] for block in topology.blocks)

    def _blocks(self, size: Size) -> None:
        blocks, skips = self.topology.blocks, list[Size]()
        inputs = (len(blocks) - 1) // 2
        for index, block in enumerate(blocks):
            if index > inputs:
                size = skips.pop()  # the host resizes what comes from below to the skip connection's size
            total = 0
            for layer in layers_of(block).children():
                size = _resized(layer, size)
                self._operations[layer] = self._layer(layer, size)
                total += self._operations[layer]
            self._operations[block] = total
            if index < inputs:
                skips.append(size)

    def _layer(self, layer: nn.Module, size: Size) -> int:
        tokens = size[0] * size[1]
        operations = convolution_operations(layer, size)
        if not hasattr(layer, "transformer_blocks"):
            return operations + linear_operations(layer, 1)  # the only ones are those of the time embedding
        for site in self.topology.sites:
            if site.transformer is layer:
                self.map_sizes[site] = size
        blocks = layer.get_submodule("transformer_blocks")
        for block in blocks.children():
            self._operations[block] = self._transformer_block(block, tokens)
            operations += self._operations[block]
        return operations + linear_operations(layer, tokens) - linear_operations(blocks, tokens)

    def _transformer_block(self, block: nn.Module, tokens: int) -> int:
        operations = linear_operations(block, tokens)
        for name in ("attn1", "attn2"):
            attention = block.get_submodule(name)
            crossed = name == "attn2" or getattr(block, "disable_self_attn", False)
            seen = self.context_tokens if crossed else tokens
            for projection in ("to_k", "to_v"):
                layer = attention.get_submodule(projection)
                operations += linear_operations(layer, seen) - linear_operations(layer, tokens)
            operations += 2 * map_operations(attention, tokens, seen)
        return operations

    def reading(self, site: AttentionSite) -> int:
        tokens = self._tokens(site)
        inputs = sum(linear_operations(site.attention.get_submodule(name), tokens) for name in ("to_q", "to_k"))
        return inputs + map_operations(site.attention, tokens, tokens)

    def _tokens(self, site: AttentionSite) -> int:
        return self.map_sizes[site][0] * self.map_sizes[site][1]

    def _attention(self, site: AttentionSite) -> int:
        """A whole self-attention."""
        tokens = self._tokens(site)
        return linear_operations(site.attention, tokens) + 2 * map_operations(site.attention, tokens, tokens)


def cost_of(topology: Topology, latent_size: Size) -> ModelCost:
    """The cost of the model that has this topology, for latents of ``latent_size`` (height, width)."""
    if isinstance(topology, JointTopology):
        return JointCost(topology, latent_size)
    assert isinstance(topology, UNetTopology)
    return UNetCost(topology, latent_size)


@dataclass(frozen=True)
class PictureCost:
    """Operations over those without guidance: of the dearest step, and of all steps together."""

    step: float
    picture: float


@dataclass(frozen=True)
class Pass:
    """One pass of sampling at the size of ``cost``, its ``steps`` evenly spread from ``begin`` (0 is noise) to 1.

    ``rows`` a picture: 2 with CFG, 1 where the host leaves the unconditional ones out.
    """

    cost: ModelCost
    steps: int
    begin: float = 0.0
    hires: HiresPass | None = None
    rows: int = 2

    def progress(self) -> list[float]:
        """Of each step."""
        return [self.begin + (1 - self.begin) * step / max(self.steps - 1, 1) for step in range(self.steps)]


def picture_cost(settings: Settings, passes: Sequence[Pass]) -> PictureCost:
    """What a picture costs that these passes make: one, or two with hires. fix."""
    dearest, total, without = 1.0, 0.0, 0
    for done in passes:
        chosen = choose_blocks(settings, done.cost.topology)
        plans = [
            plan_step(settings, chosen, scales_at(settings, progress=progress, number=number, hires=done.hires))
            for number, progress in enumerate(done.progress())
        ]
        ratios = [done.cost.step(plan, rows=done.rows) for plan in plans]
        dearest = max([dearest, *ratios])
        total += sum(ratios) * done.rows * done.cost.row
        without += done.steps * done.rows * done.cost.row
    return PictureCost(dearest, total / without)


def _resized(layer: nn.Module, size: Size) -> Size:
    name = type(layer).__name__
    if name == "Downsample":
        return (size[0] + 1) // 2, (size[1] + 1) // 2
    return (2 * size[0], 2 * size[1]) if name == "Upsample" else size
