"""Training of the demo model on pictures drawn as it goes: seeded, resumable, with a held-out loss.

Every step draws its own pictures, captions, timesteps and noise from a generator seeded by the run's seed and the
step's number, so a resumed run takes the very steps that an uninterrupted one takes. The learning rate is constant
until the last fifth (linear to zero there); how long to train may therefore be decided on the way.
"""

from __future__ import annotations

import csv
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sag_pag.demo import data
from sag_pag.demo.autoencoder import FACTOR, LATENT_CHANNELS, Autoencoder, train_autoencoder
from sag_pag.demo.model import DemoModel, save
from sag_pag.demo.progress import Progress
from sag_pag.demo.schedule import TIMESTEPS, angle_of

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 10**6
HELD_OUT = 512


@dataclass(frozen=True)
class TrainSettings:
    """What a run depends on. ``bf16`` computes the network in bfloat16 (autocast), its weights stay float32."""

    out: Path
    steps: int = 11_000
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.2
    ema: float = 0.999
    caption_dropout: float = 0.15
    seed: int = 0
    bf16: bool = False
    device: str = "cpu"
    checkpoint_every: int = 250
    autoencoder_steps: int = 3000
    held_out: int = HELD_OUT

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


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
    side = data.SIZE // FACTOR
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
        self.curve: list[tuple[int, float, float, float]] = []
        settings.out.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.settings.out / "checkpoint.pt"

    def save(self) -> None:
        """Write checkpoint, weights and loss curve; the checkpoint in one move, so that it is never half a file."""
        state = {name: getattr(self, name) for name in ("step", "seconds", "curve")}
        for name in ("model", "average", "optimiser"):
            state[name] = getattr(self, name).state_dict()
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)
        described = {name: value for name, value in asdict(self.settings).items() if name not in ("out", "device")}
        metadata = {"training": json.dumps({**described, "step": self.step, "seconds": round(self.seconds)})}
        if self.curve:
            metadata["held_out_loss"] = f"{self.curve[-1][2]:.5f}"
        save(self.average, self.settings.out / "weights.safetensors", metadata=metadata)
        with (self.settings.out / "loss.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "train_loss", "held_out_loss", "seconds"))
            writer.writerows((step, f"{loss:.5f}", f"{held:.5f}", round(s)) for step, loss, held, s in self.curve)

    def resume(self) -> bool:
        """Go on from the checkpoint in the output folder, if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
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
                    held_out = self.held_out_loss()
                    self.curve.append((self.step, sum(losses) / len(losses), held_out, self.seconds))
                    losses.clear()
                    self.save()
                    logger.info("step %d: held-out loss %.5f", self.step, held_out)
                note = f"held-out {self.curve[-1][2]:.4f}" if self.curve else ""
                bar.update(self.step, f"{f'loss {losses[-1]:.4f}, ' if losses else ''}{note}")


def prepared_autoencoder(settings: TrainSettings) -> Autoencoder:
    """The autoencoder in the output folder, trained first if there is none yet."""
    path, model = settings.out / "autoencoder.safetensors", Autoencoder()
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        settings.out.mkdir(parents=True, exist_ok=True)
        model = train_autoencoder(steps=settings.autoencoder_steps, bf16=settings.bf16)
        save_file(model.state_dict(), path)
    return model.eval().requires_grad_(False)


def train(settings: TrainSettings) -> Path:
    """Train, going on from an earlier run's checkpoint in the same folder; returns the weights' path."""
    trainer = Trainer(settings, prepared_autoencoder(settings))
    if trainer.resume():
        logger.info("going on from step %d", trainer.step)
    trainer.run()
    return settings.out / "weights.safetensors"
