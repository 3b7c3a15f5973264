"""What guidance costs on a model, whatever its family, counted from the shapes of its layers: nothing is run.

Operations are floating-point operations of matrix products, convolutions and attention, a multiply-add being two, as
``torch.utils.flop_counter`` counts them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from sag_pag.engine.blocks import AttentionSite, Topology
from sag_pag.engine.plan import StepPlan
from sag_pag.settings import Settings

DEFAULTS = Settings()

Size = tuple[int, int]


class ModelCost(ABC):
    """Operations of one row of a network's call at one size of latents."""

    topology: Topology
    row: int
    """A whole row."""
    map_sizes: dict[AttentionSite, Size]
    """Height and width of the map that each attention's tokens lie in."""
    _operations: dict[nn.Module, int]
    """Of the modules that a topology's prefix may hold."""

    @abstractmethod
    def reading(self, site: AttentionSite) -> int:
        """Reading one row's attention map beside the host's own attention."""

    @abstractmethod
    def _attention(self, site: AttentionSite) -> int:
        """The part of a whole row's attention that a perturbation's own operations stand in for."""

    def perturbed_row(self, perturbed: tuple[AttentionSite, ...], settings: Settings) -> int:
        """An extra row with these sites perturbed: what it shares with its original is not in it."""
        shared = sum(self._operations[module] for module in self.topology.prefix(perturbed[0]))
        perturbation = self.topology.perturbations[settings.pag_perturbation]
        saved = sum(
            self._attention(site)
            - perturbation.operations(site.module_at("attention"), self.map_sizes[site], settings)
            for site in perturbed
        )
        return self.row - shared - saved

    def perturbing_alone(self, sites: tuple[AttentionSite, ...], settings: Settings = DEFAULTS) -> float:
        """A step with CFG and PAG at these sites, over the step without PAG."""
        return 1 + self.perturbed_row(sites, settings) / (2 * self.row)

    def reading_alone(self, site: AttentionSite) -> float:
        """A step with CFG and SAG that reads this site, over the step without SAG."""
        return 1 + (self.row + self.reading(site)) / (2 * self.row)

    def step(self, plan: StepPlan | None, *, rows: int) -> float:
        """A step's operations over those of the same step without guidance; ``rows`` a picture: 2 with CFG, else 1."""
        extra = 0
        if plan is not None and plan.pag_scale:
            extra += self.perturbed_row(plan.perturbed, plan.settings)
        if plan is not None and plan.sag_scale and plan.read is not None:
            extra += self.row + self.reading(plan.read)
        return 1 + extra / (rows * self.row)
