"""AUTOMATIC1111's WebUI, 1.8 to 1.10.

Its ``CFGDenoiser.forward`` fires the CFG-denoiser callback, calls ``inner_model`` once or several times with the step's
rows in order (every sub-prompt of each image, then the unconditional ones, if they are not left out), fires the
CFG-denoised callback, combines, blends the mask in and fires the after-CFG callback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from modules import lowvram, sd_models, sd_unet, shared
from modules.hypernetworks import hypernetwork
from torch import Tensor

from sag_pag.engine.attention import KeyValueInputs, unchanged_inputs
from sag_pag.engine.blocks import Topology
from sag_pag.engine.patching import Forward, Hook, forward_replaced
from sag_pag.engine.rows import Row, StepRows, rows_in
from sag_pag.engine.spaces import SigmaSpace, Space, TimestepSpace
from sag_pag.engine.topology import topology_of
from sag_pag.hosts.family import Family, FamilyStep, is_circular
from sag_pag.hosts.interface import DenoiserCall, NoModelError, TakeCall, UnguidableModelError


class A1111(Family):
    """The WebUI's loaded model and options."""

    def topology(self, known: Topology | None = None) -> Topology:
        """As the interface says. A refiner or the hires pass may have loaded another model meanwhile."""
        model = sd_models.model_data.sd_model  # asking ``shared`` for it would load one
        if model is None:
            raise NoModelError("no model is loaded yet")
        if sd_unet.current_unet is not None:
            raise UnguidableModelError(f"the U-Net {sd_unet.current_unet.option.label} replaces the model's own")
        try:
            network = model.model.diffusion_model
            if known is not None and known.is_still(network):
                return known
            topology = topology_of(network)
        except (AttributeError, TypeError) as error:
            raise UnguidableModelError(
                f"{type(model).__name__} has no U-Net of the Stable Diffusion kind, and no joint blocks as SD3 has"
            ) from error
        if not topology.sites:
            raise UnguidableModelError(f"{type(model).__name__} has no self-attention")
        return topology

    def step(self, params: Any) -> A1111Step:
        """The step that a CFG-denoiser callback is about."""
        return A1111Step(params)

    def moves(self, hook: Hook) -> bool:
        """Those of ``--medvram`` and ``--lowvram``."""
        return bool(getattr(hook, "__module__", "") == lowvram.__name__)

    def key_value_inputs(self) -> KeyValueInputs:
        """What the loaded hypernetworks, if any, make of a self-attention's tokens."""
        loaded = shared.loaded_hypernetworks
        if not loaded:
            return unchanged_inputs
        return lambda tokens: hypernetwork.apply_hypernetworks(loaded, tokens)

    def cfg_scales_that_save_rows(self) -> tuple[str, ...]:
        """None: it computes the unconditional ones at a CFG scale of 1 too."""
        return ()

    def is_tiling(self) -> bool:
        """Whether "Tiling" has made the model's convolutions circular; a transformer has none that reach over an edge.
        """
        return is_circular(shared.sd_model.model.diffusion_model)


class A1111Step(FamilyStep):
    """One step of the WebUI's ``CFGDenoiser``."""

    @contextmanager
    def taken_by(self, take: TakeCall) -> Iterator[None]:
        """As the interface says."""
        open_still, seen = True, set[Row]()

        def make(denoise: Forward) -> Forward:
            def forward(x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
                within = vars(self.denoiser.inner_model).get("forward") is not forward
                # others may keep this beyond the step
                rows = self._rows_of(x, seen=len(seen), within=within) if open_still else ()
                if not rows or not seen.isdisjoint(rows):
                    return denoise(x, sigma, **kwargs)
                seen.update(rows)
                return take(DenoiserCall(denoise, x, sigma, kwargs["cond"], rows))

            return forward

        try:
            with forward_replaced(self.denoiser.inner_model, make):
                yield
        finally:
            open_still = False

    @property
    def path(self) -> tuple[Any, ...]:
        """The sampler's denoiser, the checkpoint's model, and what that wraps the network in."""
        return self.denoiser.inner_model, shared.sd_model, shared.sd_model.model

    def wants_own_call(self, more: int) -> bool:
        """With ``--medvram`` or ``--lowvram``, or "Batch cond/uncond" off."""
        return bool(lowvram.is_enabled(shared.sd_model)) or not shared.opts.batch_cond_uncond

    def _rows_of(self, x: Tensor, *, seen: int, within: bool) -> tuple[Row, ...]:
        """What the rows of a call are; nothing if it is not one of the step's, of which so many rows were ``seen``.

        The WebUI calls with its tensor of all rows, or with a part of it: where in it says which rows they are. An
        extension that calls this from ``within`` its own forward may hand on a copy (AnimateDiff does): the next
        rows, if it is one of a row for each picture.
        """
        every: Tensor = self.params.x
        rows = self.rows.rows
        if len(every) != len(rows) or x.shape[1:] != every.shape[1:]:
            return ()
        if x.untyped_storage().data_ptr() != every.untyped_storage().data_ptr():
            following = slice(seen, seen + self.rows.images)
            is_copy = within and len(x) == self.rows.images and torch.equal(x, every[following])
            return rows if len(x) == len(rows) else rows[following] if is_copy else ()
        first = (x.storage_offset() - every.storage_offset()) // every.stride(0)
        return rows[first : first + len(x)]

    def progress(self, sigma: Tensor) -> float:
        """On the scale of the WebUI's "Refiner: switch at".

        ``sigma`` are noise levels from k-diffusion samplers, timesteps from the others.
        """
        largest = torch.max(sigma)
        if self._alphas is None:
            largest = self.denoiser.inner_model.sigma_to_t(largest[None], quantize=True)
        return (999 - int(largest)) / 1000

    @cached_property
    def rows(self) -> StepRows:
        """Every sub-prompt of each image, InstructPix2Pix's third group, then the unconditional ones.

        Regional Prompter's latent mode sorts the conditional ones by sub-prompt, in its CFG-denoiser callback.
        """
        batch = self.denoiser.sampler.sampler_extra_args["cond"].batch
        is_edit = shared.sd_model.cond_stage_key == "edit" and self.denoiser.image_cfg_scale not in (None, 1.0)
        conds = [
            Row("cond", image, number, 1.0 if is_edit else float(prompt.weight))  # that model's CFG ignores weights
            for image, prompts in enumerate(batch) for number, prompt in enumerate(prompts)
        ]
        others = [Row("other", image) for image in range(len(batch))] if is_edit else []
        rows = StepRows((*conds, *others, *(Row("uncond", image) for image in range(len(batch)))))
        return rows_in(self.params.x, rows)

    @property
    def space(self) -> Space:
        """x0 for samplers that work with sigmas, noise for those that work with timesteps."""
        velocity = shared.sd_model.parameterization == "v"
        if self._alphas is None:
            return SigmaSpace(velocity=velocity)
        return TimestepSpace(self._alphas, velocity=velocity)

    @property
    def factor(self) -> float:
        """``DDIM CFG++`` divides CFG's scale; versions before 1.10 do not have it."""
        return float(getattr(self.denoiser, "cond_scale_miltiplier", 1.0))

    @property
    def _alphas(self) -> Tensor | None:
        """The alphas by timestep of a sampler that works with timesteps, ``None`` for one that works with sigmas."""
        return getattr(self.denoiser, "alphas", None)
