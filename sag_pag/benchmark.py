"""What a guided step costs: ``python -m sag_pag.benchmark --help``.

Times one sampling step (two rows an image, conditional and unconditional) without guidance, with PAG, SAG and both, on
a U-Net of random weights, and diffusers' own pipelines on the same weights where diffusers is installed. Steps are
interleaved, so that a machine that gets slower or faster does so for all; each ratio is the median over the rounds of
the step's time over that of the plain step of the same round and library. Beside it stands the ratio of the counted
floating-point operations, which is the same on every machine and what the time would be if nothing else took any.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sag_pag.blocks import Topology
from sag_pag.demo.unet import CrossAttention, UNetKwargs, UNetModel, redraw_, sd2_config, sd15_config, sdxl_config
from sag_pag.session import GuidedStep, RowLayout, SigmaSpace, plan_step
from sag_pag.settings import Settings

CONFIGS: dict[str, Callable[[], UNetKwargs]] = {"sd1": sd15_config, "sd2": sd2_config, "sdxl": sdxl_config}
LATENTS = {"sd1": 64, "sd2": 64, "sdxl": 128}
OFF = Settings()
METHODS: dict[str, tuple[Settings, bool]] = {
    "CFG": (OFF, False),
    "PAG": (Settings(pag_enabled=True), False),
    "PAG, own call": (Settings(pag_enabled=True), True),
    "SAG": (Settings(sag_enabled=True), False),
    "SAG and PAG": (Settings(sag_enabled=True, pag_enabled=True), False),
}
Key = tuple[str, str]  # library and method
CFG_SCALE, SIGMA, TIMESTEP, TOKENS = 7.5, 3.0, 500.0, 77


def step_config(layout: str, *, small: bool = False) -> tuple[UNetKwargs, int]:
    """The U-Net's arguments and the latent's side; ``small`` is a fifth of the width and half the side."""
    config = CONFIGS[layout]()
    if small:
        config["model_channels"] = 64
    return config, LATENTS[layout] // 2 if small else LATENTS[layout]


class Step:
    """One sampling step of ``batch`` images: a U-Net and what it is given."""

    def __init__(self, unet: UNetModel, config: UNetKwargs, *, latent: int, batch: int = 1) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=next(unet.parameters()).device, dtype=unet.dtype)

        self.unet, self.batch = unet, batch
        self.x = normal(batch, 4, latent, latent)
        self.cond = {"crossattn": normal(2 * batch, TOKENS, config["context_dim"])}
        vector = config.get("adm_in_channels")
        if vector is not None:
            self.cond["vector"] = normal(2 * batch, vector)

    def denoise(self, x: Tensor, sigma: Tensor, *, cond: dict[str, Tensor]) -> Tensor:
        """x0 by a U-Net that predicts eps."""
        s = sigma[:, None, None, None]
        t = torch.full_like(sigma, TIMESTEP)
        eps: Tensor = self.unet(x / (s * s + 1).sqrt(), t, cond["crossattn"], cond.get("vector"))
        return x - s * eps

    def run(self, settings: Settings = OFF, *, own_call: bool = False) -> Tensor:
        """The step's guided x0, ``(batch, 4, latent, latent)``; half way through the generation."""
        topology = Topology(self.unet)
        plan = plan_step(settings, topology, progress=0.5)
        x = torch.cat([self.x, self.x])
        sigma = torch.full((len(x),), SIGMA, device=x.device, dtype=x.dtype)
        if plan is None:
            return _cfg(self.denoise(x, sigma, cond=self.cond))
        layout = RowLayout(conds=tuple((image, 1.0) for image in range(self.batch)), images=self.batch)
        step = GuidedStep(
            self.denoise, plan, topology=topology, layout=layout, space=SigmaSpace(), own_call=own_call
        )
        out = step(x, sigma, cond=self.cond)
        step.finish()
        return step.apply(_cfg(out))


def _cfg(out: Tensor) -> Tensor:
    cond, uncond = out.chunk(2)
    return uncond + CFG_SCALE * (cond - uncond)


