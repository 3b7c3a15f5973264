"""What AUTOMATIC1111's WebUI and its forks have in common: generations, passes, options, a step's facts."""

from __future__ import annotations

from typing import Any

import torch
from modules import processing, shared
from torch import Tensor, nn

from sag_pag.engine.plan import HiresPass
from sag_pag.guidance import Blend


def is_circular(network: nn.Module) -> bool:
    """Whether "Tiling" has made a network's convolutions circular; a transformer has none that reach over an edge."""
    out = getattr(network, "out", None)
    return out is not None and any(getattr(layer, "padding_mode", "") == "circular" for layer in out.modules())


class Family:
    """The part of ``Host`` that is the same in all of them."""

    def checkpoint(self) -> str:
        """The loaded checkpoint's name."""
        name: str = shared.sd_model.sd_checkpoint_info.name_for_extra
        return name

    def generations(self) -> tuple[type, ...]:
        """Those of txt2img and img2img."""
        return processing.StableDiffusionProcessingTxt2Img, processing.StableDiffusionProcessingImg2Img

    def hires_pass(self, p: Any) -> HiresPass | None:
        """The pass of hires. fix that ``p`` is in, ``None`` without hires. fix."""
        if not getattr(p, "enable_hr", False):
            return None
        return "hires pass" if p.is_hr_pass else "first pass"

    def has_other_model(self, p: Any, hires: HiresPass | None, *, start: float) -> bool:
        """Whether the hires pass's own checkpoint, or the refiner, may run it."""
        if hires == "hires pass" and getattr(p, "hr_checkpoint_info", None) is not None:
            return True
        switch_at = getattr(p, "refiner_switch_at", None)
        return getattr(p, "refiner_checkpoint_info", None) is not None and switch_at is not None and start >= switch_at

    def tell_page(self, failure: Exception) -> None:
        """The host tells by itself what a generation raises."""

    def disregarded_fields(self) -> set[str]:
        """The infotext fields that the user's options say to leave alone when a text is pasted."""
        return set(shared.opts.infotext_skip_pasting)


class FamilyStep:
    """The part of ``Step`` that is the same in all of them: what their ``CFGDenoiser`` says itself."""

    def __init__(self, params: Any) -> None:
        self.params = params
        self.denoiser = params.denoiser
        self._blended: Any = None
        """What the host has told scripts of its blend."""

    def is_of(self, inner_model: Any) -> bool:
        """Whether a CFG-denoised callback with this model is this step's."""
        return self.denoiser.inner_model is inner_model

    @property
    def number(self) -> int:
        """As the interface says. Samplers that the host calls second-order call the denoiser twice a step, but for the
        last.
        """
        config = getattr(self.denoiser.sampler, "config", None)
        calls = 2 if config is not None and config.options.get("second_order") else 1
        return int(self.denoiser.step) // calls

    @property
    def weight(self) -> Tensor | None:
        """The mask, if the sampler blends after denoising; others put the protected area back before the next step."""
        if self.denoiser.mask is None or self.denoiser.mask_before_denoising:
            return None
        weight: Tensor = self.denoiser.nmask
        return weight

    def was_blended(self, told: Any) -> None:
        """As the interface says. What is told at the end of sampling, and for a blend of ours, is not this step's."""
        if self._blended is None and told.denoiser is self.denoiser:
            self._blended = told

    @property
    def blend(self) -> Blend | None:
        """As the interface says: soft inpainting does, by the noise level."""
        told = self._blended
        if told is None or torch.equal(told.blended_latent, self._by_mask(told.current_latent)):
            return None
        return Blend(told.current_latent, told.blended_latent, self._blend_again)

    def _by_mask(self, latent: Tensor) -> Tensor:
        told = self._blended
        blended: Tensor = latent * told.nmask + told.init_latent * told.mask
        return blended

    def _blend_again(self, latent: Tensor) -> Tensor:
        """As the host's ``CFGDenoiser`` blends, with all that scripts do there."""
        told, p = self._blended, self.denoiser.p
        again = type(told)(
            latent, told.nmask, told.init_latent, told.mask, self._by_mask(latent), denoiser=told.denoiser,
            sigma=told.sigma,
        )
        p.scripts.on_mask_blend(p, again)
        blended: Tensor = again.blended_latent
        return blended
