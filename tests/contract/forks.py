"""The double as a fork: order of rows, several calls, options handed down, popped control lists, replaced attentions.

``forked`` makes the double's CFG denoiser and its checkpoints those of Forge (``backend``) or reForge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import double
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_pag.demo.layers import (
    BasicTransformerBlock,
    ResBlock,
    SpatialTransformer,
    TimestepEmbedSequential,
    timestep_embedding,
)
from sag_pag.demo.unet import UNetModel

__name__ = "backend.double"  # what is written here plays the host's part, and is taken for the host's own
HERE = Path(__file__).parent
MEMORY = {"backend": "backend.memory_management", "ldm_patched": "ldm_patched.modules.model_management"}
COND, UNCOND = 0, 1


class ForkBlock(BasicTransformerBlock):
    """Changes its input in place, and asks ``patches_replace`` for its self-attention."""

    n_heads = d_head = 0
    attn_precision = "as the block says"

    def forward(self, x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:  # type: ignore[override]
        options = transformer_options
        told = {key: value for key, value in options.items() if key != "patches_replace"}
        n, place = self.norm1(x), (*options["block"], options["block_index"])
        replacement = options.get("patches_replace", {}).get("attn1", {}).get(place)
        if replacement is None:
            n = self.attn1(n)
        else:
            a = self.attn1
            told |= {"n_heads": a.heads, "dim_head": self.d_head, "attn_precision": self.attn_precision}
            n = a.to_out(replacement(a.to_q(n), a.to_k(n), a.to_v(n), told))
        x += n
        x += self.attn2(self.norm2(x), context=context)
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class ForkTransformer(SpatialTransformer):
    def forward(self, x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:  # type: ignore[override]
        blocks, made = self.transformer_blocks, nn.ModuleList()
        for index, block in enumerate(blocks):
            made.append(Told(block, index, transformer_options))
        self.transformer_blocks = made
        try:
            return super().forward(x, context)
        finally:
            self.transformer_blocks = blocks


class Told(nn.Module):
    """A transformer block with the options and its number."""

    def __init__(self, block: nn.Module, index: int, options: Any) -> None:
        super().__init__()
        self.of = [block]  # a list: not a child
        self.index, self.options = index, options

    def forward(self, h: Tensor, context: Any = None) -> Any:
        self.options["block_index"] = self.index
        return self.of[0](h, context=context, transformer_options=self.options)


def run_layers(block: nn.Module, h: Tensor, emb: Tensor, context: Any, options: Any) -> Tensor:
    for layer in block.children():
        if isinstance(layer, ResBlock):
            h = layer(h, emb)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, context, options)
            options["transformer_index"] += 1
        else:
            h = layer(h)
    return h


class ForkSequential(TimestepEmbedSequential):
    def forward(self, h: Tensor, emb: Tensor, context: Any = None, options: Any = None) -> Tensor:  # type: ignore[override]
        return run_layers(self, h, emb, context, options)


class ForkUNet(UNetModel):
    """Writes where it is into the options, and takes what ControlNet gave out of its lists."""

    runs_layers = False

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: Any = None, **_: Any,
    ) -> Tensor:
        options = transformer_options
        check_options(options, len(x))
        options["transformer_index"] = 0
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        emb = emb if y is None else emb + self.label_emb(y)

        def run(part: str, index: int, block: nn.Module, h: Tensor) -> Tensor:
            options["block"] = (part, index)
            make = run_layers if self.runs_layers else lambda block, *args: block(*args)
            return make(block, h, emb, context, options)

        h, skips = x, []
        for index, block in enumerate(self.input_blocks):
            h = run("input", index, block, h)
            skips.append(h)
        h = run("middle", 0, self.middle_block, h)
        if control is not None:
            h += control["middle"].pop()
        for index, block in enumerate(self.output_blocks):
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:
                h = F.interpolate(h, skip.shape[-2:], mode="nearest")
            h = run("output", index, block, torch.cat((h, skip), dim=1))
        assert options["transformer_index"] == sum(isinstance(m, SpatialTransformer) for m in self.modules())
        out: Tensor = self.out(h)
        return out


def check_options(options: Any, rows: int) -> None:
    """The options of a call are of the rows that it carries."""
    images = rows // len(options["cond_or_uncond"])
    kinds = [kind for kind in options["cond_or_uncond"] for _ in range(images)]
    assert len(kinds) == rows
    assert options["cond_mark"].tolist() == kinds
    assert options["cond_indices"] == [row for row, kind in enumerate(kinds) if kind == COND]
    assert options["uncond_indices"] == [row for row, kind in enumerate(kinds) if kind == UNCOND]


class Model:
    """What a U-Net patcher holds: gives x0 at noise levels."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.diffusion_model = checkpoint.model.diffusion_model
        self.inner = import_module("modules.sd_models").SigmaDenoiser(checkpoint)
        self.predictor = self.model_sampling = SimpleNamespace(
            timestep=lambda sigma: self.inner.sigma_to_t(sigma, quantize=True),
            calculate_denoised=self.calculate_denoised,
        )

    def memory_required(self, shape: list[int]) -> float:
        return float(shape[0])

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, **more: Any) -> Tensor:
        self.checkpoint.calls.append(len(x))
        self.checkpoint.before_call()
        assert len(x) == len(t) == len(c_crossattn)
        assert "control" not in more or more["control"] is None or more["control"]["middle"]
        s = t[:, None, None, None]
        shrunk = x * (1 + s**2).rsqrt()
        if (concat := more.pop("c_concat", None)) is not None:
            shrunk = torch.cat([shrunk, concat], dim=1)
        out: Tensor = self.diffusion_model(shrunk, self.inner.sigma_to_t(t), context=c_crossattn, **more)
        return self.calculate_denoised(t, out, x)

    def calculate_denoised(self, sigma: Tensor, out: Tensor, x: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        if self.checkpoint.parameterization == "v":
            return x / (1 + s**2) - out * s * (1 + s**2).rsqrt()
        return x - out * s


def calc_cond_uncond_batch(model: Any, cond: Any, uncond: Any, x: Tensor, sigma: Tensor, options: Any) -> list[Tensor]:
    """The chunks in one call or, without memory, each in one; the last prompt first, the unconditional one before."""
    free = import_module(MEMORY[model.checkpoint.fork]).FREE[0]
    to_run = [*((prompt, COND) for prompt in cond), *((prompt, UNCOND) for prompt in uncond or ())]
    total, weights = [torch.zeros_like(x), torch.zeros_like(x)], [1e-37, 1e-37]
    while to_run:
        same = [i for i, (c, _) in enumerate(to_run) if c["c_crossattn"].shape == to_run[0][0]["c_crossattn"].shape]
        same.reverse()
        batch = [to_run.pop(i) for i in (same if len(same) * len(x) < free else same[:1])]
        kinds = [kind for _, kind in batch]
        c = {
            key: torch.cat([prompt[key] for prompt, _ in batch]) for key in ("c_crossattn", "c_concat", "y")
            if key in batch[0][0]
        }
        marks = torch.tensor([kind for kind in kinds for _ in x], dtype=torch.float32)
        c["transformer_options"] = {
            **options.get("transformer_options", {}), "cond_or_uncond": kinds[:], "sigmas": sigma, "cond_mark": marks,
            "cond_indices": torch.where(marks == COND)[0].tolist(),
            "uncond_indices": torch.where(marks == UNCOND)[0].tolist(),
        }
        x_in, t = torch.cat([x] * len(batch)), torch.cat([sigma] * len(batch))
        if (control := batch[0][0].get("control")) is not None:
            control.transformer_options = c["transformer_options"]
            c["control"] = control.get_control(x_in, t, c.copy(), len(batch))
        wrapper = options.get("model_function_wrapper")
        args = {"input": x_in, "timestep": t, "c": c, "cond_or_uncond": kinds}
        out = model.apply_model(x_in, t, **c) if wrapper is None else wrapper(model.apply_model, args)
        for (prompt, kind), part in zip(batch, out.chunk(len(batch)), strict=True):
            total[kind] += part * prompt.get("strength", 1.0)
            weights[kind] += prompt.get("strength", 1.0)
    return [part / weight for part, weight in zip(total, weights, strict=True)]


def forward(
    self: Any, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float,
    image_cond: Tensor, model_options: Any = None,
) -> Tensor:
    """The fork's ``CFGDenoiser.forward``: no CFG-denoised callback, and samplers may replace post-CFG functions."""
    callbacks, shared, parser = (import_module(f"modules.{n}") for n in ("script_callbacks", "shared", "prompt_parser"))
    if shared.state.interrupted:
        raise import_module("modules.sd_samplers").InterruptedException
    self._switch_to_refiner(sigma)
    layout, tensor = parser.reconstruct(self.sampler.sampler_extra_args["cond"])
    uncond = parser.stack(self.sampler.sampler_extra_args["uncond"])
    params = callbacks.CFGDenoiserParams(x, image_cond, sigma, 0, self.total_steps, tensor, uncond, self)
    callbacks.run("cfg_denoiser", params)
    patcher = self.inner_model.inner_model.forge_objects.unet
    options = {**patcher.model_options, **(model_options or {})}

    def compiled(text: Any, **more: Any) -> dict[str, Any]:
        is_xl = isinstance(text, dict)
        made = {"c_crossattn": text["crossattn"], "y": text["vector"]} if is_xl else {"c_crossattn": text}
        if image_cond.shape[2:] == x.shape[2:]:
            made["c_concat"] = image_cond
        return {**made, "control": patcher.controlnet, **more}

    cut = import_module("modules.sd_samplers").cut
    conds = []
    for parts in zip(*layout, strict=True):  # the same sub-prompt of every image
        rows = [cut(params.text_cond, row, row + 1) for row, _ in parts]
        conds.append(compiled(import_module("modules.sd_samplers").join(rows), strength=parts[-1][1], **patcher.limits))
    given = (patcher.model, x, sigma, [compiled(params.text_uncond)], conds, cond_scale, options, 0)
    for modifier in options.get("conditioning_modifiers", ()):
        given = modifier(*given)
    model, x, sigma, unconds, conds, cond_scale, options, _ = given
    cond_out, uncond_out = calc_cond_uncond_batch(
        model, conds, None if cond_scale == 1 else unconds, x, sigma, options
    )
    strength = sum(prompt["strength"] for prompt in conds)
    denoised = uncond_out + (cond_out - uncond_out) * cond_scale * (1 if cond_scale == 1 else strength)
    for function in options.get("sampler_post_cfg_function", ()):
        denoised = function({"denoised": denoised, "model": model, "cond": conds, "uncond": unconds, "input": x,
                             "sigma": sigma, "model_options": options, "cond_denoised": cond_out})
    if self.mask is not None:
        denoised = self._blend(denoised, sigma)
    after = callbacks.AfterCFGCallbackParams(denoised, 0, self.total_steps)
    callbacks.run("cfg_after_cfg", after)
    self.step += 1
    result: Tensor = after.x
    return result


class Control:
    """A ControlNet unit: what it gives depends on the picture. ``pictures`` are the rows that it was asked for."""

    previous_controlnet = None

    def __init__(self) -> None:
        self.pictures: list[int] = []

    def get_control(self, x: Tensor, t: Tensor, c: Any, chunks: int) -> Any:
        self.pictures.append(len(x))
        assert len(self.transformer_options["cond_or_uncond"]) == chunks  # type: ignore[attr-defined]
        given = x.mean(dim=(1, 2, 3), keepdim=True) + t[:, None, None, None] / 10
        return {"input": [], "output": [], "middle": [given]}

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def make_fork(checkpoint: Any, kind: str) -> None:
    """A checkpoint as the fork holds it."""
    checkpoint.fork = kind
    unet = checkpoint.model.diffusion_model
    unet.__class__ = type("UNetModel", (ForkUNet,), {"runs_layers": kind == "ldm_patched"})
    for module in unet.modules():
        for old, new in ((BasicTransformerBlock, ForkBlock), (SpatialTransformer, ForkTransformer),
                         (TimestepEmbedSequential, ForkSequential)):
            if type(module) is old:
                module.__class__ = type(old.__name__, (new,), {})
        if isinstance(module, ForkBlock):
            attention = module.attn1
            module.n_heads, module.d_head = attention.heads, attention.to_q.out_features // attention.heads
    options = {"transformer_options": {}}
    patcher = SimpleNamespace(model=Model(checkpoint), model_options=options, controlnet=None, limits={})
    checkpoint.forge_objects = SimpleNamespace(unet=patcher)


@contextmanager
def forked(kind: str) -> Iterator[double.Host]:
    """A freshly started double of a fork with the extension in it."""
    names = ("modules_forge", "backend", "ldm_patched")
    paths = [str(HERE / "fork"), str(HERE / f"fork_{'ldm' if kind == 'ldm_patched' else 'backend'}")]
    sys.path[:0] = paths
    made, double._CHECKPOINTS = double._CHECKPOINTS, {}  # the others' stay those of A1111's WebUI
    try:
        with double.running(prepare=lambda: _prepare(kind)) as host:
            yield host
    finally:
        double._CHECKPOINTS = made
        for path in paths:
            sys.path.remove(path)
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]


def _prepare(kind: str) -> None:
    samplers, models = import_module("modules.sd_samplers"), import_module("modules.sd_models")
    samplers.CFGDenoiser.forward = forward
    make: Callable[..., None] = models.StableDiffusion.__init__

    def init(self: Any, name: str) -> None:
        make(self, name)
        make_fork(self, kind)

    models.StableDiffusion.__init__ = init
