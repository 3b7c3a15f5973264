"""Captions of the drawn pictures: their words, their grammar, and the encoder that turns them into a context.

A caption reads ``[small|big] [colour] shape [and [small|big] [colour] shape] [on colour]``, the left object
first: "red star on green", "small white moon and big red heart on blue". Every part is optional and the
empty caption is the unconditional one. A caption becomes seven tokens, one a slot: slots, not word order, tell the
first object's colour from the second's and from the background's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = ("small", "big")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "heart", "moon")

SLOTS = (SIZES, COLOURS, SHAPES, SIZES, COLOURS, SHAPES, COLOURS)
"""What each of the seven slots may hold: left object, right object, background."""

SIZE_SLOTS, SHAPE_SLOTS = (
    tuple(index for index, slot in enumerate(SLOTS) if slot is words) for words in (SIZES, SHAPES)
)
"""Where the left and the right object's sizes and shapes stand."""

VOCABULARY = ("", *SIZES, *COLOURS, *SHAPES)
WORD_IDS = {word: index for index, word in enumerate(VOCABULARY)}
CONTEXT_DIM = 64

_SECTIONS = {"": (0, 3), "and": (3, 6), "on": (6, 7)}
"""The word that opens a part of the caption, and the slots of that part."""
_ARTICLES = frozenset(("a", "an", "the"))


class CaptionError(ValueError):
    """A caption that the model cannot read; the message is one line for the user."""


def parse(caption: str) -> list[int]:
    """The seven word ids of a caption, 0 where a slot is empty. Raises :class:`CaptionError`."""
    ids = [0] * len(SLOTS)
    slot, end = _SECTIONS[""]
    words = [word for word in caption.lower().replace(",", " ").split() if word not in _ARTICLES]
    for word in words:
        if word in _SECTIONS:
            start, stop = _SECTIONS[word]
            if stop <= end or (word == "and" and not any(ids)):
                raise CaptionError(f"{word!r} is out of place in {caption!r}")
            slot, end = start, stop
            continue
        if word not in WORD_IDS:
            raise CaptionError(f"unknown word {word!r}; known are {', '.join((*VOCABULARY[1:], 'and', 'on'))}")
        fitting = [index for index in range(slot, end) if word in SLOTS[index]]
        if not fitting:
            raise CaptionError(f"{word!r} is out of place in {caption!r}; write it like 'small red star on green'")
        ids[fitting[0]] = WORD_IDS[word]
        slot = fitting[0] + 1
    if words and words[-1] in _SECTIONS:
        raise CaptionError(f"{caption!r} ends in {words[-1]!r}")
    return ids


def describe(ids: list[int]) -> str:
    """The caption of seven word ids: what :func:`parse` reads as the same ones, if there is a left object."""
    words = [VOCABULARY[index] for index in ids]
    left, right, ground = (" ".join(filter(None, part)) for part in (words[:3], words[3:6], words[6:]))
    objects = " and ".join(filter(None, (left, right)))
    return " ".join(filter(None, (objects, f"on {ground}" if ground else "")))


class CaptionEncoder(nn.Module):
    """A learned vector a word plus a learned vector a slot: ``(B, 7)`` word ids to a ``(B, 7, 64)`` context."""

    def __init__(self, dim: int = CONTEXT_DIM) -> None:
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), dim)
        self.slot = nn.Parameter(torch.randn(len(SLOTS), dim))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.word(ids) + self.slot
        return out
