"""diffusers' pipelines on the weights of an ``ldm``-layout U-Net, and the same step by the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.benchmark.peer import Kind, diffusers_pipeline, diffusers_unet
from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_, timestep_embedding
from sag_pag.engine.plan import StepPlan
from sag_pag.engine.rows import StepRows
from sag_pag.engine.spaces import TimestepSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import UNetTopology

Layout = Literal["sd1", "sd2", "sdxl"]
Pipeline = Any

CONTEXT, TOKENS = 24, 5
POOLED, TIME_IDS = 1280, 256  # by these and a context of 1280 the conversion knows SDXL
_COMMON: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_res_blocks": 2}
LAYOUTS: dict[Layout, UNetKwargs] = {
    "sd1": UNetKwargs(
        **_COMMON, model_channels=32, channel_mult=(1, 2, 2, 2), attention_resolutions=(4, 2, 1), num_heads=4,
        context_dim=CONTEXT,
    ),
    "sd2": UNetKwargs(
        **_COMMON, model_channels=32, channel_mult=(1, 2, 4, 4), attention_resolutions=(4, 2, 1),
        num_head_channels=16, use_linear_in_transformer=True, context_dim=CONTEXT,
    ),
    "sdxl": UNetKwargs(
        **_COMMON, model_channels=32, channel_mult=(1, 2, 4), attention_resolutions=(4, 2), num_head_channels=16,
        use_linear_in_transformer=True, transformer_depth=(1, 2, 3), num_classes="sequential",
        adm_in_channels=POOLED + 6 * TIME_IDS, context_dim=1280,
    ),
}


@functools.cache
def our_unet(layout: Layout, *, dtype: torch.dtype) -> UNetModel:
    """Every parameter redrawn. In float64 its detours through float32 are left out (see ``fused_forward``)."""
    unet = UNetModel(**LAYOUTS[layout])
    redraw_(unet, seed=3, gain=1.3)
    unet.eval().requires_grad_(False).to(dtype)
    for module in unet.modules():
        if dtype == torch.float64 and type(module).__name__ == "GroupNorm32":
            module.__class__ = nn.GroupNorm
    return unet


class SameTimeEmbedding(nn.Module):
    """diffusers' sinusoids differ from ``ldm``'s in the last bits of float32; in float64 that would be all there is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        return timestep_embedding(timesteps, self.dim)


@functools.cache
def their_unet(layout: Layout, *, dtype: torch.dtype) -> Any:
    """diffusers' U-Net with the same weights."""
    unet = our_unet(layout, dtype=dtype)
    theirs = diffusers_unet(unet, LAYOUTS[layout])
    if dtype == torch.float64:
        theirs.time_proj = SameTimeEmbedding(unet.model_channels)
        if layout == "sdxl":
            theirs.add_time_proj = SameTimeEmbedding(TIME_IDS)
    return theirs


def pipeline(kind: Kind, layout: Layout, *, dtype: torch.dtype, **options: Any) -> Pipeline:
    """diffusers' pipeline on the weights of ``our_unet``."""
    pipe = diffusers_pipeline(kind, their_unet(layout, dtype=dtype), **options)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(dtype)
    return pipe


@dataclass(frozen=True)
class Prompts:
    """``cond`` and ``uncond`` as the U-Net gets them, and as diffusers' pipelines do."""

    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]
    for_diffusers: dict[str, Tensor]


def prompts(layout: Layout, *, images: int, size: tuple[int, int], dtype: torch.dtype) -> Prompts:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator).to(dtype)

    context = LAYOUTS[layout]["context_dim"]
    cond, uncond = {"crossattn": normal(TOKENS, context)}, {"crossattn": normal(TOKENS, context)}
    theirs = {"prompt_embeds": cond["crossattn"], "negative_prompt_embeds": uncond["crossattn"]}
    if layout == "sdxl":
        pixels = torch.tensor([8.0 * size[0], 8.0 * size[1]])
        ids = torch.cat([pixels, torch.zeros(2), pixels])  # original size, crop, target size
        sinusoids = timestep_embedding(ids, TIME_IDS).flatten().to(dtype).expand(images, -1)
        for vector, name in ((cond, "pooled_prompt_embeds"), (uncond, "negative_pooled_prompt_embeds")):
            pooled = normal(POOLED)
            vector["vector"] = torch.cat([pooled, sinusoids], dim=1)
            theirs[name] = pooled
    return Prompts(cond, uncond, theirs)


@dataclass(frozen=True)
class Recorded:
    """One step of a pipeline: the guided noise prediction that its scheduler got, and at which latents."""

    noise: Tensor
    timestep: int
    latents: Tensor


def record(pipe: Pipeline, **arguments: Any) -> list[Recorded]:
    """Runs the pipeline to its latents."""
    steps: list[Recorded] = []
    original: Callable[..., Any] = pipe.scheduler.step

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(Recorded(model_output.clone(), int(timestep), sample.clone()))
        return original(model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = step
    try:
        pipe(output_type="latent", **arguments)
    finally:
        pipe.scheduler.step = original
    return steps


def our_noise(
    unet: UNetModel, given: Recorded, plan: StepPlan, *, prompts: Prompts, cfg_scale: float, alphas: Tensor,
) -> Tensor:
    """The same step's guided noise prediction by the engine; without CFG there are no unconditional rows."""
    images = len(given.latents)
    rows = StepRows.plain(images)

    def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        out: Tensor = unet(x, sigma, cond["crossattn"], cond.get("vector"))
        return out

    step = GuidedStep(plan, topology=UNetTopology(unet), rows=rows, space=TimestepSpace(alphas))
    with_cfg = cfg_scale > 1
    sources = (prompts.cond, prompts.uncond) if with_cfg else (prompts.cond,)
    cond = {key: torch.cat([source[key] for source in sources]) for key in prompts.cond}
    x = torch.cat([given.latents] * len(sources))
    out = step(denoise, x, torch.full((len(x),), float(given.timestep)), cond=cond, rows=rows.rows[: len(x)])
    step.finish()
    conds, unconds = out[:images], out[images:]
    return step.apply(unconds + cfg_scale * (conds - unconds) if with_cfg else conds)


def largest_error(values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Over all steps: the largest difference over the largest element."""
    pairs = zip(values, references, strict=True)
    return max(float((value - reference).abs().max() / reference.abs().max()) for value, reference in pairs)
