"""What guidance costs on a transformer of joint blocks (SD3)."""

from __future__ import annotations

from torch import nn

from sag_pag.engine.blocks import AttentionSite
from sag_pag.engine.joint import TEXT_TOKENS, JointTopology, map_products
from sag_pag.engine.model_cost import ModelCost, Size
from sag_pag.engine.operations import convolution_operations, linear_operations


class JointCost(ModelCost):
    """Operations of one row for latents of ``latent_size`` (height, width) and a prompt of ``TEXT_TOKENS``."""

    def __init__(self, topology: JointTopology, latent_size: Size) -> None:
        network = topology.network
        self.topology = topology
        self.map_sizes = {site: (latent_size[0] // site.patch, latent_size[1] // site.patch) for site in topology.sites}
        size = next(iter(self.map_sizes.values()))
        places = size[0] * size[1]
        self._operations = {
            site.block: _half(site.block.get_submodule("context_block"), TEXT_TOKENS)
            + _half(site.block.get_submodule("x_block"), places) + map_products(site.block, size)
            for site in topology.sites
        }
        around = convolution_operations(network.get_submodule("x_embedder"), size)
        around += linear_operations(network.get_submodule("context_embedder"), TEXT_TOKENS)
        around += _half(network.get_submodule("final_layer"), places)
        around += sum(
            linear_operations(embedder, 1)
            for name in ("t_embedder", "y_embedder") if (embedder := getattr(network, name, None)) is not None
        )
        self.row = around + sum(self._operations.values())

    def reading(self, site: AttentionSite) -> int:
        """Raises ``NotImplementedError``: there is no SAG here, and no map to read."""
        raise NotImplementedError

    def _attention(self, site: AttentionSite) -> int:
        return map_products(site.block, self.map_sizes[site])


def _half(module: nn.Module, tokens: int) -> int:
    """The Linear layers of a module on so many tokens, those of its modulation on one."""
    modulation = module.get_submodule("adaLN_modulation")
    return linear_operations(module, tokens) - linear_operations(modulation, tokens - 1)
