"""Make tiny seeded random checkpoints that a real WebUI loads as SD1, SD2, SDXL, inpainting or InstructPix2Pix.

Run with the WebUI's own interpreter, from the WebUI's folder::

    cd $WEBUI_DIR && venv/bin/python /path/to/tests/webui/checkpoints.py FOLDER [KIND ...]

An untrained U-Net ends in zero-initialised layers: its prediction is zero whatever goes in, every picture is the
same, and every bug passes. So each parameter is drawn anew, and the outputs are measured and brought to the scale
of a trained model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from layouts import (
    CLIP_WIDTH,
    KINDS,
    OPEN_CLIP_ARCH,
    SCALE_FACTOR,
    Config,
    Kind,
    autoencoder_config,
    model_config,
    unet_config,
)
from torch import Tensor, nn

logger = logging.getLogger("checkpoints")

CLIP_FOLDER = "clip-tiny"

QUERY_KEY_GAIN = 1.25
"""Queries and keys of this deviation give attention logits of its square: neither flat nor one-hot."""
NOISE_SHARE = 0.9
"""How much of its own input an eps model returns; see `pass_noise_through`."""
RANDOM_SHARE = 0.5
V_DEVIATION = 0.7
LATENT_ROWS = 8


def import_webui(webui: Path) -> None:
    """Make the WebUI's model code importable, the way the WebUI itself does it."""
    sys.path.insert(0, str(webui))
    sys.argv = sys.argv[:1]
    importlib.import_module("modules.paths")


def instantiate(config: Config) -> Any:
    """Build what a ``target``/``params`` configuration names."""
    module, name = config["target"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**config["params"]).eval().requires_grad_(False)


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter: norm weights near 1, biases small, the rest by fan-in."""
    for module_name, module in sorted(model.named_modules()):
        for name, parameter in sorted(module.named_parameters(recurse=False)):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 0:
                continue
            if parameter.ndim == 1:
                is_scale = name == "weight"
                parameter.copy_(1 + 0.1 * noise if is_scale else 0.1 * noise)
                continue
            gain = QUERY_KEY_GAIN if module_name.endswith(("to_q", "to_k", "q_proj", "k_proj")) else 1.0
            fan_in = 1 if isinstance(module, nn.Embedding) else parameter[0].numel()
            parameter.copy_(noise * gain * fan_in**-0.5)


def unet_inputs(kind: Kind, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch at several noise levels that looks like what the sampler sends: everything near unit deviation."""
    params = unet_config(kind)["params"]
    inputs = {
        "x": torch.randn(8, kind.in_channels, 16, 16, generator=generator),
        "timesteps": torch.linspace(1, 999, 8),
        "context": torch.randn(8, 77, params["context_dim"], generator=generator),
    }
    if kind.in_channels == 8:
        inputs["x"][:, 4:] /= SCALE_FACTOR
    if "adm_in_channels" in params:
        inputs["y"] = torch.randn(8, params["adm_in_channels"], generator=generator)
    return inputs


