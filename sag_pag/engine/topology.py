"""The topology of a loaded model, and that of the U-Net: finds the self-attentions of an ``ldm`` or ``sgm`` one.

A name is ``input.N``, ``middle`` or ``output.N`` as the U-Net counts its blocks, with ``.K`` for one transformer block
in it. Names that diffusers (``mid``, ``down.block_2``, ``up_blocks.1.attentions.0``) and ComfyUI/Forge extensions
(``m0``, ``d2.2-9``, ``u0.4``: the n-th block *that holds attention*) use for the same places are understood too.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sag_pag.engine.blocks import NUMBER, AttentionSite, BlockNameError, Half, Part, Topology, between, items
from sag_pag.engine.joint import JOINT_NAME, JointTopology
from sag_pag.engine.operations import attention_channels
from sag_pag.engine.perturbations import PERTURBATIONS, Where

_TRANSFORMERS = rf"(?:\.(?P<k_first>{NUMBER})(?:\s*-\s*(?P<k_last>{NUMBER}))?)?"
_MIDDLE = re.compile(
    rf"(?:middle|mid)(?:_block)?(?:\.(?:block_0|attentions[._]0))?(?:\.transformer_blocks)?{_TRANSFORMERS}"
)
_LDM = re.compile(
    rf"(?P<part>input|output)(?:_blocks)?\.(?P<first>{NUMBER})"
    rf"(?:\s*-\s*(?:(?P=part)(?:_blocks)?\.)?(?P<last>{NUMBER}))?{_TRANSFORMERS}"
)
_DIFFUSERS = re.compile(
    rf"(?P<part>down|up)(?:_blocks)?\.(?:block_)?(?P<stage>{NUMBER})"
    rf"(?:\.attentions[._](?P<position>{NUMBER})(?:\.transformer_blocks{_TRANSFORMERS})?)?"
)
_SHORT = re.compile(
    rf"(?P<part>[dmu])(?P<first>{NUMBER})(?:\s*-\s*(?P=part)?(?P<last>{NUMBER}))?{_TRANSFORMERS}"
)
_PARTS: dict[str, Part] = {
    "input": "input", "down": "input", "d": "input", "m": "middle", "output": "output", "up": "output", "u": "output",
}


@dataclass(frozen=True, eq=False)
class UNetSite(AttentionSite):
    """One self-attention of a U-Net: ``attention`` is its block's ``attn1``."""

    depth: int  # of the transformer block in the U-Net block
    stage: int  # diffusers' down_blocks/up_blocks index
    position: int  # diffusers' attentions index within the stage
    layers: nn.Module  # the layers in the block, which is the block itself unless another module has been put around it
    transformer: nn.Module  # the SpatialTransformer
    transformer_block: nn.Module  # the BasicTransformerBlock

    @property
    def name(self) -> str:
        """The block's name with the transformer block's index."""
        return f"{self.block_name}.{self.depth}"

    @property
    def heads(self) -> int:
        return int(self.attention.heads)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        return attention_channels(self.attention)

    @property
    def sized_by(self) -> tuple[nn.Module, int]:
        return self.transformer, 1

    def module_at(self, where: Where) -> nn.Module:
        return self.transformer_block if where == "block" else self.attention

    def tokens(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


def topology_of(network: nn.Module) -> Topology:
    """The topology of a denoising network, of whichever family. Raises ``TypeError`` for one of no known family."""
    return JointTopology(network) if hasattr(network, "joint_blocks") else UNetTopology(network)


class UNetTopology(Topology):
    """The self-attentions of one U-Net in the order in which they run.

    ``runs_layers``: the U-Net runs the layers of its blocks itself and never calls a block. Raises ``TypeError`` if
    ``unet`` is not built of ``input_blocks``, ``middle_block`` and ``output_blocks``.
    """

    perturbations = PERTURBATIONS
    sites: tuple[UNetSite, ...]

    def __init__(self, unet: nn.Module, *, runs_layers: bool = False) -> None:
        try:
            inputs = list(unet.get_submodule("input_blocks").children())
            middle = unet.get_submodule("middle_block")
            outputs = list(unet.get_submodule("output_blocks").children())
        except AttributeError as error:
            raise TypeError(f"{type(unet).__name__} has no input_blocks, middle_block and output_blocks") from error
        self.network = unet
        self.runs_layers = runs_layers
        self._downsamples = sum(ends_stage(block, "Downsample") for block in inputs)
        self.blocks = (*inputs, middle, *outputs)
        self.sites = (
            *_part_sites("input", inputs, ends_stage_with="Downsample"),
            *_part_sites("middle", [middle], ends_stage_with=""),
            *_part_sites("output", outputs, ends_stage_with="Upsample"),
        )

    def is_still(self, network: nn.Module) -> bool:
        if network is not self.network:
            return False
        try:
            blocks = (
                *network.get_submodule("input_blocks").children(), network.get_submodule("middle_block"),
                *network.get_submodule("output_blocks").children(),
            )
        except AttributeError:
            return False
        same_blocks = len(blocks) == len(self.blocks) and all(map(operator.is_, blocks, self.blocks))
        return same_blocks and all(site.transformer_block.attn1 is site.attention for site in self.sites)

    def downscale(self, site: AttentionSite) -> int:
        """1, 2, 4 or 8."""
        stage = _of_unet(site).stage
        stages = {"input": stage, "middle": self._downsamples, "output": self._downsamples - stage}
        return int(2 ** stages[site.part])

    def describe(self) -> str:
        """The valid names in one line, with the transformer blocks where a block has several."""
        counts = {name: sum(site.block_name == name for site in self.sites) for name in self.block_names()}
        return ", ".join(name if count == 1 else f"{name} (.0 to .{count - 1})" for name, count in counts.items())

    def prefix(self, first: AttentionSite) -> list[nn.Module]:
        """Blocks, then layers, then transformer blocks."""
        site = _of_unet(first)
        modules = list(self.blocks[: self.blocks.index(site.block)])
        if self.runs_layers:
            modules = [layer for block in modules for layer in layers_of(block).children()]
        layers = list(site.layers.children())
        modules += layers[: layers.index(site.transformer)]
        siblings = list(site.transformer.get_submodule("transformer_blocks").children())
        return modules + siblings[: siblings.index(site.transformer_block)]

    def layers(self) -> list[nn.Module]:
        """The layers of its blocks; a block that another module has been put around is that module."""
        whole = [block for block in self.blocks if layers_of(block) is not block]
        return whole + [layer for block in self.blocks for layer in layers_of(block).children()]

    def levels(self) -> list[int]:
        levels, level = [], 0
        for block in self.blocks:
            level += ends_stage(block, "Downsample")
            levels.append(level)
            level -= ends_stage(block, "Upsample")
        return levels

    def labels(self) -> list[str]:
        """Input blocks count up, output blocks too; the middle is in between."""
        inputs = (len(self.blocks) - 1) // 2
        return [*map(str, range(inputs)), "M", *map(str, range(inputs))]

    def halves(self) -> list[Half]:
        inputs, last = (len(self.blocks) - 1) // 2, len(self.blocks) - 1
        return [Half("input", "left", 0, inputs - 1), Half("output", "right", inputs + 1, last)]

    def _nearest(self, item: str) -> str:
        """For the decoder's beginning its first block, for the middle the last input block, else the middle."""
        names = self.block_names()
        middle = [name for name in names if name == "middle"]
        outputs = [name for name in names if name.startswith("output")]
        before = [name for name in names if name.startswith("input")]
        return (outputs + middle + before[::-1] if item.startswith("output") else middle + before[::-1] + outputs)[0]

    def _select(self, item: str, *, whole: bool) -> list[AttentionSite]:
        for pattern, select in self._grammar(whole):
            match = pattern.fullmatch(item.lower())
            if match is None:
                continue
            found = _select_depths(select(match.groupdict()), match["k_first"], match["k_last"], whole=whole)
            if found:
                return list(found)
        return []

    def _grammar(
        self, whole: bool
    ) -> list[tuple[re.Pattern[str], Callable[[dict[str, Any]], list[UNetSite]]]]:
        def by_middle(_: dict[str, Any]) -> list[UNetSite]:
            return [site for site in self.sites if site.part == "middle"]

        def by_index(groups: dict[str, Any]) -> list[UNetSite]:
            part = _PARTS[groups["part"]]
            indices = [site.index for site in self.sites if site.part == part]
            return self._between(part, indices, groups, whole=whole)

        def by_ordinal(groups: dict[str, Any]) -> list[UNetSite]:
            part = _PARTS[groups["part"]]
            order = list(dict.fromkeys(site.index for site in self.sites if site.part == part))
            ordinals = [order.index(site.index) for site in self.sites if site.part == part]
            return self._between(part, ordinals, groups, whole=whole)

        def by_stage(groups: dict[str, Any]) -> list[UNetSite]:
            stage, position = int(groups["stage"]), groups["position"]
            return [
                site for site in self.sites
                if site.part == _PARTS[groups["part"]] and site.stage == stage
                and (position is None or site.position == int(position))
            ]

        return [(_MIDDLE, by_middle), (_LDM, by_index), (_DIFFUSERS, by_stage), (_SHORT, by_ordinal)]

    def _between(self, part: Part, numbers: list[int], groups: dict[str, Any], *, whole: bool) -> list[UNetSite]:
        sites = [site for site in self.sites if site.part == part]
        return between(sites, numbers, groups["first"], groups["last"], whole=whole)


def _of_unet(site: AttentionSite) -> UNetSite:
    assert isinstance(site, UNetSite)
    return site


def check_names(text: str) -> None:
    """Raises ``BlockNameError`` if an item of ``text`` can't be a block name of any network."""
    for item in items(text):
        if not any(pattern.fullmatch(item.lower()) for pattern in (_MIDDLE, _LDM, _DIFFUSERS, _SHORT, JOINT_NAME)):
            allowed = (
                "middle, input.N, output.N, a range such as output.3-5, or one transformer block such as middle.0; "
                "joint.N for SD3"
            )
            raise BlockNameError(item, allowed)


def _select_depths(
    sites: list[UNetSite], first: str | None, last: str | None, *, whole: bool
) -> list[UNetSite]:
    return sites if first is None else between(sites, [site.depth for site in sites], first, last, whole=whole)


def _part_sites(part: Part, blocks: Sequence[nn.Module], *, ends_stage_with: str) -> list[UNetSite]:
    sites: list[UNetSite] = []
    stage = position = 0
    for index, block in enumerate(blocks):
        before, depth = len(sites), 0
        for layers, transformer in _transformers(block):
            for transformer_block in transformer.get_submodule("transformer_blocks").children():
                attention = getattr(transformer_block, "attn1", None)
                if isinstance(attention, nn.Module) and not getattr(transformer_block, "disable_self_attn", False):
                    sites.append(UNetSite(
                        part=part, index=index, depth=depth, stage=stage, position=position, block=block,
                        layers=layers, transformer=transformer, transformer_block=transformer_block,
                        attention=attention,
                    ))
                depth += 1
        position += len(sites) > before
        if ends_stage(block, ends_stage_with):
            stage, position = stage + 1, 0
    return sites


def _transformers(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The transformers in a block, each with the module that holds it among its layers.

    That is the block, or the block that another module has been put around.
    """
    found = []
    for child in block.children():
        found += [(block, child)] if hasattr(child, "transformer_blocks") else _transformers(child)
    return found


def layers_of(block: nn.Module) -> nn.Module:
    """The layers of a block, which is the block itself unless another module has been put around it."""
    inside = [child for child in block.children() if isinstance(child, nn.Sequential)]
    return block if isinstance(block, nn.Sequential) or len(inside) != 1 else layers_of(inside[0])


def ends_stage(block: nn.Module, layer_name: str) -> bool:
    """Whether the resolution changes in this block, by a layer of this class."""
    return any(type(layer).__name__ == layer_name for layer in layers_of(block).children())
