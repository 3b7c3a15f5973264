"""One guided step on the real U-Net, described by a value and run through the engine or through the reference."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from ldm_host import CONTEXT, TOKENS, Host, Layout, Prediction, Sampler, make_unet
from reference import Sag, perturbed, self_attention_guidance
from torch import Tensor

from sag_pag.engine.plan import plan_at
from sag_pag.engine.rows import Row, StepRows
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import UNetTopology
from sag_pag.neighbours import Neighbours
from sag_pag.settings import Settings

Calls = Literal["one call", "cond and uncond apart", "every row apart"]
CFG_SCALE = 7.5


cached_unet = functools.cache(make_unet)


@dataclass(frozen=True)
class Case:
    """``prompts``: for each image the weights of its sub-prompts. ``perturb`` and ``read``: block names, ``:K`` for
    one transformer block; nothing for no PAG, no SAG."""

    name: str
    perturb: tuple[str, ...] = ()
    read: str = ""
    layout: Layout = "sd1"
    prediction: Prediction = "eps"
    size: tuple[int, int] = (8, 12)
    timestep: int = 600
    prompts: tuple[tuple[float, ...], ...] = ((1.0,), (1.0,))
    uncond: bool = True
    calls: Calls = "one call"
    own_call: bool = False
    checkpointing: bool = False
    pag_scale: float = 3.0
    sag_scale: float = 0.75
    threshold: float = 1.0
    blur_sigma: float = 1.0
    rescale: float = 0.0
    rescale_mode: str = "full"

    def settings(self) -> Settings:
        return Settings(
            pag_enabled=bool(self.perturb), pag_scale=self.pag_scale, sag_enabled=bool(self.read),
            pag_blocks=", ".join(self.perturb).replace(":", "."), sag_block=(self.read or "middle").replace(":", "."),
            sag_scale=self.sag_scale, sag_threshold=self.threshold, sag_blur_sigma=self.blur_sigma,
            rescale=self.rescale, rescale_mode=self.rescale_mode,
        )

    def host(self, sampler: Sampler) -> Host:
        return Host(cached_unet(self.layout, checkpointing=self.checkpointing), sampler, self.prediction)

    @property
    def rows(self) -> StepRows:
        conds = [
            Row("cond", image, number, weight)
            for image, weights in enumerate(self.prompts) for number, weight in enumerate(weights)
        ]
        return StepRows((*conds, *(Row("uncond", image) for image in range(len(self.prompts)))))


@dataclass(frozen=True)
class Inputs:
    """``x`` one row an image, ``conds`` one an image and sub-prompt, ``unconds`` one an image."""

    x: Tensor
    level: float
    conds: Tensor
    unconds: Tensor


@dataclass(frozen=True)
class Step:
    """What a step gives: predictions by row, the guidance, and the result after CFG and guidance."""

    conds: Tensor
    unconds: Tensor | None
    delta: Tensor
    guided: Tensor


def make_inputs(case: Case, host: Host) -> Inputs:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    level, images = host.noise_level(case.timestep), len(case.prompts)
    spread = (1 + level**2) ** 0.5 if host.sampler == "sigma" else 1.0
    return Inputs(
        x=normal(images, 4, *case.size) * spread, level=level,
        conds=normal(len(case.rows.conds), TOKENS, CONTEXT), unconds=normal(images, TOKENS, CONTEXT),
    )


def webui_cond(context: Tensor) -> dict[str, Any]:
    return {"c_crossattn": [context], "c_concat": [torch.zeros(len(context), 5, 1, 1)]}


def engine_step(case: Case, host: Host) -> Step:
    """The step as a host makes it, with the engine standing in for the denoiser."""
    inputs, rows = make_inputs(case, host), case.rows
    topology = UNetTopology(host.unet)
    plan = plan_at(case.settings(), topology, progress=(999 - case.timestep) / 1000)
    assert plan is not None
    manner = Neighbours(topology).manner(short_of_memory=case.own_call)
    step = GuidedStep(plan, topology=topology, rows=rows, space=host.space, manner=manner)
    images = [row.image for row in rows.conds]
    x, context, n_conds = inputs.x[images], inputs.conds, len(images)
    if case.uncond:
        x, context = torch.cat([x, inputs.x]), torch.cat([context, inputs.unconds])
    total = len(x)
    bounds = {
        "one call": [0, total], "cond and uncond apart": [0, n_conds, total], "every row apart": range(total + 1),
    }[case.calls]
    level = torch.full((total,), inputs.level, dtype=torch.float64)
    out = torch.cat([
        step(host, x[a:b], level[a:b], cond=webui_cond(context[a:b]), rows=rows.rows[a:b])
        for a, b in itertools.pairwise(bounds) if a < b
    ])
    conds, unconds = out[:n_conds].clone(), out[n_conds:].clone() if case.uncond else None
    out.zero_()  # a host may reuse its tensor
    step.finish()
    combined = classifier_free_guidance(case, conds, unconds)
    guided = step.apply(combined.clone())
    return Step(conds, unconds, step.delta(), guided)


def classifier_free_guidance(case: Case, conds: Tensor, unconds: Tensor | None, scale: float = CFG_SCALE) -> Tensor:
    """The WebUI's: without unconditional predictions the first sub-prompt's stand in for them."""
    rows = case.rows.conds
    base = conds[[rows.index(row) for row in case.rows.first_conds()]] if unconds is None else unconds
    result = base.clone()
    for index, row in enumerate(rows):
        result[row.image] += row.weight * scale * (conds[index] - base[row.image])
    return result


def reference_sag(case: Case, host: Host, inputs: Inputs, image: int, cond_row: int) -> Sag:
    context = inputs.unconds[image] if case.uncond else inputs.conds[cond_row]
    return self_attention_guidance(
        host, inputs.x[image, None], inputs.level, cond=context[None], block=case.read, scale=case.sag_scale,
        threshold=case.threshold, sigma=case.blur_sigma,
    )


def reference_step(case: Case, host: Host) -> Step:
    """The same step by the reference: every prediction a U-Net pass of its own."""
    inputs = make_inputs(case, host)
    level = torch.tensor([inputs.level], dtype=torch.float64)
    delta = torch.zeros_like(inputs.x)
    conds, row = [], 0
    for image, weights in enumerate(case.prompts):
        x = inputs.x[image, None]
        if case.read:
            delta[image] += reference_sag(case, host, inputs, image, row).delta[0]
        for weight in weights:
            cond = host(x, level, cond=inputs.conds[row, None])
            conds.append(cond)
            if case.perturb:
                with perturbed(host, case.perturb):
                    worse = host(x, level, cond=inputs.conds[row, None])
                delta[image] += case.pag_scale * weight * (cond - worse)[0]
            row += 1
    unconds = None
    if case.uncond:
        pairs = zip(inputs.x.split(1), inputs.unconds.split(1), strict=True)
        unconds = torch.cat([host(x, level, cond=context) for x, context in pairs])
    combined = classifier_free_guidance(case, torch.cat(conds), unconds)
    guided = combined + delta
    if case.rescale:
        plain = classifier_free_guidance(case, torch.cat(conds), unconds, scale=1.0)
        over = guided if case.rescale_mode == "full" else plain + delta
        for image in range(len(guided)):
            factor = plain[image].std() / over[image].std()
            guided[image] = combined[image] + (1 - case.rescale + case.rescale * factor) * delta[image]
    return Step(torch.cat(conds), unconds, delta, guided)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest element."""
    return float((value - reference).abs().max() / reference.abs().max())
