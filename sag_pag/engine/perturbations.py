"""What a perturbed row does in a chosen self-attention, by name: a new way is one function and one entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sag_pag.engine.attention import KeyValueInputs
from sag_pag.engine.operations import linear_operations

Size = tuple[int, int]
"""Height and width of a feature map."""


@dataclass(frozen=True)
class Perturbation:
    """``run`` makes of an attention and its tokens ``(rows, tokens, channels)``, which lie in a feature map of the
    given size, the tokens that the attention puts out for perturbed rows. ``operations`` is what that costs a row.
    """

    run: Callable[[nn.Module, Tensor, Size, KeyValueInputs], Tensor]
    operations: Callable[[nn.Module, int], int]


def identity_attention(attention: nn.Module, tokens: Tensor, _: Size, inputs: KeyValueInputs) -> Tensor:
    """The identity as the attention map, ``to_out(to_v(tokens))`` (PAG, arXiv 2403.17377)."""
    value: Tensor = attention.get_submodule("to_v")(inputs(tokens)[1])
    result: Tensor = attention.get_submodule("to_out")(value)
    return result


def _identity_operations(attention: nn.Module, tokens: int) -> int:
    return sum(linear_operations(attention.get_submodule(name), tokens) for name in ("to_v", "to_out"))


IDENTITY = "identity"
PERTURBATIONS: Mapping[str, Perturbation] = {
    IDENTITY: Perturbation(identity_attention, _identity_operations),
}
