"""The judge of ``evaluate``: a small network that says what a drawn picture shows, trained on the same pictures.

Its answers are compared with the caption; the layer before its answers gives the features of the Fréchet distance.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab import data
from sag_pag.demo.autoencoder import SIZE
from sag_pag.demo.captions import SLOTS, WORD_IDS
from sag_pag.demo.progress import Progress

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
FEATURES = 96
HELD_OUT_SEED = 2 * 10**6
HELD_OUT = 2000

ANSWERS = tuple(len(slot) + 1 for slot in SLOTS)
"""Answers a question (one question a caption slot): answer 0 is "there is none", answer k the slot's k-th word."""


def answers_of(ids: Tensor) -> Tensor:
    """``(B, 7)`` word ids of complete captions as answers: from vocabulary numbers to numbers within the slot."""
    first = torch.tensor([WORD_IDS[slot[0]] - 1 for slot in SLOTS], device=ids.device)
    return torch.where(ids == 0, ids, ids - first)


class _Block(nn.Module):
    """Halve the size, then refine as a residual."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
        self.refine = nn.Sequential(
            nn.GroupNorm(8, out_channels), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.norm = nn.GroupNorm(8, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return F.silu(self.norm(h + self.refine(h)))


class Classifier(nn.Module):
    """``(B, 3, 64, 64)`` RGB in 0 to 1 to features and to one distribution for each caption slot."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_Block(3, 24), _Block(24, 48), _Block(48, 96), _Block(96, 96))
        self.features = nn.Linear(96 * (SIZE // 16) ** 2, FEATURES)
        self.heads = nn.Linear(FEATURES, sum(ANSWERS))

    def embed(self, pictures: Tensor) -> Tensor:
        """``(B, 96)`` features."""
        out: Tensor = self.features(self.body(pictures * 4 - 2).flatten(1))
        return out

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Logits of each slot's answers."""
        return self.answers(self.embed(pictures))

    def answers(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits of each slot's answers, from the features."""
        logits: Tensor = self.heads(F.silu(features))
        return tuple(torch.split(logits, list(ANSWERS), dim=1))


def agreement(logits: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """``(B,)`` share of each caption's words that the classifier sees too (1 for an empty caption)."""
    answers = answers_of(ids)
    seen = torch.stack([slot.argmax(dim=1) for slot in logits], dim=1) == answers
    asked = ids != 0
    return torch.where(asked.any(dim=1), (seen & asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1), 1.0)


def draw(size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Pictures and their answers for one step."""
    generator = torch.Generator().manual_seed(seed * 10**9 + step)
    scenes = data.draw_scenes(size, generator)
    return data.render(scenes), answers_of(data.caption_ids(scenes))


def loss_of(logits: tuple[Tensor, ...], answers: Tensor) -> Tensor:
    """Cross-entropy, summed over the slots."""
    losses = [F.cross_entropy(slot, answers[:, index]) for index, slot in enumerate(logits)]
    return torch.stack(losses).sum()


def train_classifier(*, steps: int = 2000, batch: int = 64, learning_rate: float = 2e-3, seed: int = 1) -> Classifier:
    """Train from scratch; about three minutes on one core."""
    torch.manual_seed(seed)
    model = Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    with Progress("classifier", steps) as bar:
        for step in range(steps):
            pictures, answers = draw(batch, seed=seed, step=step)
            loss = loss_of(model(pictures), answers)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            bar.update(step + 1, f"loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: Classifier, *, count: int | None = None) -> list[float]:
    """Share of right answers to each slot's question on ``HELD_OUT`` pictures that training never drew."""
    pictures, answers = draw(count or HELD_OUT, seed=HELD_OUT_SEED, step=0)
    logits = model(pictures)
    return [(slot.argmax(dim=1) == answers[:, index]).double().mean().item() for index, slot in enumerate(logits)]


def save_classifier(model: Classifier, path: Path = WEIGHTS) -> None:
    """Write the weights as fp16 safetensors."""
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The classifier with the weights of a file, in float32 and without gradients."""
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