def pass_noise_through(unet: Any) -> None:
    """Wire the latent channels from the first convolution to the last, as an eps model needs it.

    An eps prediction unrelated to its input leaves the latent at the deviation of the highest noise level. A
    trained one returns mostly its input at high noise. With x and -x in two channels, silu(x) - silu(-x) = x
    brings it through the last activation; the first level's groups hold one channel each, so the
    normalisation keeps it.
    """
    entry, last, (norm, _, exit_) = unet.input_blocks[0][0], unet.output_blocks[-1], unet.out
    rows = torch.arange(LATENT_ROWS)
    signs = 1.0 - 2.0 * (rows % 2)
    entry.weight[:LATENT_ROWS] = 0
    entry.weight[rows, rows // 2, 1, 1] = signs
    entry.bias[:LATENT_ROWS] = 0
    block = last[0]
    block.skip_connection.weight[:LATENT_ROWS] = 0
    block.skip_connection.weight[rows, block.skip_connection.in_channels - entry.out_channels + rows] = 1.0
    block.skip_connection.bias[:LATENT_ROWS] = 0
    residuals = [block.out_layers[-1]] + [last[i].proj_out for i in range(1, len(last))]
    for residual in residuals:
        residual.weight[:LATENT_ROWS] *= 0.2
        residual.bias[:LATENT_ROWS] = 0
    norm.weight[:LATENT_ROWS], norm.bias[:LATENT_ROWS] = 1, 0
    exit_.weight[:, :LATENT_ROWS] = 0
    exit_.weight[rows // 2, rows, 1, 1] = signs * NOISE_SHARE


def make_unet(kind: Kind, generator: torch.Generator) -> Any:
    """A U-Net whose prediction has about the deviation of a trained one's."""
    unet = instantiate(unet_config(kind))
    redraw(unet, generator)
    if kind.in_channels == 8:
        # InstructPix2Pix gets its picture as the autoencoder's own latent
        unet.input_blocks[0][0].weight[:, 4:] *= SCALE_FACTOR
    inputs = unet_inputs(kind, generator)
    exit_ = unet.out[-1]
    exit_.bias.zero_()
    random_rows = slice(0 if kind.v_prediction else LATENT_ROWS, None)
    if not kind.v_prediction:
        pass_noise_through(unet)
        wired = exit_.weight[:, :LATENT_ROWS].clone()
        exit_.weight[:, :LATENT_ROWS] = 0
    exit_.weight[:, random_rows] *= (V_DEVIATION if kind.v_prediction else RANDOM_SHARE) / unet(**inputs).std()
    if not kind.v_prediction:
        exit_.weight[:, :LATENT_ROWS] = wired
    logger.info(
        "  U-Net: %.1fM parameters, output deviation %.2f",
        sum(p.numel() for p in unet.parameters()) / 1e6,
        unet(**inputs).std(),
    )
    return unet


def make_autoencoder(kind: Kind, generator: torch.Generator) -> Any:
    """An autoencoder that takes pictures to unit latents and unit latents to pictures in range."""
    vae = instantiate(autoencoder_config(kind))
    redraw(vae, generator)
    latent = torch.randn(4, 4, 16, 16, generator=generator) / SCALE_FACTOR
    vae.post_quant_conv.weight *= SCALE_FACTOR
    to_picture = vae.decoder.conv_out
    to_picture.bias.zero_()
    to_picture.weight *= 0.4 / vae.decode(latent).std()
    coarse = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    pictures = nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(-1, 1)
    to_moments = vae.quant_conv
    mean, logvar = slice(0, 4), slice(4, 8)
    to_moments.bias.zero_()
    moments = to_moments(vae.encoder(pictures))[:, mean]
    factor = 1 / SCALE_FACTOR / moments.std(dim=(0, 2, 3))
    to_moments.bias[mean] = -moments.mean(dim=(0, 2, 3)) * factor
    to_moments.weight[mean] *= factor[:, None, None, None]
    to_moments.weight[logvar] *= 0.01
    to_moments.bias[logvar] = -40.0
    return vae


def make_clip(folder: Path, generator: torch.Generator) -> Any:
    """A two-layer CLIP text encoder; sizes come from ``config.json`` in the folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig.from_pretrained(str(folder))).eval().requires_grad_(False)
    redraw(model, generator)
    return model


def make_open_clip(generator: torch.Generator) -> Any:
    """open_clip's smallest text tower, without the image tower that the WebUI would drop anyway."""
    import open_clip

    model = open_clip.create_model(OPEN_CLIP_ARCH).eval().requires_grad_(False)
    del model.visual
    redraw(model, generator)
    return model


def write_clip_folder(folder: Path) -> None:
    """Config and tokenizer of the tiny CLIP, with the real vocabulary (open_clip brings it along)."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer_config = {
        "bos_token": specials["<start_of_text>"],
        "eos_token": specials["<end_of_text>"],
        "pad_token": specials["<end_of_text>"],
        "unk_token": specials["<end_of_text>"],
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH, projection_dim=CLIP_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
    ).save_pretrained(str(folder))  # fmt: skip


def text_encoders(kind: Kind, clip_folder: Path, generator: torch.Generator) -> dict[str, Any]:
    """State dict prefix to encoder; the prefixes are what the WebUI tells the families by."""
    if kind.family == "sdxl":
        return {
            "conditioner.embedders.0.transformer.": make_clip(clip_folder, generator),
            "conditioner.embedders.1.model.": make_open_clip(generator),
        }
    if kind.family == "sd2":
        return {"cond_stage_model.model.": make_open_clip(generator)}
    return {"cond_stage_model.transformer.": make_clip(clip_folder, generator)}


def make_checkpoint(name: str, kind: Kind, folder: Path) -> None:
    """Write ``<name>.safetensors`` and ``<name>.yaml`` into the folder."""
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    logger.info("%s", name)
    generator = torch.Generator().manual_seed(kind.seed)
    clip_folder = folder / CLIP_FOLDER
    parts = {
        "model.diffusion_model.": make_unet(kind, generator),
        "first_stage_model.": make_autoencoder(kind, generator),
        **text_encoders(kind, clip_folder, generator),
    }
    state = {
        prefix + key: value.contiguous()
        for prefix, part in parts.items()
        for key, value in part.state_dict().items()
        if not key.startswith("loss.")
    }
    OmegaConf.save(OmegaConf.create(model_config(kind, clip_folder)), folder / f"{name}.yaml")
    save_file(state, str(folder / f"{name}.safetensors"))


def main() -> None:
    """Read the command line and make the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; outside the repository")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"all of {', '.join(KINDS)} when none is given")
    arguments = parser.parse_args()
    unknown = set(arguments.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = arguments.folder.resolve()
    import_webui(Path(os.environ.get("WEBUI_DIR", ".")).resolve())
    write_clip_folder(folder / CLIP_FOLDER)
    with torch.no_grad():
        for name in arguments.kinds or KINDS:
            make_checkpoint(name, KINDS[name], folder)


if __name__ == "__main__":
    main()
