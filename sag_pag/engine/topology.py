"""U-Net topology: finds the self-attentions of an ``ldm`` or ``sgm`` U-Net, parses and prints block names.

A name is ``input.N``, ``middle`` or ``output.N`` as the U-Net counts its blocks, with ``.K`` for one transformer block
in it. Names that diffusers (``mid``, ``down.block_2``, ``up_blocks.1.attentions.0``) and ComfyUI/Forge extensions
(``m0``, ``d2.2-9``, ``u0.4``: the n-th block *that holds attention*) use for the same places are understood too.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sag_pag.settings import UNTYPED_BLOCKS

Part = Literal["input", "middle", "output"]


_NUMBER = r"\d{1,4}"
_TRANSFORMERS = rf"(?:\.(?P<k_first>{_NUMBER})(?:\s*-\s*(?P<k_last>{_NUMBER}))?)?"
_MIDDLE = re.compile(
    rf"(?:middle|mid)(?:_block)?(?:\.(?:block_0|attentions[._]0))?(?:\.transformer_blocks)?{_TRANSFORMERS}"
)
_LDM = re.compile(
    rf"(?P<part>input|output)(?:_blocks)?\.(?P<first>{_NUMBER})"
    rf"(?:\s*-\s*(?:(?P=part)(?:_blocks)?\.)?(?P<last>{_NUMBER}))?{_TRANSFORMERS}"
)
_DIFFUSERS = re.compile(
    rf"(?P<part>down|up)(?:_blocks)?\.(?:block_)?(?P<stage>{_NUMBER})"
    rf"(?:\.attentions[._](?P<position>{_NUMBER})(?:\.transformer_blocks{_TRANSFORMERS})?)?"
)
_SHORT = re.compile(
    rf"(?P<part>[dmu])(?P<first>{_NUMBER})(?:\s*-\s*(?P=part)?(?P<last>{_NUMBER}))?{_TRANSFORMERS}"
)
_PARTS: dict[str, Part] = {
    "input": "input", "down": "input", "d": "input", "m": "middle", "output": "output", "up": "output", "u": "output",
}


class BlockNameError(ValueError):
    """A block name that the U-Net does not have.

    ``unknown`` is the name, ``allowed`` lists the valid ones, ``meant`` are those that may have been meant.
    """

    def __init__(self, unknown: str, allowed: str, *, meant: Sequence[str] = ()) -> None:
        self.unknown = unknown
        self.allowed = allowed
        self.meant = tuple(meant)
        super().__init__(f"no self-attention block {unknown!r}; allowed: {allowed}")


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One self-attention: where it is, and the modules around it."""

    part: Part
    index: int  # of the block in its part
    depth: int  # of the transformer block in the U-Net block
    stage: int  # diffusers' down_blocks/up_blocks index
    position: int  # diffusers' attentions index within the stage
    block: nn.Module  # the entry of input_blocks or output_blocks, or middle_block
    layers: nn.Module  # the layers in it, which is the block itself unless another module has been put around it
    transformer: nn.Module  # the SpatialTransformer
    transformer_block: nn.Module  # the BasicTransformerBlock
    attention: nn.Module  # its attn1

    @property
    def block_name(self) -> str:
        """``input.N``, ``middle`` or ``output.N``."""
        return self.part if self.part == "middle" else f"{self.part}.{self.index}"

    @property
    def name(self) -> str:
        """The block's name with the transformer block's index."""
        return f"{self.block_name}.{self.depth}"


