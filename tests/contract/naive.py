"""The guidance once more, as a naive extension: one row a call, whole attention maps, a U-Net with other modules in it.

Shares nothing with the package. What it adds to the double's result is what the extension must add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn


@dataclass
class Wanted:
    sag: float = 0.0
    pag: float = 0.0
    start: float = 0.0
    end: float = 1.0
    fade: bool = False
    blocks: tuple[str, ...] = ("middle_block.1",)
    read: str = "middle_block.1.transformer_blocks.0.attn1"
    blur: float = 1.0


class IdentityAttention(nn.Module):
    def __init__(self, original: Any) -> None:
        super().__init__()
        self.to_v, self.to_out = original.to_v, original.to_out

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.to_out(self.to_v(x))
        return out


class Naive:
    """Registers itself with the double for the time of a ``with`` block and guides ``p`` (any if ``None``)."""

    def __init__(self, host: Any, wanted: Wanted, *, p: Any = None) -> None:
        self.host, self.wanted, self.p = host, wanted, p
        self.params: Any = None

    @contextmanager
    def registered(self) -> Iterator[None]:
        self.host.script_callbacks.on_cfg_denoiser(self._remember)
        self.host.script_callbacks.on_cfg_after_cfg(self._guide)
        yield

    def _remember(self, params: Any) -> None:
        self.params = params
        self.before = len(self.host.shared.sd_model.calls)

    def _guide(self, after: Any) -> None:
        denoiser, change = self.params.denoiser, self.change(after.x)
        if denoiser.mask is not None and not denoiser.mask_before_denoising:
            change = change * denoiser.nmask
        after.x = after.x + change

    def change(self, like: Tensor) -> Tensor:
        """What guidance adds to a step's result that is like this one, before any blending."""
        params, denoiser = self.params, self.params.denoiser
        timestep = float(self.timesteps(denoiser, params.sigma)[0])
        progress = (999 - round(timestep)) / 1000
        if not self.wanted.start <= progress <= self.wanted.end:
            return torch.zeros_like(like)
        fade = (self.wanted.end - progress) / (self.wanted.end - self.wanted.start) if self.wanted.fade else 1.0
        batch = denoiser.sampler.sampler_extra_args["cond"].batch
        parts = [(image, part.weight) for image, prompts in enumerate(batch) for part in prompts]
        seen = sum(self.host.shared.sd_model.calls[self.before :])
        skipped = seen == len(parts) < len(params.x)
        deltas = []
        for image in range(len(batch)):
            delta = torch.zeros_like(like[image])
            for row, (owner, weight) in enumerate(parts):
                if owner == image and self.wanted.pag:
                    delta += fade * self.wanted.pag * weight * self.pag(row)
            if self.wanted.sag:
                first = next(row for row, (owner, _) in enumerate(parts) if owner == image)
                last = len(params.x) - len(batch) + image
                delta += self.wanted.sag * self.sag(first if skipped else last)
            deltas.append(delta)
        return torch.stack(deltas) * denoiser.cond_scale_miltiplier

    def timesteps(self, denoiser: Any, sigma: Tensor) -> Tensor:
        inner = denoiser.inner_model
        return sigma if hasattr(denoiser, "alphas") else inner.sigma_to_t(sigma)

    def predict(self, row: int, x: Tensor) -> Tensor:
        """One row's prediction in the sampler's space, with what the host gave for that row."""
        params = self.params
        conds = len(params.text_cond["crossattn"] if isinstance(params.text_cond, dict) else params.text_cond)
        images = len(params.text_uncond["crossattn"] if isinstance(params.text_uncond, dict) else params.text_uncond)
        text, index = (params.text_cond, row) if row < conds else (params.text_uncond, (row - conds) % images)
        one = slice(index, index + 1)
        cond = {k: v[one] for k, v in text.items()} if isinstance(text, dict) else {"c_crossattn": [text[one]]}
        cond["c_concat"] = [params.image_cond[row : row + 1]]
        out: Tensor = params.denoiser.inner_model(x, params.sigma[row : row + 1], cond=cond)
        return out

    def pag(self, row: int) -> Tensor:
        x = self.params.x[row : row + 1]
        clean = self.predict(row, x)
        unet = self.host.shared.sd_model.model.diffusion_model
        perturbed = [t for block in self.wanted.blocks for t in unet.get_submodule(block).transformer_blocks]
        originals = [transformer.attn1 for transformer in perturbed]
        try:
            for transformer in perturbed:
                transformer.attn1 = IdentityAttention(transformer.attn1)
            return (clean - self.predict(row, x))[0]
        finally:
            for transformer, original in zip(perturbed, originals, strict=True):
                transformer.attn1 = original

    def sag(self, row: int) -> Tensor:
        x, sigma = self.params.x[row : row + 1], self.params.sigma[row : row + 1]
        maps: list[Tensor] = []
        size: list[tuple[int, int]] = []
        unet = self.host.shared.sd_model.model.diffusion_model
        attention = unet.get_submodule(self.wanted.read)
        transformer = unet.get_submodule(self.wanted.read.rsplit(".", 3)[0])

        def keep_map(_: nn.Module, args: tuple[Any, ...]) -> None:
            projections = attention.to_q, attention.to_k
            q, k = (f(args[0]).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for f in projections)
            maps.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))

        def keep_size(_: nn.Module, args: tuple[Any, ...]) -> None:
            size.append(tuple(args[0].shape[-2:]))

        hooks = [attention.register_forward_pre_hook(keep_map), transformer.register_forward_pre_hook(keep_size)]
        out = self.predict(row, x)
        for hook in hooks:
            hook.remove()
        received = maps[0].mean(dim=1).sum(dim=1).reshape(1, 1, *size[0])
        mask = nn.functional.interpolate((received > 1.0).float(), x.shape[-2:], mode="nearest").numpy()
        radius = max(4, math.ceil(3 * self.wanted.blur))
        blurred: Callable[[np.ndarray], np.ndarray] = lambda a: ndimage.gaussian_filter(  # noqa: E731
            a, self.wanted.blur, axes=(2, 3), mode="mirror", radius=radius
        )
        denoiser = self.params.denoiser
        if not hasattr(denoiser, "alphas"):
            change = torch.from_numpy(mask * (blurred(out.numpy()) - out.numpy()))
            return (out + change - self.predict(row, x + change))[0]
        a = denoiser.alphas[sigma.long()][:, None, None, None]
        x0 = (x - (1 - a).sqrt() * out) / a.sqrt()
        change = torch.from_numpy(mask * (blurred(x0.numpy()) - x0.numpy()))
        return (out - self.predict(row, x + a.sqrt() * change))[0]
