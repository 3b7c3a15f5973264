"""Training of the demo model on pictures drawn as it goes: seeded, resumable, with a held-out loss.

Every step draws its own pictures, captions, timesteps and noise from a generator seeded by the run's seed and the
step's number, so a resumed run takes the very steps that an uninterrupted one takes. The learning rate is constant
until the last fifth (linear to zero there); how long to train may therefore be decided until then. A finished run may
be gone on with; its weights say so.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lab import data
from lab.autoencoder import train_autoencoder
from lab.files import written_whole
from sag_pag.demo.autoencoder import FACTOR, LATENT_CHANNELS, SIZE, Autoencoder
from sag_pag.demo.model import DemoModel, save
from sag_pag.demo.progress import Progress
from sag_pag.demo.schedule import TIMESTEPS, angle_of

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 10**6
"""Training's own seeds are below it."""
HELD_OUT = 512


class TrainError(ValueError):
    """Settings that can't be used, in general or in this folder; the message is one line for the user."""


@dataclass(frozen=True)
class TrainSettings:
    """What a run depends on. ``bf16`` computes the network in bfloat16 (autocast), its weights stay float32."""

    out: Path
    steps: int = 22_000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.2
    ema: float = 0.999
    caption_dropout: float = 0.15
    seed: int = 0
    bf16: bool = True
    device: str = "cpu"
    checkpoint_every: int = 250
    autoencoder_steps: int = 3000
    held_out: int = HELD_OUT

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every", "held_out", "autoencoder_steps"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}: {getattr(self, name)} can't be used; allowed: a whole number from 1 on")
        if not 0 < self.learning_rate < math.inf:
            raise TrainError(f"learning_rate: {self.learning_rate} can't be used; allowed: a number above 0")
        if not 0 <= self.seed < HELD_OUT_SEED:
            raise TrainError(f"seed: {self.seed} can't be used; allowed: a whole number from 0 to {HELD_OUT_SEED - 1}")

    @property
    def described(self) -> dict[str, object]:
        """What the weights depend on."""
        apart = ("out", "device", "checkpoint_every")
        return {name: value for name, value in asdict(self).items() if name not in apart}

    @property
    def slows_down_at(self) -> int:
        """The step from which the learning rate falls."""
        return round((1 - self.decay) * self.steps)


@dataclass(frozen=True)
class Batch:
    """Pictures, their latents' noise, timesteps ``(B,)`` and word ids ``(B, 7)``."""

    pictures: Tensor
    noise: Tensor
    timesteps: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def draw_batch(size: int, *, seed: int, step: int, caption_dropout: float) -> Batch:
    """One step's batch. Timesteps are stratified: one in each ``1/size`` of their range."""
    generator = torch.Generator().manual_seed(seed * 10**9 + step)
    scenes = data.draw_scenes(size, generator)
    ids = data.caption_ids(scenes, generator)
    ids[torch.rand(size, generator=generator) < caption_dropout] = 0
    strata = torch.arange(size) + torch.rand(size, generator=generator)
    side = SIZE // FACTOR
    noise = torch.randn(size, LATENT_CHANNELS, side, side, generator=generator)
    return Batch(data.render(scenes), noise, strata * ((TIMESTEPS - 1) / size), ids)