class Topology:
    """The self-attentions of one U-Net in the order in which they run.

    ``runs_layers``: the U-Net runs the layers of its blocks itself and never calls a block. Raises ``TypeError`` if
    ``unet`` is not built of ``input_blocks``, ``middle_block`` and ``output_blocks``.
    """

    def __init__(self, unet: nn.Module, *, runs_layers: bool = False) -> None:
        try:
            inputs = list(unet.get_submodule("input_blocks").children())
            middle = unet.get_submodule("middle_block")
            outputs = list(unet.get_submodule("output_blocks").children())
        except AttributeError as error:
            raise TypeError(f"{type(unet).__name__} has no input_blocks, middle_block and output_blocks") from error
        self.unet = unet
        self.runs_layers = runs_layers
        self._downsamples = sum(ends_stage(block, "Downsample") for block in inputs)
        self.blocks: tuple[nn.Module, ...] = (*inputs, middle, *outputs)
        self.sites: tuple[AttentionSite, ...] = (
            *_part_sites("input", inputs, ends_stage_with="Downsample"),
            *_part_sites("middle", [middle], ends_stage_with=""),
            *_part_sites("output", outputs, ends_stage_with="Upsample"),
        )

    def is_still(self, unet: nn.Module) -> bool:
        """Whether this is ``unet``'s topology, and nobody has changed its blocks meanwhile."""
        if unet is not self.unet:
            return False
        try:
            blocks = (
                *unet.get_submodule("input_blocks").children(), unet.get_submodule("middle_block"),
                *unet.get_submodule("output_blocks").children(),
            )
        except AttributeError:
            return False
        same_blocks = len(blocks) == len(self.blocks) and all(map(operator.is_, blocks, self.blocks))
        return same_blocks and all(site.transformer_block.attn1 is site.attention for site in self.sites)

    def block_names(self) -> list[str]:
        """The names of the blocks that hold self-attention, in order."""
        return list(dict.fromkeys(site.block_name for site in self.sites))

    def downscale(self, site: AttentionSite) -> int:
        """How many latent pixels there are to a side of one of the site's tokens: 1, 2, 4 or 8."""
        stages = {"input": site.stage, "middle": self._downsamples, "output": self._downsamples - site.stage}
        return int(2 ** stages[site.part])

    def describe(self) -> str:
        """The valid names in one line, with the transformer blocks where a block has several."""
        counts = {name: sum(site.block_name == name for site in self.sites) for name in self.block_names()}
        return ", ".join(name if count == 1 else f"{name} (.0 to .{count - 1})" for name, count in counts.items())

    def prefix(self, first: AttentionSite) -> list[nn.Module]:
        """The modules that run before ``first``, as large as possible: blocks, then layers, then transformer blocks."""
        modules = list(self.blocks[: self.blocks.index(first.block)])
        if self.runs_layers:
            modules = [layer for block in modules for layer in layers_of(block).children()]
        layers = list(first.layers.children())
        modules += layers[: layers.index(first.transformer)]
        siblings = list(first.transformer.get_submodule("transformer_blocks").children())
        return modules + siblings[: siblings.index(first.transformer_block)]

    def stand_in(self, text: str) -> tuple[AttentionSite, ...]:
        """The sites of the block that stands in for a list that nobody need have typed.

        It is the nearest one: for the decoder's beginning its first block, for the middle the last input block. None
        where the text is another one, or the model has something of it.
        """
        item = text.strip().lower()
        if item not in UNTYPED_BLOCKS or self._select(item, whole=False):
            return ()
        names = self.block_names()
        outputs = [name for name in names if name.startswith("output")]
        before = [name for name in names if name.startswith("input")]
        nearest = (outputs + before[::-1] if item.startswith("output") else before[::-1] + outputs)[0]
        return tuple(site for site in self.sites if site.block_name == nearest)

    def resolve(self, text: str) -> tuple[AttentionSite, ...]:
        """The sites that a comma-separated list of names and ranges selects, in running order, none twice.

        Raises ``BlockNameError`` for the first name that selects nothing or whose ends do not exist.
        """
        if standing_in := self.stand_in(text):
            return standing_in
        chosen: set[AttentionSite] = set()
        for item in _items(text):
            chosen.update(self._resolve_item(item))
        return tuple(site for site in self.sites if site in chosen)

    def resolve_known(self, text: str) -> tuple[AttentionSite, ...]:
        """Like ``resolve``, but leaves out what this U-Net lacks, of a range too: a refiner has fewer blocks."""
        if standing_in := self.stand_in(text):
            return standing_in
        chosen: set[AttentionSite] = set()
        for item in _items(text):
            chosen.update(self._select(item, whole=False))
        return tuple(site for site in self.sites if site in chosen)

    def unknown(self, text: str) -> list[str]:
        """The names and ranges of a list that this U-Net has nothing of."""
        return [] if self.stand_in(text) else [item for item in _items(text) if not self._select(item, whole=False)]

    def _resolve_item(self, item: str) -> list[AttentionSite]:
        found = self._select(item, whole=True)
        if not found:
            raise BlockNameError(item, self.describe(), meant=similar_names(item, self.block_names()))
        return found

    def _select(self, item: str, *, whole: bool) -> list[AttentionSite]:
        """What a name or a range selects; nothing if ``whole`` and one of a range's ends does not exist."""
        for pattern, select in self._grammar(whole):
            match = pattern.fullmatch(item.lower())
            if match is None:
                continue
            found = _select_depths(select(match.groupdict()), match["k_first"], match["k_last"], whole=whole)
            if found:
                return found
        return []

    def _grammar(
        self, whole: bool
    ) -> list[tuple[re.Pattern[str], Callable[[dict[str, Any]], list[AttentionSite]]]]:
        def by_middle(_: dict[str, Any]) -> list[AttentionSite]:
            return [site for site in self.sites if site.part == "middle"]

        def by_index(groups: dict[str, Any]) -> list[AttentionSite]:
            part = _PARTS[groups["part"]]
            indices = [site.index for site in self.sites if site.part == part]
            return self._between(part, indices, groups, whole=whole)

        def by_ordinal(groups: dict[str, Any]) -> list[AttentionSite]:
            part = _PARTS[groups["part"]]
            order = list(dict.fromkeys(site.index for site in self.sites if site.part == part))
            ordinals = [order.index(site.index) for site in self.sites if site.part == part]
            return self._between(part, ordinals, groups, whole=whole)

        def by_stage(groups: dict[str, Any]) -> list[AttentionSite]:
            stage, position = int(groups["stage"]), groups["position"]
            return [
                site for site in self.sites
                if site.part == _PARTS[groups["part"]] and site.stage == stage
                and (position is None or site.position == int(position))
            ]

        return [(_MIDDLE, by_middle), (_LDM, by_index), (_DIFFUSERS, by_stage), (_SHORT, by_ordinal)]

    def _between(
        self, part: Part, numbers: list[int], groups: dict[str, Any], *, whole: bool
    ) -> list[AttentionSite]:
        first, last = int(groups["first"]), int(groups["last"] or groups["first"])
        if whole and not {first, last} <= set(numbers):
            return []
        sites = [site for site in self.sites if site.part == part]
        return [site for site, number in zip(sites, numbers, strict=True) if first <= number <= last]