def step_flops(
    config: UNetKwargs, settings: Settings = OFF, *, latent: int, batch: int = 1, own_call: bool = False,
) -> int:
    """Floating-point operations of one step: matrix products and convolutions, a multiply-add being two.

    Counted on tensors without data, so it takes no memory, and a second or two for any model.
    """
    with FakeTensorMode(), torch.no_grad():
        step = Step(UNetModel(**config), config, latent=latent, batch=batch)
        with FlopCounterMode(display=False) as counter:
            step.run(settings, own_call=own_call)
    return int(counter.get_total_flops())


def random_unet(config: UNetKwargs, *, device: str, dtype: torch.dtype) -> UNetModel:
    """A U-Net with every parameter drawn at random."""
    with torch.device("meta"):
        unet = UNetModel(**config)
    unet = unet.to(dtype).to_empty(device=device)
    redraw_(unet, seed=0)
    return unet.eval().requires_grad_(False)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Runs with torch's fused kernel on the attention class, as the WebUI's attention optimisations do."""
    def forward(self: CrossAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        result: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result

    original = CrossAttention.forward
    CrossAttention.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        CrossAttention.forward = original  # type: ignore[method-assign]


def diffusers_unet(unet: UNetModel, config: UNetKwargs) -> Any:
    """diffusers' U-Net with the same weights, by diffusers' own conversion. Raises ``ImportError`` without diffusers."""
    diffusers = importlib.import_module("diffusers")
    convert = importlib.import_module("diffusers.pipelines.stable_diffusion.convert_from_ckpt")
    vae = {"params": {"ddconfig": {"ch_mult": (1, 2, 4, 4)}}}
    params = {"unet_config": {"params": {"transformer_depth": 1, **config}}, "first_stage_config": vae}
    made = convert.create_unet_diffusers_config({"model": {"params": params}}, image_size=512)
    theirs = diffusers.UNet2DConditionModel(**made)
    weights = dict(unet.state_dict())  # its own dict: conversion takes entries out
    theirs.load_state_dict(convert.convert_ldm_unet_checkpoint(weights, made, skip_extract_state_dict=True))
    return theirs.eval().requires_grad_(False).to(device=next(unet.parameters()).device, dtype=unet.dtype)


def diffusers_pipeline(kind: str, unet: Any, **options: Any) -> Any:
    """diffusers' ``CFG``, ``PAG`` or ``SAG`` pipeline around its U-Net, without text encoders and VAE; DDIM on
    Stable Diffusion's betas. Raises ``LookupError`` if it has none for this layout."""
    diffusers = importlib.import_module("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet, **options}
    parts["scheduler"] = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )
    family = "StableDiffusion"
    if unet.config.addition_embed_type == "text_time":
        family += "XL"
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    name = f"{family}{'' if kind == 'CFG' else kind}Pipeline"
    if name == "StableDiffusionXLSAGPipeline":
        raise LookupError("diffusers has no SAG for SDXL")
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_step(pipe: Any, step: Step) -> Callable[[], float]:
    """A function that runs the pipeline for two steps and gives the seconds of the second, without set-up."""
    cond, uncond = step.cond["crossattn"].chunk(2)
    prompts = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    if "vector" in step.cond:
        pooled = step.cond["vector"][:, :1280].chunk(2)
        prompts |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    ends: list[float] = []
    scheduler_step = pipe.scheduler.step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        _wait(step.x.device)
        ends.append(time.perf_counter())
        return scheduler_step(*args, **kwargs)

    def run() -> float:
        ends.clear()
        side = 8 * step.x.shape[-1]
        pipe(num_inference_steps=2, height=side, width=side, latents=step.x, guidance_scale=CFG_SCALE,
             output_type="latent", **prompts)
        return ends[1] - ends[0]

    pipe.scheduler.step = timed_step
    return run


