"""Tensor maths of the two guidances: masks, blur, deltas, rescale and fusion. No modules, no host.

Shapes: latents and predictions are ``(batch, channels, height, width)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class MergedTokensError(ValueError):
    """An attention works on fewer tokens than its feature map has places."""


@dataclass(frozen=True)
class Blend:
    """How a step's result was blended with what is protected, where that was not by the mask alone.

    ``result`` went into it and became ``blended``; ``again`` does the same to another result.
    """

    result: Tensor
    blended: Tensor
    again: Callable[[Tensor], Tensor]


def working_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Runs in the tensors' own precision. Some devices have no autocast, not even to switch it off."""
    try:
        return torch.autocast(device.type, enabled=False)
    except (RuntimeError, AssertionError):  # nothing to switch off: DirectML on any torch, XPU on an older one
        return nullcontext()


def attention_mask(
    received: Tensor, *, size: tuple[int, int], threshold: float, latent_size: tuple[int, int],
) -> Tensor:
    """SAG's mask (arXiv 2210.00939): where tokens get more attention than ``threshold``.

    ``received`` is ``(batch, tokens)`` with mean 1, ``size`` the height and width of the feature map that the tokens
    lie in; the mask is ``(batch, 1, *latent_size)`` of 0 and 1, resized with nearest. Raises ``MergedTokensError``
    if the tokens do not fill ``size``.
    """
    height, width = size
    if received.shape[1] != height * width:
        raise MergedTokensError(f"{received.shape[1]} tokens do not fill a feature map of {height} x {width}")
    mask = (received > threshold).to(received.dtype).view(-1, 1, height, width)
    return F.interpolate(mask, latent_size, mode="nearest")


def gaussian_kernel(sigma: float, *, radius: int, like: Tensor) -> Tensor:
    """Gaussian of standard deviation ``sigma`` at the ``2 * radius + 1`` integers around 0, with sum 1."""
    positions = torch.arange(-radius, radius + 1, dtype=torch.float64)  # not on the device: some have no float64
    return torch.softmax(-0.5 * (positions / sigma) ** 2, dim=0).to(like)


def blur(x: Tensor, *, sigma: float, radius: int | None = None, circular: bool = False) -> Tensor:
    """Gaussian blur with reflect padding; ``sigma`` in latent pixels, 0 for no change.

    The radius is ``max(4, ceil(3 * sigma))`` (9 taps at sigma 1, as in the reference implementations) unless given,
    and never more than the padding allows. ``circular``: opposite edges meet, as in a picture made for tiling.
    """
    if sigma == 0:
        return x
    wanted = max(4, math.ceil(3 * sigma)) if radius is None else radius
    result = working_precision(x)
    with without_autocast(x.device):
        for axis in (2, 3):
            r = min(wanted, x.shape[axis] - (0 if circular else 1))
            kernel = gaussian_kernel(sigma, radius=r, like=result)
            weight = kernel.view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)).repeat(x.shape[1], 1, 1, 1)
            around = (0, 0, r, r) if axis == 2 else (r, r, 0, 0)
            padded = F.pad(result, around, mode="circular" if circular else "reflect")
            result = F.conv2d(padded, weight, groups=x.shape[1])
    return result.to(x.dtype)


def degrade(denoised: Tensor, mask: Tensor, *, sigma: float, circular: bool = False) -> Tensor:
    """SAG's degraded picture: blurred where ``mask`` is 1, unchanged where it is 0 (arXiv 2210.00939)."""
    return torch.where(mask > 0, blur(denoised, sigma=sigma, circular=circular), denoised)


def image_std(x: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Standard deviation of each image, ``(batch, 1, 1, 1)``; with ``weight``, of the part that is not protected.

    ``weight`` is 1 where an inpainted picture is made anew and 0 where it is protected, broadcastable to ``x``.
    """
    if weight is None:
        return x.std(dim=(1, 2, 3), keepdim=True)
    w = working_precision(weight).expand_as(x)
    total = w.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    mean = (x * w).sum(dim=(1, 2, 3), keepdim=True) / total
    return ((x - mean) ** 2 * w).sum(dim=(1, 2, 3), keepdim=True).div(total).sqrt()


def fuse_by_saliency(first: Tensor, second: Tensor) -> Tensor:
    """Saliency-adaptive noise fusion (arXiv 2311.10329).

    Per element, whichever of the two has the larger softmax over space of its blurred magnitude (3 x 3, sigma 1).
    """
    def saliency(x: Tensor) -> Tensor:
        return torch.softmax(blur(x.abs(), sigma=1.0, radius=1).flatten(2), dim=-1).view_as(x)

    return torch.where(saliency(first) >= saliency(second), first, second)


def share_left(changed: Tensor, *, own: Tensor, base: Tensor) -> Tensor | None:
    """What share of ``own - base`` is left in ``changed - base``, place by place: ``(1, height, width)``.

    All three are ``(channels, height, width)``. Regional prompts mix a prompt's prediction ``own`` with the
    unconditional ``base``, each in its region. ``None`` where nothing is changed, or in another way than that.
    """
    if torch.equal(changed, own):
        return None
    near = 4 * torch.finfo(own.dtype).eps * float(own.abs().max())
    difference, left = working_precision(own) - working_precision(base), working_precision(changed - base)
    squares = difference.square().sum(dim=0, keepdim=True)
    share = (left * difference).sum(dim=0, keepdim=True) / squares.clamp_min(torch.finfo(squares.dtype).tiny)
    share = torch.where(squares > 1e-12 * squares.max(), share, 1.0)
    is_mixed = (left - share * difference).abs().max() <= 1e-2 * difference.abs().max() + near
    return share if bool(is_mixed) else None


def _unprotected(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else torch.where(weight > 0, x, 0.0)


def add_guidance(
    combined: Tensor, delta: Tensor, *, cond: Tensor, uncond: Tensor | None, rescale: float = 0.0,
    mode: str = "full", weight: Tensor | None = None, blend: Blend | None = None,
) -> Tensor:
    """``combined`` (the host's result after CFG) with the guidance ``delta`` added and its strength tamed.

    With ``f = (1 - rescale) + rescale * factor`` the result is ``combined + delta * f``, where ``factor`` is
    ``std(cond) / std(combined + delta)`` in mode ``full`` and ``std(cond) / std(cond + delta)`` in mode ``partial``,
    for each image. Mode ``snf`` mixes in, by ``rescale``, the fusion of CFG's own change ``combined - uncond`` with
    ``delta`` (where there is no unconditional prediction, nothing is fused). ``weight`` as for ``image_std``; what it
    protects stays as it is, bit for bit, and takes no part in the fusion. Where there is a ``blend`` of another kind,
    guidance goes through that as the model's own prediction did.
    """
    dtype = combined.dtype
    host = working_precision(combined if blend is None else blend.result)
    cond, change = working_precision(cond), working_precision(delta)
    if rescale and mode == "snf":
        if uncond is not None:
            base = working_precision(uncond)
            fused = fuse_by_saliency(_unprotected(host - base, weight), _unprotected(change, weight))
            change = torch.lerp(change, base + fused - host, rescale)
    elif rescale:
        guided = (host if mode == "full" else cond) + change
        factor = image_std(cond, weight=weight) / image_std(guided, weight=weight).clamp_min(1e-12)
        change = change * (1 - rescale + rescale * factor)
    if blend is not None:
        moved = working_precision(blend.again((host + change).to(dtype))) - working_precision(blend.blended)
        return (working_precision(combined) + moved).to(dtype)
    if weight is None:
        return (host + change).to(dtype)
    return torch.where(weight > 0, (host + change * weight).to(dtype), combined)
