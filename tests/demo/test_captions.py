"""Captions: what is read, what is refused, and that reading is the inverse of writing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sag_pag.demo.captions import SLOTS, VOCABULARY, CaptionEncoder, CaptionError, describe, parse


def words(caption: str) -> list[str]:
    return [VOCABULARY[index] for index in parse(caption)]


@pytest.mark.parametrize(
    ("caption", "slots"),
    [
        ("", ["", "", "", "", "", "", ""]),
        ("star", ["", "", "star", "", "", "", ""]),
        ("red star on green", ["", "red", "star", "", "", "", "green"]),
        ("A big red Star", ["big", "red", "star", "", "", "", ""]),
        (
            "small white moon and big red heart on blue",
            ["small", "white", "moon", "big", "red", "heart", "blue"],
        ),
        ("ring and disc", ["", "", "ring", "", "", "disc", ""]),
        ("on black", ["", "", "", "", "", "", "black"]),
    ],
)
def test_read(caption: str, slots: list[str]) -> None:
    assert words(caption) == slots


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("red dog on green", "unknown word 'dog'; known are small, big, red"),
        ("star red", "'red' is out of place"),
        ("star heart", "'heart' is out of place"),
        ("and red star", "'and' is out of place"),
        ("star and ring and disc", "'and' is out of place"),
        ("star on green and ring", "'and' is out of place"),
        ("star on green on red", "'on' is out of place"),
        ("star on disc", "'disc' is out of place"),
    ],
)
def test_refused_with_one_line(caption: str, message: str) -> None:
    with pytest.raises(CaptionError, match=message) as error:
        parse(caption)
    assert "\n" not in str(error.value)


@given(st.tuples(*(st.sampled_from(("", *slot)) for slot in SLOTS)))
def test_reading_inverts_writing(slots: tuple[str, ...]) -> None:
    if not any(slots[:3]) and any(slots[3:6]):
        slots = (*slots[3:6], "", "", "", *slots[6:])
    ids = [VOCABULARY.index(word) for word in slots]
    assert parse(describe(ids)) == ids


def test_encoder_tells_slots_apart() -> None:
    encoder = CaptionEncoder(16)
    context = encoder(torch.tensor([parse("red star and blue ring"), parse("blue star and red ring")]))
    assert context.shape == (2, 7, 16)
    assert not torch.equal(context[0], context[1])
    assert torch.equal(context[0, 2], context[1, 2])