def diffusers_steps(step: Step, config: UNetKwargs) -> tuple[dict[Key, Callable[[], float]], dict[Key, str]]:
    """diffusers' plain, PAG and SAG steps, and why some are missing."""
    runs: dict[Key, Callable[[], float]] = {}
    notes: dict[Key, str] = {}
    unet = None
    for kind in ("CFG", "PAG", "SAG"):
        try:
            unet = unet or diffusers_unet(step.unet, config)
            runs["diffusers", kind] = diffusers_step(diffusers_pipeline(kind, unet), step)
        except ImportError:
            notes["diffusers", kind] = "diffusers not installed"
        except LookupError as error:
            notes["diffusers", kind] = str(error)
    return runs, notes


def our_step(step: Step, settings: Settings, own_call: bool) -> Callable[[], float]:
    """A function that runs the step by the engine and gives its seconds."""
    def run() -> float:
        _wait(step.x.device)
        start = time.perf_counter()
        step.run(settings, own_call=own_call)
        _wait(step.x.device)
        return time.perf_counter() - start

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Row:
    """One method's result; ``note`` instead of numbers where it could not run."""

    library: str
    method: str
    milliseconds: float | None = None
    ratio: float | None = None
    flop_ratio: float | None = None
    peak_mib: float | None = None
    note: str = ""


def measure(
    layout: str, *, small: bool, device: str, dtype: torch.dtype, rounds: int, batch: int,
) -> list[Row]:
    """Runs all methods ``rounds`` times, interleaved, after one run to warm up."""
    config, latent = step_config(layout, small=small)
    flops = {
        name: step_flops(config, settings, latent=latent, batch=batch, own_call=own_call)
        for name, (settings, own_call) in METHODS.items()
    }
    step = Step(random_unet(config, device=device, dtype=dtype), config, latent=latent, batch=batch)
    runs = {("ours", name): our_step(step, *method) for name, method in METHODS.items()}
    their_runs, notes = diffusers_steps(step, config)
    runs |= their_runs
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    peaks: dict[Key, float] = {}
    with torch.no_grad(), fused_attention():
        for number in range(rounds + 1):
            for key, run in runs.items():
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                taken = run()
                if device == "cuda":
                    peaks[key] = torch.cuda.max_memory_allocated() / 2**20
                if number:
                    seconds[key].append(taken)
    rows = []
    for (library, method), times in seconds.items():
        plain = seconds[library, "CFG"]
        ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
        limit = flops[method] / flops["CFG"] if library == "ours" else None
        rows.append(Row(library, method, 1000 * statistics.median(times), ratio, limit, peaks.get((library, method))))
    return rows + [Row(library, method, note=note) for (library, method), note in notes.items()]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table. "Over the limit" is the time's ratio over that of the counted operations."""
    lines = [
        "| library | step | ms | time / CFG | operations / CFG | over the limit | peak MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        over = row.ratio / row.flop_ratio if row.ratio and row.flop_ratio else None
        numbers = [(row.milliseconds, ".1f"), (row.ratio, ".3f"), (row.flop_ratio, ".3f"), (over, ".3f")]
        cells = ["" if value is None else format(value, spec) for value, spec in [*numbers, (row.peak_mib, ".0f")]]
        cells[0] = cells[0] or row.note
        lines.append("| " + " | ".join([row.library, row.method, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sag_pag.benchmark", description="Time guided sampling steps.")
    parser.add_argument("--layout", choices=CONFIGS, nargs="+", default=["sd1"], help="which U-Nets; sd1 if not given")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="full: the model's own size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=10, help="how often each method is timed")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args(arguments)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    about = {
        "torch": torch.__version__, "device": device_name, "threads": torch.get_num_threads(), "dtype": options.dtype,
        "size": options.size, "batch": options.batch, "steps": options.steps,
    }
    results = {}
    for layout in options.layout:
        rows = measure(
            layout, small=options.size == "small", device=options.device, dtype=getattr(torch, options.dtype),
            rounds=options.steps, batch=options.batch,
        )
        results[layout] = [asdict(row) for row in rows]
        heading = ", ".join(f"{key} {value}" for key, value in about.items())
        sys.stdout.write(f"{layout}: {heading}\n\n{table(rows)}\n\n")
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
