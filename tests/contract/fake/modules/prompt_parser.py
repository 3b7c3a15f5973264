"""Prompts joined by AND, each part with a weight, as conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class DictWithShape(dict[str, Any]):
    """A batch of SDXL's conditions; its shape is that of the tokens."""

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self["crossattn"].shape
        return shape


@dataclass
class ComposableScheduledPromptConditioning:
    schedules: Any  # here the condition itself: no prompt editing
    weight: float = 1.0


@dataclass
class MulticondLearnedConditioning:
    shape: tuple[int, ...]
    batch: list[list[ComposableScheduledPromptConditioning]]


def split_weight(part: str) -> tuple[str, float]:
    """``"a cat :0.5"`` as the text and 0.5."""
    text, colon, weight = part.rpartition(":")
    return (text.strip(), float(weight)) if colon else (part.strip(), 1.0)


def learned(model: Any, prompts: list[str]) -> MulticondLearnedConditioning:
    batch = []
    for prompt in prompts:
        parts = [split_weight(part) for part in prompt.split(" AND ")]
        batch.append([ComposableScheduledPromptConditioning(model.encode(text), weight) for text, weight in parts])
    return MulticondLearnedConditioning((len(prompts),), batch)


def stack(conds: list[Any]) -> Any:
    """Conditions as one batch, short ones filled up with their last token."""
    if isinstance(conds[0], dict):
        return DictWithShape({key: stack([cond[key] for cond in conds]) for key in conds[0]})
    if conds[0].ndim == 1:
        return torch.stack(conds)
    longest = max(len(cond) for cond in conds)
    return torch.stack([torch.cat([cond, cond[-1:].repeat(longest - len(cond), 1)]) for cond in conds])


def reconstruct(multicond: MulticondLearnedConditioning) -> tuple[list[list[tuple[int, float]]], Any]:
    """For each image the rows of its parts with their weights, and all rows."""
    rows, layout = [], []
    for parts in multicond.batch:
        layout.append([(len(rows) + offset, part.weight) for offset, part in enumerate(parts)])
        rows += [part.schedules for part in parts]
    return layout, stack(rows)