def similar_names(item: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that ``item`` may have meant: the same but for its signs, a number alone, or alike."""
    letters = re.sub(r"[\W_]", "", item.lower())
    same = [name for name in names if name.replace(".", "") == letters]
    numbered = [name for name in names if letters.isdecimal() and name.endswith(f".{int(letters[:9])}")]
    return same or numbered or difflib.get_close_matches(item.lower(), names, n=1)


def check_names(text: str) -> None:
    """Raises ``BlockNameError`` if an item of ``text`` can't be a block name of any U-Net."""
    for item in _items(text):
        if not any(pattern.fullmatch(item.lower()) for pattern in (_MIDDLE, _LDM, _DIFFUSERS, _SHORT)):
            allowed = "middle, input.N, output.N, a range such as output.3-5, or one transformer block such as middle.0"
            raise BlockNameError(item, allowed)


def _items(text: str) -> list[str]:
    """The names and ranges of a comma-separated list."""
    return [item for part in text.split(",") if (item := part.strip())]


def _select_depths(
    sites: list[AttentionSite], first: str | None, last: str | None, *, whole: bool
) -> list[AttentionSite]:
    if first is None:
        return sites
    low, high = int(first), int(last or first)
    if whole and not {low, high} <= {site.depth for site in sites}:
        return []
    return [site for site in sites if low <= site.depth <= high]


def _part_sites(part: Part, blocks: Sequence[nn.Module], *, ends_stage_with: str) -> list[AttentionSite]:
    sites: list[AttentionSite] = []
    stage = position = 0
    for index, block in enumerate(blocks):
        before, depth = len(sites), 0
        for layers, transformer in _transformers(block):
            for transformer_block in transformer.get_submodule("transformer_blocks").children():
                attention = getattr(transformer_block, "attn1", None)
                if isinstance(attention, nn.Module) and not getattr(transformer_block, "disable_self_attn", False):
                    sites.append(AttentionSite(
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
