"""The demo model: U-Net, autoencoder and caption encoder under the names that CompVis checkpoints give them.

A 64x64 picture is an ``(8, 16, 16)`` latent of unit variance. The U-Net predicts v.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sag_pag.demo.autoencoder import LATENT_CHANNELS, Autoencoder
from sag_pag.demo.captions import CONTEXT_DIM, CaptionEncoder, parse
from sag_pag.demo.schedule import timestep_of
from sag_pag.demo.unet import UNetKwargs, UNetModel

WEIGHTS = Path(__file__).with_name("weights.safetensors")

PAG_SCALE = 0.5
CFG_SCALE = 1.5
"""What the grid and the page begin with: beside it PAG gains, at 3 it harms (docs/demo-evaluation.md)."""
OWN_DEFAULTS: dict[str, object] = {"pag_scale": PAG_SCALE}
"""What suits this model better than the extension's defaults (docs/demo-evaluation.md)."""


def unet_config() -> UNetKwargs:
    """The U-Net's arguments: 64 channels at 16x16, one million parameters.

    One resolution, so that the middle block's self-attention has 256 tokens and real work: with further levels below
    it, a model of this size and training leaves the middle block's attention all but unused, and there is nothing for
    guidance to perturb.
    """
    return UNetKwargs(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        model_channels=64,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        context_dim=CONTEXT_DIM,
        num_head_channels=32,
    )


class DemoModel(nn.Module):
    """U-Net (``model.diffusion_model``), caption encoder and autoencoder; the latter two as Stable Diffusion's."""

    def __init__(self, config: UNetKwargs | None = None) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": UNetModel(**(config or unet_config()))})
        self.cond_stage_model = CaptionEncoder()
        self.first_stage_model = Autoencoder()

    @property
    def unet(self) -> UNetModel:
        unet = self.model["diffusion_model"]
        assert isinstance(unet, UNetModel)
        return unet

    def context(self, captions: Sequence[str]) -> Tensor:
        """``(B, 7, 64)`` from captions; the empty one is the unconditional. Raises ``CaptionError``."""
        ids = torch.tensor([parse(caption) for caption in captions], device=self.cond_stage_model.slot.device)
        context: Tensor = self.cond_stage_model(ids)
        return context

    def forward(self, x: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """The prediction of v for captions given as ``(B, 7)`` word ids: what training needs."""
        out: Tensor = self.unet(x, timesteps, self.cond_stage_model(ids))
        return out

    def denoise(self, x: Tensor, sigma: Tensor, *, cond: Tensor) -> Tensor:
        """The picture x0 predicted from ``x = x0 + sigma eps``; ``sigma`` is ``(B,)``, ``cond`` the context.

        This is the WebUI's (k-diffusion's) denoiser of a v-prediction model.
        """
        level = sigma.to(x)[:, None, None, None]
        total = (1 + level.square()).sqrt()
        v = self.unet(x / total, timestep_of(sigma).to(x), cond)
        denoised: Tensor = x / total.square() - v * level / total
        return denoised


def save(model: DemoModel, path: Path, *, metadata: dict[str, str]) -> None:
    """Write the weights as fp16 safetensors."""
    tensors = {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}
    config = json.dumps(unet_config(), sort_keys=True)
    save_file(tensors, path, metadata={"format": "pt", "unet": config, **metadata})


def load(path: Path = WEIGHTS, *, device: torch.device | str = "cpu") -> DemoModel:
    """The model with the weights of a file, in float32 and without gradients."""
    model = DemoModel()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.to(device).eval().requires_grad_(False)


def read_metadata(path: Path = WEIGHTS) -> dict[str, str]:
    """What the training wrote about itself into a weights file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
