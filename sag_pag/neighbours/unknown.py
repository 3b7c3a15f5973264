"""Extensions that nobody here knows: found by what they have changed in the model."""

from __future__ import annotations

from sag_pag.engine.blocks import Topology
from sag_pag.engine.calls import Manner
from sag_pag.engine.patching import is_replaced
from sag_pag.neighbours.randomness import SameRandomness

REPEATED = Manner(perturbed="repeated", degraded="repeated", watch=SameRandomness)
"""The host's own rows and no others, in every call."""

_LAYERS = {
    "Conv2d", "Linear", "ResBlock", "SpatialTransformer", "SpatialVideoTransformer", "AttentionBlock", "Downsample",
    "Upsample", "JointBlock",
}
_METHODS = ("forward", "_forward")


class Layers:
    """A network's modules, and whether another extension is in them that may treat the rows of a call differently.

    ControlNet keeps references and features for each row of the first call, its IP-Adapter and Regional Prompter split
    the batch by what the rows are, AnimateDiff's layers mix rows. Such a network must get the host's rows and no
    others. Replacements of self-attentions alone (HyperTile) work on any rows.
    """

    def __init__(self, topology: Topology) -> None:
        attentions = {site.attention for site in topology.sites}
        self._modules = [(module, vars(module)) for module in topology.network.modules() if module not in attentions]
        self._foreign = any(type(layer).__name__ not in _LAYERS for layer in topology.layers())

    def tell_rows_apart(self) -> bool:
        """Looks at every module's own attributes, which takes a tenth of a millisecond."""
        return self._foreign or any(
            name in own and is_replaced(module, name) for module, own in self._modules for name in _METHODS
        )
