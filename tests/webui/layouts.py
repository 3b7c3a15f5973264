"""The model layouts of the tiny checkpoints, as the configuration files the WebUI reads beside a checkpoint.

Block structure and numbering are the real ones; only widths and depths are small. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]

CLIP_WIDTH = 64
"""Width of the tiny CLIP text encoder; its config and tokenizer lie in a folder beside the checkpoints."""

OPEN_CLIP_ARCH = "ViT-S-32-alt"
"""The smallest text tower that open_clip knows by name; the WebUI can only build named ones."""
OPEN_CLIP_WIDTH = 256

MODEL_CHANNELS = 32
"""The least that a 32-group normalisation allows: every channel of the first level is a group of its own."""

SCALE_FACTOR = 2.0**-20
"""The factor between the autoencoder's latent and the U-Net's, far below the usual 0.18215.

The WebUI draws the latent of an init image from the autoencoder's posterior with an unseeded generator, and the
posterior's deviation cannot go below exp(-15). Next to a latent of a million it is rounded away: the same img2img
request gives the same picture to the bit.
"""

_SIZE_EMBEDDING = 32


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One checkpoint to make."""

    family: str
    """``sd1``, ``sd2`` or ``sdxl``: which text encoder and which U-Net layout."""
    in_channels: int = 4
    v_prediction: bool = False
    seed: int


KINDS: dict[str, Kind] = {
    "sd1": Kind(family="sd1", seed=1),
    "sd1-v": Kind(family="sd1", v_prediction=True, seed=2),
    "sd1-inpainting": Kind(family="sd1", in_channels=9, seed=3),
    "sd1-pix2pix": Kind(family="sd1", in_channels=8, seed=4),
    "sd2": Kind(family="sd2", seed=5),
    "sd2-v": Kind(family="sd2", v_prediction=True, seed=6),
    "sdxl": Kind(family="sdxl", seed=7),
    "sdxl-inpainting": Kind(family="sdxl", in_channels=9, seed=8),
}


def unet_config(kind: Kind) -> Config:
    """The U-Net of a kind. SD1 has a fixed head count, SD2 and SDXL a fixed head width."""
    params: Config = {
        "use_checkpoint": False,
        "in_channels": kind.in_channels,
        "out_channels": 4,
        "model_channels": MODEL_CHANNELS,
        "num_res_blocks": 2,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    if kind.family == "sdxl":
        params |= {
            "adm_in_channels": OPEN_CLIP_WIDTH + 6 * _SIZE_EMBEDDING,
            "num_classes": "sequential",
            "attention_resolutions": [4, 2],
            "channel_mult": [1, 2, 4],
            "num_head_channels": 16,
            "use_linear_in_transformer": True,
            "transformer_depth": [1, 2, 3],
            "context_dim": CLIP_WIDTH + OPEN_CLIP_WIDTH,
            "spatial_transformer_attn_type": "softmax",
        }
        return {"target": "sgm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}
    params |= {
        "image_size": 32,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": 1,
    }
    if kind.family == "sd2":
        params |= {"num_head_channels": 16, "use_linear_in_transformer": True, "context_dim": OPEN_CLIP_WIDTH}
    else:
        params |= {"num_heads": 4, "context_dim": CLIP_WIDTH}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def autoencoder_config(kind: Kind) -> Config:
    """A narrow autoencoder with the usual four levels, so an eighth of the picture's size."""
    target = "ldm.models.autoencoder.AutoencoderKL"
    if kind.family == "sdxl":
        target = "sgm.models.autoencoder.AutoencoderKLInferenceWrapper"
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": ddconfig,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {"target": target, "params": params}


def _clip_config(module: str, clip_folder: Path, **params: Any) -> Config:
    return {"target": f"{module}.FrozenCLIPEmbedder", "params": {"version": str(clip_folder), **params}}


def _sdxl_config(kind: Kind, clip_folder: Path) -> Config:
    encoders = "sgm.modules.encoders.modules"
    diffusion = "sgm.modules.diffusionmodules"
    text: list[Config] = [
        _clip_config(encoders, clip_folder, layer="hidden", layer_idx=1),
        {
            "target": f"{encoders}.FrozenOpenCLIPEmbedder2",
            "params": {
                "arch": OPEN_CLIP_ARCH,
                "version": "none",
                "freeze": True,
                "layer": "penultimate",
                "always_return_pooled": True,
                "legacy": False,
            },
        },
    ]
    embedders = [{"is_trainable": False, "input_key": "txt", **encoder} for encoder in text]
    for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"):
        size = {"target": f"{encoders}.ConcatTimestepEmbedderND", "params": {"outdim": _SIZE_EMBEDDING}}
        embedders.append({"is_trainable": False, "input_key": key, **size})
    scaling = "VScaling" if kind.v_prediction else "EpsScaling"
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{diffusion}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{diffusion}.denoiser_scaling.{scaling}"},
        "discretization_config": {"target": f"{diffusion}.discretizer.LegacyDDPMDiscretization"},
    }
    params = {
        "scale_factor": SCALE_FACTOR,
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{diffusion}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": unet_config(kind),
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": embedders}},
        "first_stage_config": autoencoder_config(kind),
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}


def model_config(kind: Kind, clip_folder: Path) -> Config:
    """The whole configuration of a kind, to be written as ``<checkpoint>.yaml``.

    ``clip_folder`` holds the tiny CLIP's ``config.json`` and tokenizer; its absolute path goes into the result.
    """
    if kind.family == "sdxl":
        return _sdxl_config(kind, clip_folder)
    targets = {
        8: "modules.models.diffusion.ddpm_edit.LatentDiffusion",
        9: "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    }
    encoders = "ldm.modules.encoders.modules"
    text = _clip_config(encoders, clip_folder)
    if kind.family == "sd2":
        open_clip = {"arch": OPEN_CLIP_ARCH, "version": "none", "freeze": True, "layer": "penultimate"}
        text = {"target": f"{encoders}.FrozenOpenCLIPEmbedder", "params": open_clip}
    params: Config = {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "edited" if kind.in_channels == 8 else "jpg",
        "cond_stage_key": "edit" if kind.in_channels == 8 else "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn" if kind.in_channels == 4 else "hybrid",
        "monitor": "val/loss_simple_ema",
        "scale_factor": SCALE_FACTOR,
        "use_ema": False,
        "unet_config": unet_config(kind),
        "first_stage_config": autoencoder_config(kind),
        "cond_stage_config": text,
    }
    if kind.in_channels == 9:
        params |= {"finetune_keys": None}
    if kind.v_prediction:
        params |= {"parameterization": "v"}
    return {
        "model": {
            "target": targets.get(kind.in_channels, "ldm.models.diffusion.ddpm.LatentDiffusion"),
            "params": params,
        }
    }
