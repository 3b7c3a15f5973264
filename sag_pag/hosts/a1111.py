"""What the guidance needs to know of the WebUI's loaded model, sampler and options."""

from __future__ import annotations

from typing import Any

import torch
from modules import lowvram, sd_models, sd_unet, shared
from modules.hypernetworks import hypernetwork
from torch import Tensor

from sag_pag.engine.attention import KeyValueInputs, unchanged_inputs
from sag_pag.engine.session import HiresPass, RowLayout, SigmaSpace, Space, TimestepSpace
from sag_pag.engine.topology import Topology
from sag_pag.webui import texts


class UnguidableModelError(Exception):
    """The loaded model has no U-Net whose self-attention can be reached; the message says why."""


def loaded_topology() -> Topology:
    """The loaded model's self-attentions. Raises ``UnguidableModelError``."""
    if sd_unet.current_unet is not None:
        raise UnguidableModelError(f"the U-Net {sd_unet.current_unet.option.label} replaces the model's own")
    model = shared.sd_model
    try:
        topology = Topology(model.model.diffusion_model)
    except (AttributeError, TypeError) as error:
        raise UnguidableModelError(f"{type(model).__name__} has no U-Net of the Stable Diffusion kind") from error
    if not topology.sites:
        raise UnguidableModelError(f"{type(model).__name__} has no self-attention")
    return topology


def model_in_memory() -> Topology | str:
    """The loaded model's self-attentions, or why there are none. Never loads a model, so the panel may ask."""
    if sd_models.model_data.sd_model is None:
        return texts.NO_MODEL
    try:
        return loaded_topology()
    except UnguidableModelError as error:
        return str(error)


def progress(denoiser: Any, sigma: Tensor) -> float:
    """How far from noise (0) to picture (1) the step is, on the scale of the WebUI's "Refiner: switch at".

    ``sigma`` is what the denoiser got: noise levels from k-diffusion samplers, timesteps from the others.
    """
    largest = torch.max(sigma)
    if _alphas(denoiser) is None:
        largest = denoiser.inner_model.sigma_to_t(largest[None], quantize=True)
    return (999 - int(largest)) / 1000


def space(denoiser: Any) -> Space:
    """The space that the sampler's denoiser predicts in."""
    alphas = _alphas(denoiser)
    return SigmaSpace() if alphas is None else TimestepSpace(alphas)


def _alphas(denoiser: Any) -> Tensor | None:
    """The alphas by timestep of a sampler that works with timesteps, ``None`` for one that works with sigmas."""
    return getattr(denoiser, "alphas", None)


def row_layout(denoiser: Any) -> RowLayout:
    """The rows of the step's U-Net calls: every sub-prompt of each image, then the unconditional ones."""
    batch = denoiser.sampler.sampler_extra_args["cond"].batch
    conds = tuple((image, float(prompt.weight)) for image, prompts in enumerate(batch) for prompt in prompts)
    is_edit = shared.sd_model.cond_stage_key == "edit" and denoiser.image_cfg_scale not in (None, 1.0)
    return RowLayout(conds=conds, images=len(batch), middle_rows=len(batch) if is_edit else 0)


def wants_own_call() -> bool:
    """Whether memory is short, so that extra rows should not make a U-Net call larger."""
    return bool(lowvram.is_enabled(shared.sd_model)) or not shared.opts.batch_cond_uncond


def disregarded_fields() -> set[str]:
    """The infotext fields that the user's options say to leave alone when a text is pasted."""
    return set(getattr(shared.opts, "infotext_skip_pasting", ()))  # WebUI 1.7 does not have it


def key_value_inputs() -> KeyValueInputs:
    """What the loaded hypernetworks, if any, make of a self-attention's tokens before ``to_k`` and ``to_v``."""
    loaded = shared.loaded_hypernetworks
    if not loaded:
        return unchanged_inputs
    return lambda tokens: hypernetwork.apply_hypernetworks(loaded, tokens)


def hires_pass(p: Any) -> HiresPass | None:
    """The pass of hires. fix that ``p`` is in, ``None`` without hires. fix."""
    if not getattr(p, "enable_hr", False):
        return None
    return "hires pass" if p.is_hr_pass else "first pass"


def inpainting_weight(denoiser: Any) -> Tensor | None:
    """Where guidance may change the step's result: the mask, if the sampler blends after denoising, else everywhere.

    Samplers that work with timesteps put the protected area back before the next step instead.
    """
    if denoiser.mask is None or denoiser.mask_before_denoising:
        return None
    weight: Tensor = denoiser.nmask
    return weight
