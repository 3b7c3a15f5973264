"""A generation from its settings to latents and their metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from modules import prompt_parser, scripts, shared
from modules.sd_models import StableDiffusion, seeded
from modules.sd_samplers import Sampler

SIZE = (8, 6)  # of the latents
HIRES = (12, 10)


@dataclass
class Processing:
    """One generation: what the user asked for, and what has become of it."""

    prompt: str = "a small cat"
    negative_prompt: str = "blurry"
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 3
    cfg_scale: float = 7.0
    sampler_name: str = "Euler"
    seed: int = 0
    scripts: scripts.ScriptRunner | None = None
    script_args: Any = ()
    checkpoint: StableDiffusion | None = None
    refiner: StableDiffusion | None = None
    refiner_switch_at: float = 0.5
    hr_checkpoint: StableDiffusion | None = None
    image_cfg_scale: float | None = None
    s_min_uncond: float = 0.0
    nmask: Tensor | None = None
    init_latent: Tensor | None = None
    enable_hr: bool = False
    override_settings: dict[str, Any] = field(default_factory=dict)
    callback: Callable[[int], None] = lambda step: None
    extra_generation_params: dict[str, Any] = field(default_factory=dict)
    is_hr_pass: bool = field(default=False, init=False)
    iteration: int = field(default=0, init=False)
    batch_index: int = field(default=0, init=False)
    c: Any = field(default=None, init=False)
    uc: Any = field(default=None, init=False)

    @property
    def refiner_checkpoint_info(self) -> Any:
        return None if self.refiner is None else self.refiner.sd_checkpoint_info

    @property
    def hr_checkpoint_info(self) -> Any:
        return None if self.hr_checkpoint is None else self.hr_checkpoint.sd_checkpoint_info

    @property
    def mask(self) -> Tensor | None:
        return None if self.nmask is None else 1 - self.nmask

    def setup_conds(self) -> None:
        """One prompt for all images, or one for each, separated by line breaks."""
        prompts = (self.prompt.split("\n") * self.batch_size)[: self.batch_size]
        self.c = prompt_parser.learned(shared.sd_model, prompts)
        self.uc = [shared.sd_model.encode(self.negative_prompt)] * self.batch_size

    def image_conditioning(self) -> Tensor:
        unet = shared.sd_model.model.diffusion_model
        if unet.in_channels == 4:
            return torch.zeros(self.batch_size, 5, 1, 1)
        size = HIRES if self.is_hr_pass else SIZE
        return seeded(f"image {self.seed}", self.batch_size, unet.in_channels - 4, *size)

    def noise(self, size: tuple[int, int]) -> Tensor:
        return seeded(f"noise {self.seed} {self.iteration} {self.is_hr_pass}", self.batch_size, 4, *size)

    def sample(self, **_: Any) -> Tensor:
        sampler = Sampler(self.sampler_name)
        latent = sampler.sample(self, self.noise(SIZE), steps=self.steps, callback=self.callback)
        if not self.enable_hr:
            return latent
        self.is_hr_pass = True
        if self.hr_checkpoint is not None:
            shared.sd_model = self.hr_checkpoint
            self.setup_conds()
        larger = torch.nn.functional.interpolate(latent, HIRES) + self.noise(HIRES)
        latent = Sampler(self.sampler_name).sample(self, larger, steps=self.steps, callback=self.callback)
        self.is_hr_pass = False
        return latent


StableDiffusionProcessingTxt2Img = StableDiffusionProcessingImg2Img = Processing


@dataclass
class Processed:
    latents: list[Tensor]
    infotexts: list[str]
    images: list[Any] = field(default_factory=list)
    index_of_first_image: int = 0


def create_infotext(p: Processing) -> str:
    fields = {
        "Steps": p.steps, "Sampler": p.sampler_name, "CFG scale": p.cfg_scale, "Seed": p.seed,
        **p.extra_generation_params,
    }

    def quoted(value: Any) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text

    return p.prompt + "\n" + ", ".join(f"{key}: {quoted(value)}" for key, value in fields.items())


def process_images(p: Processing) -> Processed:
    checkpoint = p.checkpoint or shared.sd_model
    shared.sd_model = checkpoint
    latents, infotexts = [], []
    if p.scripts is not None:
        p.scripts.run_all("process", p)
    with torch.no_grad():
        for iteration in range(p.n_iter):
            p.iteration = iteration
            if shared.state.interrupted:
                break
            shared.sd_model = checkpoint  # a refiner may have taken over
            if p.scripts is not None:
                p.scripts.run_all("process_batch", p, batch_number=p.iteration)
            p.setup_conds()
            samples = p.sample(conditioning=p.c, unconditional_conditioning=p.uc)
            latents += list(samples)
            if p.scripts is not None:
                p.scripts.run_all("postprocess_batch", p, samples, batch_number=p.iteration)
            for index in range(len(samples)):
                p.batch_index = index
                if p.scripts is not None:
                    p.scripts.run_all("postprocess_image", p, SimpleNamespace(image=Image.new("RGB", (64, 48))))
                infotexts.append(create_infotext(p))
        processed = Processed(latents, infotexts)
        if p.scripts is not None:
            p.scripts.run_all("postprocess", p, processed)
    return processed


def answer(runner: scripts.ScriptRunner, p: Processing, alwayson: dict[str, list[Any]]) -> tuple[int, Any]:
    """What the API does with a request: status and body."""
    p.scripts, p.script_args = runner, tuple(runner.arguments(alwayson))
    try:
        return 200, process_images(p)
    except Exception as error:  # noqa: BLE001 - as the host's middleware
        about = {name: vars(error).get(name, "") for name in ("detail", "body")}
        return vars(error).get("status_code", 500), {**about, "error": type(error).__name__, "errors": str(error)}
