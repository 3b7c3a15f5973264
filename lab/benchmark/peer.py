"""diffusers' pipelines on the weights of an ``ldm``-layout U-Net. Imports diffusers only when asked for it."""

from __future__ import annotations

import importlib
import logging
from typing import Any, Literal

from sag_pag.demo.unet import UNetKwargs, UNetModel

Kind = Literal["CFG", "PAG", "SAG"]


def _diffusers() -> Any:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return importlib.import_module("diffusers")


def diffusers_unet(unet: UNetModel, config: UNetKwargs) -> Any:
    """diffusers' U-Net with the same weights, converted by diffusers and loaded strictly.

    A vector condition must be SDXL's: a context of 1280 or 2048, and six sinusoids of 256. Raises ``ImportError``
    without diffusers.
    """
    diffusers = _diffusers()
    convert = importlib.import_module("diffusers.pipelines.stable_diffusion.convert_from_ckpt")
    vae = {"params": {"ddconfig": {"ch_mult": (1, 2, 4, 4)}}}
    params = {"unet_config": {"params": {"transformer_depth": 1, **config}}, "first_stage_config": vae}
    made = convert.create_unet_diffusers_config({"model": {"params": params}}, image_size=512)
    theirs = diffusers.UNet2DConditionModel(**made)
    weights = dict(unet.state_dict())  # its own dict: conversion takes entries out
    theirs.load_state_dict(convert.convert_ldm_unet_checkpoint(weights, made, skip_extract_state_dict=True))
    first = next(unet.parameters())
    return theirs.eval().requires_grad_(False).to(device=first.device, dtype=first.dtype)


def diffusers_pipeline(kind: Kind, unet: Any, **options: Any) -> Any:
    """diffusers' pipeline around its U-Net, without text encoders and VAE, with DDIM on Stable Diffusion's betas.

    Raises ``ImportError`` without diffusers, ``LookupError`` if it has no such pipeline for this layout.
    """
    diffusers = _diffusers()
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, **options}
    parts["scheduler"] = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )
    family = "StableDiffusion"
    if unet.config.addition_embed_type == "text_time":
        family += "XL"
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if (family, kind) == ("StableDiffusionXL", "SAG"):
        raise LookupError("diffusers has no SAG for SDXL")
    pipe = getattr(diffusers, f"{family}{'' if kind == 'CFG' else kind}Pipeline")(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