def loss_of(model: DemoModel, batch: Batch, *, device: str, bf16: bool) -> Tensor:
    """Mean squared error of the predicted v."""
    angle = angle_of(batch.timesteps).float()[:, None, None, None].to(device)
    noise = batch.noise.to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            latent = model.first_stage_model.encode(batch.pictures.to(device)).float()
        x, v = angle.cos() * latent + angle.sin() * noise, angle.cos() * noise - angle.sin() * latent
        predicted = model(x, batch.timesteps.to(device), batch.ids.to(device))
    return F.mse_loss(predicted.float(), v)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, constant, linear to zero over the last ``decay`` of the run."""
    left = (settings.steps - step) / max(settings.decay * settings.steps, 1)
    return settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1), left)


class Trainer:
    """A run and its state: model, moving average, optimiser, step."""

    def __init__(self, settings: TrainSettings, autoencoder: Autoencoder) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.model = DemoModel()
        self.model.first_stage_model.load_state_dict(autoencoder.state_dict())
        self.model.first_stage_model.requires_grad_(False)
        self.model.to(settings.device)
        self.average = DemoModel().to(settings.device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        self.seconds = 0.0
        self.finished: list[int] = []
        """Numbers of steps of earlier runs that came to their end and were gone on with."""
        self.curve: list[tuple[int, float, float, float]] = []
        settings.out.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.settings.out / "checkpoint.pt"

    def save(self) -> None:
        """Write checkpoint, weights and loss curve."""
        described = self.settings.described
        state = {name: getattr(self, name) for name in ("step", "seconds", "curve", "finished")}
        state["settings"] = described
        for name in ("model", "average", "optimiser"):
            state[name] = getattr(self, name).state_dict()
        with written_whole(self.checkpoint) as partial:
            torch.save(state, partial)
        taken = {"step": self.step, "seconds": round(self.seconds), "finished": self.finished}
        metadata = {"training": json.dumps({**described, **taken})}
        if self.curve:
            metadata["held_out_loss"] = f"{self.curve[-1][2]:.5f}"
        save(self.average, self.settings.out / "weights.safetensors", metadata=metadata)
        with (self.settings.out / "loss.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "train_loss", "held_out_loss", "seconds"))
            writer.writerows((step, f"{loss:.5f}", f"{held:.5f}", round(s)) for step, loss, held, s in self.curve)

    def resume(self) -> bool:
        """Go on from the checkpoint in the output folder, if there is one.

        Raises :class:`TrainError` if that is of a run with other settings, or if its learning rate has begun to fall
        towards another number of steps.
        """
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
        self.finished = _finished(self.settings, state)
        for name in ("model", "average", "optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = [tuple(row) for row in state["curve"]]
        return True

    def advance(self) -> float:
        """One step; returns its loss."""
        settings = self.settings
        batch = draw_batch(settings.batch, seed=settings.seed, step=self.step, caption_dropout=settings.caption_dropout)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        loss = loss_of(self.model, batch, device=settings.device, bf16=settings.bf16)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.step += 1
        keep = min(settings.ema, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The averaged weights' loss on pictures that training never draws, always the same ones."""
        settings, total = self.settings, 0.0
        for index, start in enumerate(range(0, settings.held_out, 64)):
            size = min(64, settings.held_out - start)
            batch = draw_batch(size, seed=HELD_OUT_SEED, step=index, caption_dropout=settings.caption_dropout)
            total += size * loss_of(self.average, batch, device=settings.device, bf16=settings.bf16).item()
        return total / settings.held_out

    def run(self) -> None:
        """Train to the last step, with a checkpoint now and then."""
        settings, began, before, losses = self.settings, time.monotonic(), self.seconds, list[float]()
        with Progress("training", settings.steps, start=self.step) as bar:
            while self.step < settings.steps:
                losses.append(self.advance())
                if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
                    self.seconds = before + time.monotonic() - began
                    self.curve.append((self.step, sum(losses) / len(losses), self.held_out_loss(), self.seconds))
                    losses.clear()
                    self.save()
                note = f"held-out {self.curve[-1][2]:.4f}" if self.curve else ""
                bar.update(self.step, f"{f'loss {losses[-1]:.4f}, ' if losses else ''}{note}")


def _refuse_others(settings: TrainSettings, found: Mapping[str, object]) -> None:
    """Raises :class:`TrainError` if a run was begun with other values than those of the settings."""
    others = [f"{name} {value}, not {wanted}" for name, value in found.items()
              if value != (wanted := settings.described[name])]  # fmt: skip
    if others:
        raise TrainError(f"the run in {settings.out} was begun with {'; '.join(others)}: use these or another --out")


def _finished(settings: TrainSettings, state: Mapping[str, Any]) -> list[int]:
    """The runs that a checkpoint's was begun from, its own among them if it is gone on with after its end."""
    before: dict[str, Any] = dict(state["settings"])
    step, steps = state["step"], before.pop("steps")
    _refuse_others(settings, before)
    finished: list[int] = state["finished"]
    if step > settings.steps:
        raise TrainError(f"steps: {settings.steps} can't be used; the run in {settings.out} has taken {step} already")
    if steps == settings.steps or step <= min(replace(settings, steps=steps).slows_down_at, settings.slows_down_at):
        return finished
    if step < steps:
        raise TrainError(f"steps: {settings.steps} can't be used; the run in {settings.out} nears its end at {steps}")
    return [*finished, steps]


def prepared_autoencoder(settings: TrainSettings) -> Autoencoder:
    """The autoencoder in the output folder, trained first if there is none yet.

    Raises :class:`TrainError` if it was trained with other settings.
    """
    path, model = settings.out / "autoencoder.safetensors", Autoencoder()
    about = {"autoencoder_steps": settings.autoencoder_steps, "bf16": settings.bf16}
    if path.exists():
        with safe_open(path, framework="pt") as file:
            _refuse_others(settings, json.loads(file.metadata()["training"]))
        model.load_state_dict(load_file(path))
    else:
        settings.out.mkdir(parents=True, exist_ok=True)
        model = train_autoencoder(steps=settings.autoencoder_steps, bf16=settings.bf16)
        with written_whole(path) as partial:
            save_file(model.state_dict(), partial, metadata={"training": json.dumps(about)})
    return model.eval().requires_grad_(False)


def train(settings: TrainSettings) -> Path:
    """Train, going on from an earlier run's checkpoint in the same folder; returns the weights' path.

    Raises :class:`TrainError` as :meth:`Trainer.resume` does.
    """
    trainer = Trainer(settings, prepared_autoencoder(settings))
    if trainer.resume():
        logger.info("going on from step %d of %d", trainer.step, settings.steps)
    trainer.run()
    return settings.out / "weights.safetensors"
