"""Self-attentions that can be chosen in a denoising network, by the names of its blocks: what every family shares.

A family (the U-Net, the transformer of joint blocks) says which attentions it has, what they are called, and what it
can't do.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from sag_pag.engine.perturbations import Perturbation, Where
from sag_pag.settings import UNTYPED_BLOCKS, Value

Part = Literal["input", "middle", "output", "joint"]

NUMBER = r"\d{1,4}"
"""Of a block, as a pattern."""


class BlockNameError(ValueError):
    """A block name that the network does not have.

    ``unknown`` is the name, ``allowed`` lists the valid ones, ``meant`` are those that may have been meant.
    """

    def __init__(self, unknown: str, allowed: str, *, meant: Sequence[str] = ()) -> None:
        self.unknown = unknown
        self.allowed = allowed
        self.meant = tuple(meant)
        super().__init__(f"no self-attention block {unknown!r}; allowed: {allowed}")


@dataclass(frozen=True, eq=False)
class AttentionSite(ABC):
    """One self-attention: where it is, and the modules around it."""

    part: Part
    index: int  # of the block in its part
    block: nn.Module  # the entry of the network's list of blocks
    attention: nn.Module  # holds heads and projections

    @property
    def block_name(self) -> str:
        """The block's, such as ``input.N``; there is one ``middle``."""
        return self.part if self.part == "middle" else f"{self.part}.{self.index}"

    @property
    @abstractmethod
    def name(self) -> str:
        """Its own: the block's where a block has one only."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Attention heads."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of each token."""

    @property
    @abstractmethod
    def sized_by(self) -> tuple[nn.Module, int]:
        """The module whose first input is the feature map, and how many of that map's places a token's side has."""

    @abstractmethod
    def module_at(self, where: Where) -> nn.Module:
        """The module whose call makes the attention, or that of the block around it."""

    @abstractmethod
    def tokens(self, *args: Any, **kwargs: Any) -> Any:
        """What a perturbation works on, from what a call of one of these modules gets."""


@dataclass(frozen=True)
class Half:
    """A stretch of the blocks, in running order, with a caption; the map puts it on this ``side``."""

    part: Part
    side: Literal["left", "right"]
    first: int
    last: int


