"""Self-attentions that an extension of a fork has replaced through ``patches_replace``, as forwards of their modules.

A block that finds a replacement calls ``to_q``, ``to_k``, ``to_v``, the replacement and ``to_out``, and never its
attention. Put around the attention's forward instead, the replacement does the same for the rows that it is given, and
whoever wraps that forward need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from sag_pag.engine.patching import Forward, forward_replaced
from sag_pag.engine.topology import UNetSite, UNetTopology
from sag_pag.hosts.options import LayerOptions

Replacement = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
"""From queries, keys, values and options what ``to_out`` gets."""

_NOT_TOLD = ("patches", "patches_replace")
"""Of the options, what a block does not hand on to a replacement."""


def without_replaced_attentions(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without replacements of self-attentions."""
    kept = {kind: found for kind, found in options["patches_replace"].items() if kind != "attn1"}
    return {**options, "patches_replace": kept}


@contextmanager
def replacements_as_forwards(
    topology: UNetTopology, replacements: Mapping[Any, Replacement], options: Callable[[], LayerOptions],
) -> Iterator[None]:
    """While open, the attentions' forwards do what the block would have done with their replacements.

    ``replacements`` are by part and number, and by that and the transformer block's; ``options`` are those of the model
    call under way.
    """
    with ExitStack() as stack:
        for site in topology.sites:
            place = (site.part, site.index)
            found = replacements.get((*place, site.depth)) or replacements.get(place)
            if found is not None:
                stack.enter_context(forward_replaced(site.attention, partial(_forward, site, found, options)))
        yield


def _forward(site: UNetSite, replacement: Replacement, options: Callable[[], LayerOptions], _: Forward) -> Forward:
    attention: Any = site.attention
    block: Any = site.transformer_block

    def forward(x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **__: Any) -> Any:
        given = options()
        own = given.take_rows(range(len(x)), total=len(given.rows.kinds))  # the others of a call are left out
        said = {key: told for key, told in own.items() if key not in _NOT_TOLD}
        said |= {
            "block": (site.part, site.index), "block_index": site.depth, "n_heads": block.n_heads,
            "dim_head": block.d_head,
        }
        if hasattr(block, "attn_precision"):  # in reForge
            said["attn_precision"] = block.attn_precision
        context = x if context is None else context
        value = context if value is None else value
        out = replacement(attention.to_q(x), attention.to_k(context), attention.to_v(value), said)
        return attention.to_out(out)

    return forward
