"""What guidance needs to know of the WebUI that it runs in, and where that WebUI calls its model: a host is one file
that answers these.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sag_pag.engine.attention import KeyValueInputs
from sag_pag.engine.blocks import Topology
from sag_pag.engine.calls import Denoiser
from sag_pag.engine.patching import Hook
from sag_pag.engine.plan import HiresPass
from sag_pag.engine.rows import Row, StepRows
from sag_pag.engine.spaces import Space
from sag_pag.guidance import Blend


class UnguidableModelError(Exception):
    """The loaded model, or what it is used for, can't be guided; the message says why."""


class NoModelError(UnguidableModelError):
    """No model is loaded."""


@dataclass(frozen=True)
class DenoiserCall:
    """One of a step's denoiser calls: what the host hands over, and what its rows are."""

    denoise: Denoiser
    x: Tensor
    sigma: Tensor
    cond: Any
    rows: tuple[Row, ...]


TakeCall = Callable[[DenoiserCall], Tensor]
"""Makes a call in the host's stead and gives what the host is to get."""


class Step(Protocol):
    """One step of a sampler, from the CFG-denoiser callback to the after-CFG callback."""

    def taken_by(self, take: TakeCall) -> AbstractContextManager[None]:
        """While open, the step's denoiser calls go through ``take``; calls that are not the step's do not."""

    def wants_own_call(self, more: int) -> bool:
        """Whether ``more`` rows should not make the step's calls larger, but make a call of their own."""

    @property
    def path(self) -> tuple[Any, ...]:
        """The objects that a denoiser call goes through on its way to the network, which is not among them."""

    def is_of(self, inner_model: Any) -> bool:
        """Whether a CFG-denoised callback with this model is this step's."""

    def progress(self, sigma: Tensor) -> float:
        """How far from noise (0) to picture (1) the step is: ``(999 - timestep) / 1000``.

        ``sigma`` is what the step's denoiser calls get, ``(rows,)``.
        """

    @property
    def number(self) -> int:
        """How many of the sampler's steps in this pass went before. All of its denoiser's calls are one step: with some
        samplers only what the last of them predicts is taken as the step.
        """

    @property
    def rows(self) -> StepRows:
        """What the rows of the step's denoiser calls are, all together.

        Raises ``UnguidableModelError`` where they can't be told.
        """

    @property
    def space(self) -> Space:
        """The space that the sampler's denoiser predicts in."""

    @property
    def factor(self) -> float:
        """What the sampler multiplies CFG's scale with, and so ours."""

    @property
    def weight(self) -> Tensor | None:
        """Where guidance may change the step's result: the mask, if what is protected has been put back already."""

    def was_blended(self, told: Any) -> None:
        """The host has put back what is protected and ``told`` scripts so, of which any may do it in its own way."""

    @property
    def blend(self) -> Blend | None:
        """How one has, if one has."""


class Host(Protocol):
    """A WebUI: its loaded model, its options, and its sampler's steps."""

    def topology(self, known: Topology | None = None) -> Topology:
        """The self-attentions of the model that runs now, ``known`` itself if it is still that one's.

        Raises ``UnguidableModelError``, of which ``NoModelError`` where none is loaded; never loads one.
        """

    def checkpoint(self) -> str:
        """The loaded checkpoint's name."""

    def generations(self) -> tuple[type, ...]:
        """The classes of the processing objects, whose ``sample`` makes a batch."""

    def step(self, params: Any) -> Step:
        """The step that a CFG-denoiser callback with ``params`` is about."""

    def cfg_scales_that_save_rows(self) -> tuple[str, ...]:
        """Those of ``cfg_scale`` and ``hr_cfg`` that there are and that leave the unconditional rows out where 1."""

    def moves(self, hook: Hook) -> bool:
        """Whether all that a module's forward pre-hook does is to move the module to the GPU."""

    def key_value_inputs(self) -> KeyValueInputs:
        """What the loaded hypernetworks, if any, make of a self-attention's tokens before ``to_k`` and ``to_v``."""

    def is_tiling(self) -> bool:
        """Whether the picture's opposite edges are to meet."""

    def hires_pass(self, p: Any) -> HiresPass | None:
        """The pass of hires. fix that ``p`` is in, ``None`` without hires. fix."""

    def has_other_model(self, p: Any, hires: HiresPass | None, *, start: float) -> bool:
        """Whether another model than the loaded one may run what is in this pass, from the progress ``start`` on."""

    def tell_page(self, failure: Exception) -> None:
        """A generation is about to fail: sees that the page says why, where the host would lose that on the way."""

    def disregarded_fields(self) -> set[str]:
        """The infotext fields that the user's options say to leave alone when a text is pasted."""