class Topology(ABC):
    """The self-attentions of one network in the order in which they run."""

    network: nn.Module
    blocks: tuple[nn.Module, ...]
    sites: tuple[AttentionSite, ...]
    perturbations: ClassVar[Mapping[str, Perturbation]]
    """What perturbed rows can do in this family."""
    chained: ClassVar[bool] = False
    """Whether each module of a prefix puts out what it gets in the same form, for the next one alone."""

    @abstractmethod
    def is_still(self, network: nn.Module) -> bool:
        """Whether this is the topology of ``network``, and nobody has changed its blocks meanwhile."""

    @abstractmethod
    def downscale(self, site: AttentionSite) -> int:
        """How many latent pixels there are to a side of one of the site's tokens."""

    @abstractmethod
    def describe(self) -> str:
        """The valid names in one line."""

    @abstractmethod
    def prefix(self, first: AttentionSite) -> list[nn.Module]:
        """The modules that run before ``first``, as large as possible."""

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """What its blocks are made of, as large as possible."""

    @abstractmethod
    def levels(self) -> list[int]:
        """How often the latent has been halved, for each block."""

    @abstractmethod
    def labels(self) -> list[str]:
        """What the map calls each block."""

    @abstractmethod
    def halves(self) -> list[Half]:
        """The stretches that have a caption on the map."""

    @abstractmethod
    def _select(self, item: str, *, whole: bool) -> list[AttentionSite]:
        """What a name or a range selects; nothing if ``whole`` and one of a range's ends does not exist."""

    @abstractmethod
    def _nearest(self, item: str) -> str:
        """The block that comes nearest to ``item``, a list that nobody need have typed."""

    def refuses(self, name: str, value: Value) -> str | None:
        """Why this family can't do what the parameter asks for with this value; ``None`` if it can."""
        return None

    def block_names(self) -> list[str]:
        """The names of the blocks that hold self-attention, in order."""
        return list(dict.fromkeys(site.block_name for site in self.sites))

    def stand_in(self, text: str) -> tuple[AttentionSite, ...]:
        """The sites of the block that stands in for a list that nobody need have typed.

        None where the text is another one, or the model has something of it.
        """
        item = text.strip().lower()
        if item not in UNTYPED_BLOCKS or self._select(item, whole=False):
            return ()
        nearest = self._nearest(item)
        return tuple(site for site in self.sites if site.block_name == nearest)

    def resolve(self, text: str) -> tuple[AttentionSite, ...]:
        """The sites that a comma-separated list of names and ranges selects, in running order, none twice.

        Raises ``BlockNameError`` for the first name that selects nothing or whose ends do not exist.
        """
        if standing_in := self.stand_in(text):
            return standing_in
        chosen: set[AttentionSite] = set()
        for item in items(text):
            chosen.update(self._resolve_item(item))
        return tuple(site for site in self.sites if site in chosen)

    def resolve_known(self, text: str) -> tuple[AttentionSite, ...]:
        """Like ``resolve``, but leaves out what this network lacks, of a range too: a refiner has fewer blocks."""
        if standing_in := self.stand_in(text):
            return standing_in
        chosen: set[AttentionSite] = set()
        for item in items(text):
            chosen.update(self._select(item, whole=False))
        return tuple(site for site in self.sites if site in chosen)

    def unknown(self, text: str) -> list[str]:
        """The names and ranges of a list that this network has nothing of."""
        return [] if self.stand_in(text) else [item for item in items(text) if not self._select(item, whole=False)]

    def _resolve_item(self, item: str) -> list[AttentionSite]:
        found = self._select(item, whole=True)
        if not found:
            raise BlockNameError(item, self.describe(), meant=similar_names(item, self.block_names()))
        return found


Site = TypeVar("Site", bound=AttentionSite)


def between(
    sites: Sequence[Site], numbers: Sequence[int], first: str, last: str | None, *, whole: bool
) -> list[Site]:
    """Those of ``sites`` whose number is in a range; none if ``whole`` and one of its ends is nobody's."""
    low, high = int(first), int(last or first)
    if whole and not {low, high} <= set(numbers):
        return []
    return [site for site, number in zip(sites, numbers, strict=True) if low <= number <= high]


def similar_names(item: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that ``item`` may have meant.

    The same but for its signs, those with a number that stands alone, the nearest of its part, or one that looks alike.
    """
    letters = re.sub(r"[\W_]", "", item.lower())
    same = [name for name in names if name.replace(".", "") == letters]
    numbered = [name for name in names if letters.isdecimal() and name.endswith(f".{int(letters[:9])}")]
    return same or numbered or _nearest_of_part(item, names) or difflib.get_close_matches(item.lower(), names, n=1)


def _nearest_of_part(item: str, names: Sequence[str]) -> list[str]:
    """The block or range of the same part whose numbers are nearest; none if ``item`` is none, or the part has none."""
    found = re.fullmatch(rf"([a-z]+)\.({NUMBER})(?:-({NUMBER}))?", item.lower())
    numbers = [int(name[len(found[1]) + 1 :]) for name in names if name.startswith(f"{found[1]}.")] if found else []
    if not found or not numbers:
        return []

    def nearest(end: str) -> int:
        return min(numbers, key=lambda number: abs(number - int(end)))

    first, last = sorted((nearest(found[2]), nearest(found[3] or found[2])))
    return [f"{found[1]}.{first}" if first == last else f"{found[1]}.{first}-{last}"]


def items(text: str) -> list[str]:
    """The names and ranges of a comma-separated list."""
    return [item for part in text.split(",") if (item := part.strip())]
