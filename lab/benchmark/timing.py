"""Times one sampling step without guidance, with PAG, SAG and both, and diffusers' own pipelines on the same weights.

Steps are interleaved, so that a machine that gets slower or faster does so for all; each ratio is the median over the
rounds of the step's time over that of the plain step of the same round and library. Beside it stands the ratio of the
counted floating-point operations, which is the same on every machine and what the times would be if nothing else took
any.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lab.benchmark.peer import Kind, diffusers_pipeline, diffusers_unet
from lab.benchmark.steps import (
    CFG_SCALE,
    METHODS,
    Method,
    Step,
    random_unet,
    step_config,
    step_flops,
)
from sag_pag.demo.layers import fused_attention
from sag_pag.demo.unet import UNetKwargs

Key = tuple[str, str]  # library and method
Run = Callable[[], float]  # does a step and gives its seconds
KINDS: tuple[Kind, ...] = ("CFG", "PAG", "SAG")
POOLED = 1280  # channels of SDXL's vector that are the pooled text embedding


@dataclass(frozen=True)
class Row:
    """One method's result; ``note`` instead of numbers where it could not run.

    ``peak_mib`` is the memory in use at the step's peak over that before it.
    """

    library: str
    method: str
    milliseconds: float | None = None
    ratio: float | None = None
    flop_ratio: float | None = None
    peak_mib: float | None = None
    note: str = ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_run(step: Step, method: Method) -> Run:
    """The step by the engine."""
    def run() -> float:
        _wait(step.device)
        start = time.perf_counter()
        step.run(method)
        _wait(step.device)
        return time.perf_counter() - start

    return run


def diffusers_run(pipe: Any, step: Step) -> Run:
    """The second of two steps of the pipeline, from scheduler to scheduler: without its set-up."""
    cond, uncond = step.cond["crossattn"].chunk(2)
    prompts = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    if "vector" in step.cond:
        pooled, negative = step.cond["vector"][:, :POOLED].chunk(2)
        prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative}
    ends: list[float] = []
    scheduler_step = pipe.scheduler.step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        _wait(step.device)
        ends.append(time.perf_counter())
        return scheduler_step(*args, **kwargs)

    def run() -> float:
        ends.clear()
        side = 8 * step.x.shape[-1]
        pipe(
            num_inference_steps=2, height=side, width=side, latents=step.x, guidance_scale=CFG_SCALE,
            output_type="latent", **prompts,
        )
        return ends[1] - ends[0]

    pipe.scheduler.step = timed_step
    return run


def diffusers_runs(step: Step, config: UNetKwargs) -> tuple[dict[Key, Run], list[Row]]:
    """diffusers' plain, PAG and SAG steps, and rows that say why some are missing."""
    runs: dict[Key, Run] = {}
    missing: list[Row] = []
    unet = None
    for kind in KINDS:
        try:
            unet = unet or diffusers_unet(step.unet, config)
            runs["diffusers", kind] = diffusers_run(diffusers_pipeline(kind, unet), step)
        except ImportError:
            missing.append(Row("diffusers", kind, note="diffusers not installed"))
        except LookupError as error:
            missing.append(Row("diffusers", kind, note=str(error)))
    return runs, missing


def measure(layout: str, *, small: bool, device: str, dtype: torch.dtype, rounds: int, batch: int) -> list[Row]:
    """Runs all methods ``rounds`` times, interleaved, after one round to warm up."""
    config, latent = step_config(layout, small=small)
    flops = step_flops(config, METHODS, latent=latent, batch=batch)
    step = Step(random_unet(config, device=device, dtype=dtype), config, latent=latent, batch=batch)
    runs: dict[Key, Run] = {("ours", name): our_run(step, method) for name, method in METHODS.items()}
    their_runs, missing = diffusers_runs(step, config)
    runs |= their_runs
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    peaks: dict[Key, float] = {}
    with torch.no_grad(), fused_attention():
        for number in range(rounds + 1):
            for key, run in runs.items():
                before = torch.cuda.memory_allocated() if device == "cuda" else 0
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                taken = run()
                if device == "cuda":
                    peaks[key] = (torch.cuda.max_memory_allocated() - before) / 2**20
                if number:
                    seconds[key].append(taken)
    rows = []
    for (library, method), times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[library, "CFG"], strict=True))
        limit = flops[method] / flops["CFG"] if library == "ours" else None
        rows.append(Row(library, method, 1000 * statistics.median(times), ratio, limit, peaks.get((library, method))))
    return rows + missing


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table. "Over the limit" is the ratio of times over that of the counted operations."""
    lines = [
        "| library | step | ms | time / CFG | operations / CFG | over the limit | peak MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        over = row.ratio / row.flop_ratio if row.ratio and row.flop_ratio else None
        numbers = [
            (row.milliseconds, ".1f"), (row.ratio, ".3f"), (row.flop_ratio, ".3f"), (over, ".3f"),
            (row.peak_mib, ".0f"),
        ]
        cells = ["" if value is None else format(value, spec) for value, spec in numbers]
        lines.append("| " + " | ".join([row.library, row.method, cells[0] or row.note, *cells[1:]]) + " |")
    return "\n".join(lines)


def describe(device: str) -> dict[str, object]:
    """What the times depend on beside the benchmark's own options."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
