"""Small checkpoints of every family, their text encoder, and the wrappers that predict in a sampler's space."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from mmdit import Shape, redrawn
from torch import Tensor, nn

from modules import shared
from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_

WIDTH = 8  # of a prompt's tokens
VECTOR = 6  # of SDXL's vector condition
CHUNK = 4  # tokens that a prompt is padded to a multiple of

_BASE = UNetKwargs(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(2, 1), context_dim=WIDTH, num_heads=2,
)
_XL = UNetKwargs(
    **{**_BASE, "transformer_depth": (1, 2), "use_linear_in_transformer": True},  # type: ignore[typeddict-item]
    num_classes="sequential", adm_in_channels=VECTOR,
)
_SD3 = Shape(depth=4, latents=4, context=WIDTH, pooled=VECTOR)  # of the others' channels, so that they can take turns
KINDS: dict[str, UNetKwargs] = {
    "sd1": _BASE,
    "sd1-v": _BASE,
    "inpainting": UNetKwargs(**{**_BASE, "in_channels": 9}),  # type: ignore[typeddict-item]
    "edit": UNetKwargs(**{**_BASE, "in_channels": 8}),  # type: ignore[typeddict-item]
    "sdxl": _XL,
    "no-middle": _BASE,
    "refiner": UNetKwargs(**{**_BASE, "attention_resolutions": (2,)}),  # type: ignore[typeddict-item]
}


def seeded(text: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


class StableDiffusion(nn.Module):
    """A checkpoint. ``calls`` lists the rows of every U-Net call; ``before_call`` may raise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        unet: Any = redrawn(_SD3, seed=1) if kind == "sd3" else redraw_(UNetModel(**KINDS[kind]), seed=1, gain=1.5)
        unet.requires_grad_(False)
        if kind == "no-middle":
            del unet.middle_block[1]  # type: ignore[operator]
        self.kind = kind
        self.model = nn.Module()
        self.model.diffusion_model = unet
        self.model.conditioning_key = "hybrid" if kind in ("inpainting", "edit") else "crossattn"
        self.cond_stage_key = "edit" if kind == "edit" else "txt"
        self.parameterization = "v" if kind == "sd1-v" else "eps"
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        if kind == "sd3":  # from x0 to noise in a straight line, shifted by 3; the rest of the host wants alphas
            times = torch.arange(1, 1001) / 1000
            self.alphas_cumprod = 1 / ((3 * times / (1 + 2 * times)) ** 2 + 1)
        self.sd_checkpoint_info = SimpleNamespace(name=kind, name_for_extra=kind)
        self.reset()

    def reset(self) -> None:
        """As if just read from disk."""
        self.lowvram = False
        self.calls: list[int] = []
        self.before_call: Callable[[], None] = lambda: None

    def encode(self, text: str) -> Any:
        """A prompt's condition; long prompts have more tokens."""
        tokens = CHUNK * (1 + len(text.split()) // CHUNK)
        if self.kind in ("sdxl", "sd3"):
            return {"crossattn": seeded(text, tokens, WIDTH), "vector": seeded(text, VECTOR)}
        return seeded(text, tokens, WIDTH)

    def apply_model(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        self.calls.append(len(x))
        self.before_call()
        if self.model.conditioning_key == "hybrid":
            x = torch.cat([x, *cond["c_concat"]], dim=1)
        context = cond["crossattn"] if "crossattn" in cond else torch.cat(cond["c_crossattn"], dim=1)
        extra = {"y": cond["vector"]} if "vector" in cond else {}
        assert len(x) == len(t) == len(context)
        if self.kind == "sd3":  # t is sigma, and the result x0
            velocity: Tensor = self.model.diffusion_model(x, 1000 * t, context=context, **extra)
            return x - t[:, None, None, None] * velocity
        out: Tensor = self.model.diffusion_model(x, t, context=context, **extra)
        return out


class ModelData:
    """Where the loaded checkpoint is found without loading one."""

    @property
    def sd_model(self) -> Any:
        return shared.sd_model


model_data = ModelData()


class SigmaDenoiser(nn.Module):
    """k-diffusion's wrapper: ``x = x0 + sigma * eps`` in, x0 out."""

    def __init__(self, model: StableDiffusion) -> None:
        super().__init__()
        self.inner_model = model
        self.sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt()
        self.log_sigmas = self.sigmas.log()

    def sigma_to_t(self, sigma: Tensor, quantize: bool = False) -> Tensor:
        distance = (sigma.log()[:, None] - self.log_sigmas).abs()
        if quantize:
            return distance.argmin(dim=1)
        above = torch.searchsorted(self.log_sigmas, sigma.log().contiguous()).clamp(1, 999)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        return (above - 1 + (sigma.log() - low) / (high - low)).clamp(0, 999)

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        if self.inner_model.kind == "sd3":
            return self.inner_model.apply_model(x, sigma, **kwargs)
        s = sigma[:, None, None, None]
        shrink = (1 + s**2).rsqrt()
        out = self.inner_model.apply_model(x * shrink, self.sigma_to_t(sigma), **kwargs)
        if self.inner_model.parameterization == "v":
            return x * shrink**2 - out * s * shrink
        return x - out * s


class TimestepDenoiser(nn.Module):
    """The wrapper of DDIM and its like: ``x = sqrt(a) * x0 + sqrt(1 - a) * eps`` in, eps out."""

    def __init__(self, model: StableDiffusion) -> None:
        super().__init__()
        self.inner_model = model

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        out = self.inner_model.apply_model(x, t, **kwargs)
        if self.inner_model.parameterization == "v":
            a = self.inner_model.alphas_cumprod[t.long()][:, None, None, None]
            return a.sqrt() * out + (1 - a).sqrt() * x
        return out
