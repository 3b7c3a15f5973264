"""Make a tiny seeded random SD3 checkpoint that a real WebUI loads with the extension ``small_sd3`` in it.

Run with the WebUI's own interpreter, from the WebUI's folder::

    venv/bin/python /path/to/tests/webui/sd3_checkpoint.py CLIP_FOLDER FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from checkpoints import import_webui, redraw
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "small_sd3" / "scripts")]

DEPTH, HEAD, CONTEXT, SEED = 4, 64, 4096, 11
LATENT_DEVIATION = 1 / 1.5305
"""Of the autoencoder's own latent: the WebUI takes a mean from it and multiplies by the rest."""
VELOCITY_DEVIATION = 0.7


def transformer(generator: torch.Generator, text_width: int) -> nn.Module:
    """One whose velocity has about the deviation of a trained one's."""
    from mmdit import MMDiT, Shape

    model = MMDiT(Shape(
        depth=DEPTH, head=HEAD, context=CONTEXT, pooled=2 * text_width, grid=48, sinusoids=256
    )).requires_grad_(False)
    redraw(model, generator)
    model.context_embedder.weight *= (CONTEXT / (2 * text_width)) ** 0.5  # the rest of the text's channels is zero
    model.pos_embed.copy_(0.5 * torch.randn(model.pos_embed.shape, generator=generator))
    x = torch.randn(4, 16, 16, 16, generator=generator)
    text = torch.zeros(4, 154, CONTEXT)
    text[:, :77, : 2 * text_width] = torch.randn(4, 77, 2 * text_width, generator=generator)
    y = torch.randn(4, 2 * text_width, generator=generator)
    velocity: Tensor = model(x, torch.linspace(10, 990, 4), y=y, context=text)
    model.final_layer.linear.weight *= VELOCITY_DEVIATION / velocity.std()
    model.final_layer.linear.bias.zero_()
    return model


def autoencoder(generator: torch.Generator) -> nn.Module:
    """One that takes pictures to unit latents, without noise, and unit latents to pictures in range."""
    from modules.models.sd3.sd3_impls import SDVAE

    vae = SDVAE().requires_grad_(False)
    redraw(vae, generator)
    latent = torch.randn(4, 16, 16, 16, generator=generator) * LATENT_DEVIATION
    vae.decoder.conv_out.bias.zero_()
    vae.decoder.conv_out.weight *= 0.4 / vae.decode(latent).std()
    coarse = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    pictures = nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(-1, 1)
    exit_ = vae.encoder.conv_out
    exit_.bias.zero_()
    mean = vae.encoder(pictures)[:, :16]
    exit_.weight[:16] *= (LATENT_DEVIATION / mean.std(dim=(0, 2, 3)))[:, None, None, None]
    exit_.bias[:16] = -mean.mean(dim=(0, 2, 3)) * LATENT_DEVIATION / mean.std(dim=(0, 2, 3))
    exit_.weight[16:], exit_.bias[16:] = 0, -30
    return vae


def text_encoder(config: dict[str, Any], generator: torch.Generator) -> nn.Module:
    """One of the two CLIP text encoders."""
    from modules.models.sd3.other_impls import SDClipModel

    model = SDClipModel(layer="hidden", layer_idx=-2, textmodel_json_config=config, dtype=torch.float32)
    redraw(model, generator)
    return model


def main() -> None:
    """Reads the command line and writes the checkpoint."""
    clip_folder, file = (Path(argument) for argument in sys.argv[1:3])
    import_webui(Path.cwd())
    from modules import initialize

    initialize.imports()
    from modules.models.sd3 import sd3_cond
    from safetensors.torch import save_file
    from small_sd3 import TEXT_WIDTH, shrink

    shrink(clip_folder)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        parts = {
            "model.diffusion_model.": transformer(generator, TEXT_WIDTH),
            "first_stage_model.": autoencoder(generator),
            "text_encoders.clip_l.": text_encoder(sd3_cond.CLIPL_CONFIG, generator),
            "text_encoders.clip_g.": text_encoder(sd3_cond.CLIPG_CONFIG, generator),
        }
    state = {
        prefix + key: value.contiguous() for prefix, part in parts.items() for key, value in part.state_dict().items()
    }
    save_file(state, str(file))


if __name__ == "__main__":
    main()
