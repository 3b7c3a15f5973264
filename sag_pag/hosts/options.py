"""The transformer options of one model call in the forks, and what they say of its rows.

A fork hands one dict down through the U-Net's layers: other extensions read there which chunks of the batch are
conditional, and the U-Net writes there where it is. Calls of other rows than the host's need one of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

COND, UNCOND = 0, 1
"""What forks call the two kinds of chunks."""


@dataclass(frozen=True)
class CallRows:
    """What the rows of a call are: the kind of each row, ``images`` rows being a chunk; one of the host's own dicts,
    which the call's is made from; and how many transformers there are before each block.
    """

    given: Mapping[str, Any]
    kinds: tuple[int, ...]
    images: int
    before: Mapping[Any, int] = field(default_factory=dict)

    @property
    def chunks(self) -> list[int]:
        """The kind of each chunk. Raises ``RuntimeError`` if the rows are not whole chunks."""
        chunks = list(self.kinds[:: self.images])
        if [kind for kind in chunks for _ in range(self.images)] != list(self.kinds):
            raise RuntimeError(f"the rows of a call, {self.kinds}, are not whole batches of {self.images} pictures")
        return chunks

    def take_rows(self, rows: Sequence[int], *, total: int) -> CallRows:
        """As ``ByRow`` says."""
        if len(self.kinds) != total:
            return self
        return replace(self, kinds=tuple(self.kinds[row] for row in rows))

    def told(self) -> dict[str, Any]:
        """What the options say of the rows. A fork's own are rewritten, none are added."""
        said: dict[str, Any] = {
            "cond_or_uncond": self.chunks,
            "cond_indices": [row for row, kind in enumerate(self.kinds) if kind == COND],
            "uncond_indices": [row for row, kind in enumerate(self.kinds) if kind == UNCOND],
        }
        if "cond_mark" in self.given:
            said["cond_mark"] = torch.tensor(self.kinds, dtype=torch.float32).to(self.given["cond_mark"])
        if "uuids" in self.given:
            host = dict(zip(self.given["cond_or_uncond"], self.given["uuids"], strict=True))
            said["uuids"] = [host.get(kind) for kind in self.chunks]
        return {key: value for key, value in said.items() if key in self.given}


def transformers_before(unet: nn.Module) -> dict[Any, int]:
    """By part and number of a block, as the U-Net tells its layers where they are."""
    blocks = [
        *((("input", number), block) for number, block in enumerate(unet.get_submodule("input_blocks").children())),
        (("middle", 0), unet.get_submodule("middle_block")),
        *((("output", number), block) for number, block in enumerate(unet.get_submodule("output_blocks").children())),
    ]
    before, count = dict[Any, int](), 0
    for place, block in blocks:
        before[place] = count
        count += sum(hasattr(layer, "transformer_blocks") for layer in block.children())
    return before


class LayerOptions(dict[str, Any]):
    """The options as the layers get them. For some of the rows there are others, and what is written there, such as
    ``transformer_index``, is written here too. Blocks that do not run in a call, because what they put out is known,
    do not count their transformers: so that is counted anew at each block.
    """

    def __init__(
        self, rows: CallRows, *, now: Mapping[str, Any] | None = None, whole: LayerOptions | None = None
    ) -> None:
        super().__init__(rows.given if now is None else now)
        super().update(rows.told())
        self.rows = rows
        self.whole = whole

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "block" and value in self.rows.before:
            super().__setitem__("transformer_index", self.rows.before[value])
        if self.whole is not None:
            self.whole[key] = value

    def take_rows(self, rows: Sequence[int], *, total: int) -> LayerOptions:
        """As ``ByRow`` says."""
        if len(self.rows.kinds) != total:
            return self
        return LayerOptions(self.rows.take_rows(rows, total=total), now=self, whole=self)
