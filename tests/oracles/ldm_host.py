"""The real ``ldm`` U-Net in float64, and denoisers around it as a host has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sag_pag.demo.unet import redraw_
from sag_pag.engine.spaces import SigmaSpace, Space, TimestepSpace

Layout = Literal["sd1", "sd2"]
Sampler = Literal["sigma", "timestep"]
Prediction = Literal["eps", "v"]

CONTEXT = 24
TOKENS = 5
LAYOUTS: dict[Layout, dict[str, Any]] = {
    # input 1, 2, 4, 5, 7, 8; middle; output 0 to 8
    "sd1": {"num_res_blocks": 2, "model_channels": 32, "channel_mult": (1, 2, 2), "attention_resolutions": (4, 2, 1),
            "num_heads": 4},
    # input 1, 3; middle; output 0 to 3 with two transformer blocks each; heads by their width
    "sd2": {"num_res_blocks": 1, "model_channels": 64, "channel_mult": (1, 2), "attention_resolutions": (2, 1),
            "num_head_channels": 32, "use_linear_in_transformer": True, "transformer_depth": 2,
            "context_dim": [CONTEXT, CONTEXT]},
}


@contextmanager
def float64_inference() -> Iterator[None]:
    """Keeps ``ldm`` from computing attention logits in float32; one thread, which is faster for tensors this small."""
    attention = pytest.importorskip("ldm.modules.attention")
    before, attention._ATTN_PRECISION = attention._ATTN_PRECISION, "as given"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        attention._ATTN_PRECISION = before
        torch.set_num_threads(threads)


def make_unet(layout: Layout, *, seed: int = 1, checkpointing: bool = False) -> nn.Module:
    """Stability's own class, every parameter redrawn, in float64 throughout.

    ``checkpointing`` is on in Stable Diffusion's configurations: it runs transformer blocks in an autograd function.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    config = {"context_dim": CONTEXT, **LAYOUTS[layout]}
    unet: nn.Module = openaimodel.UNetModel(
        image_size=32, in_channels=4, out_channels=4, legacy=False,
        use_spatial_transformer=True, use_checkpoint=checkpointing, **config,
    )
    redraw_(unet, seed=seed, gain=1.5)  # a map far from uniform, so that SAG's mask hangs on no rounding
    unet.eval().double().requires_grad_(False)
    unet.dtype = torch.float64  # type: ignore[assignment]
    for module in unet.modules():
        if type(module).__name__ == "GroupNorm32":
            module.__class__ = nn.GroupNorm  # without the detour through float32
    unet.get_submodule("time_embed").register_forward_pre_hook(lambda _, args: (args[0].double(),))
    return unet


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's noise schedule, ``(1000,)`` in float64."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


def column(values: Tensor) -> Tensor:
    """One value a row, broadcastable over a latent."""
    return values[:, None, None, None]


@dataclass(frozen=True)
class Host:
    """A denoiser as a sampler calls it: x0 at a sigma, or eps at a timestep, from a U-Net that predicts eps or v.

    ``cond`` is the WebUI's: a dict with a list of contexts.
    """

    unet: nn.Module
    sampler: Sampler
    prediction: Prediction = "eps"

    def predict(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The U-Net's output. ``ldm`` wants a context for each transformer block where there are several."""
        depth = len(list(self.unet.get_submodule("middle_block.1.transformer_blocks").children()))
        out: Tensor = self.unet(x, timestep, context=[context] * depth if depth > 1 else context)
        return out

    @property
    def space(self) -> Space:
        return SigmaSpace() if self.sampler == "sigma" else TimestepSpace(alphas_cumprod())

    def noise_level(self, timestep: int) -> float:
        """What the sampler hands to the denoiser at ``timestep``."""
        a = float(alphas_cumprod()[timestep])
        return ((1 - a) / a) ** 0.5 if self.sampler == "sigma" else float(timestep)

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        context = cond["c_crossattn"][0] if isinstance(cond, dict) else cond
        if self.sampler == "timestep":
            a = column(alphas_cumprod()[sigma.long()])
            out = self.predict(x, sigma, context)
            return out if self.prediction == "eps" else a.sqrt() * out + (1 - a).sqrt() * x
        s = column(sigma)
        scaled = x / (s**2 + 1).sqrt()
        out = self.predict(scaled, self._timestep(sigma), context)
        return x - s * out if self.prediction == "eps" else scaled / (s**2 + 1).sqrt() - s / (s**2 + 1).sqrt() * out

    @staticmethod
    def _timestep(sigma: Tensor) -> Tensor:
        a = alphas_cumprod()
        return (((1 - a) / a).sqrt()[None] - sigma[:, None]).abs().argmin(dim=1).double()
