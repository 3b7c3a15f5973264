"""A setting that can't be used is refused with an HTTP status, before any U-Net call."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from double import TITLE, Host

BAD: dict[str, tuple[list[Any], str, list[str]]] = {
    # what is sent, the field, what the answer says besides
    "unknown key": ([{"scale": 1}], "scale", ["sag_scale", "hires_pag_scale"]),
    "label for name": ([{"PAG scale": 1}], "PAG scale", ["did you mean pag_scale or"]),
    "misspelled": ([{"rescal": 1}], "rescal", ["1 can't be used; did you mean rescale"]),
    "too large": ([{"sag_scale": 5.5}], "sag_scale", ["5.5", "from 0 to 5"]),
    "negative": ([{"pag_scale": -1}], "pag_scale", ["-1", "from 0 to 20"]),
    "text for number": ([{"pag_scale": "3"}], "pag_scale", ["'3'", "from 0 to 20"]),
    "bool for number": ([{"pag_scale": True}], "pag_scale", ["True", "from 0 to 20"]),
    "number for bool": ([{"pag_enabled": 1}], "pag_enabled", ["1", "true or false"]),
    "null": ([{"sag_threshold": None}], "sag_threshold", ["None"]),
    "nan": ([{"sag_threshold": math.nan}], "sag_threshold", ["nan"]),
    "infinity": ([{"rescale": math.inf, "pag_scale": 1}], "rescale", ["inf"]),
    "huge integer": ([{"sag_scale": 10**400}], "sag_scale", ["from 0 to 5"]),
    "unknown choice": ([{"pag_scale": 1, "rescale_mode": "Full"}], "rescale_mode", ["'full'", "'snf'"]),
    "backwards": ([{"pag_start": 0.5, "pag_end": 0.4}], "pag_start", ["0.5", "0.4"]),
    "no such block": ([{"pag_blocks": "output.9"}], "pag_blocks", ["input.1, input.3, middle, output.0"]),
    "no such SAG block": ([{"sag_block": "input.2"}], "sag_block", ["input.1, input.3, middle, output.0"]),
    "two SAG blocks": ([{"sag_block": "input.1, middle"}], "sag_block", ["one block"]),
    "a range of SAG blocks": ([{"sag_block": "output.0-1"}], "sag_block", ["one block"]),
    "no block name": ([{"pag_blocks": "middle, centre"}], "pag_blocks", ["'centre'", "input.1, input.3, middle"]),
    "endless number": ([{"pag_blocks": "input." + "1" * 5000}], "pag_blocks", ["input.1"]),
    "list for text": ([{"pag_blocks": ["middle"]}], "pag_blocks", ["block names as text"]),
    "in a list": ([False, 0.75, 1.0, 1.0, "middle", 0.0, 1.0, True, 99], "pag_scale", ["99", "from 0 to 20"]),
    "two objects": ([{"pag_scale": 3}, {"sag_scale": 1}], "args", ["sag_scale", "one object"]),
    "text for switch": (["on"], "sag_enabled", ["'on'", "true or false"]),
}


@pytest.mark.parametrize(("args", "field", "says"), BAD.values(), ids=BAD)
def test_http_answer(host: Host, args: list[Any], field: str, says: list[str]) -> None:
    expected = host.plain()
    p = host.processing.Processing()
    before = len(host.calls)
    status, body = host.processing.answer(host.txt2img, p, {TITLE: args})
    assert status == 422
    assert len(host.calls) == before
    assert body["body"]["field"] == field
    for part in (field, *says):
        assert part in body["detail"]
    json.dumps(body)
    assert "sample" not in vars(p)
    assert torch.equal(host.generate({})[0], expected[0])


@pytest.mark.parametrize("block", ["", " ", ",", " , ,"])
@pytest.mark.parametrize("name", ["sag_block", "pag_blocks"])
def test_on_but_nowhere(host: Host, name: str, block: str) -> None:
    """A feature that is on without a block is refused, or the picture's metadata says that it did nothing."""
    p = host.processing.Processing()
    status, body = host.processing.answer(host.txt2img, p, {TITLE: [{name: block}]})
    if status == 200:
        feature = name[:3].upper()
        assert feature in p.extra_generation_params["SAG/PAG note"]
        assert feature not in p.extra_generation_params
        assert feature in body.infotexts[0]
    else:
        assert (status, body["body"]["field"]) == (422, name)


GOOD: dict[str, tuple[list[Any], list[Any]]] = {
    # what is sent, and the dict that means the same
    "full list": ([True, 1.0, 1.0, 1.0, "middle", 0.0, 1.0, False, *[3.0, "middle", 0.0, 1.0, False],
                   0.0, "full", "both passes", False, 0.75, 3.0], [{"sag_scale": 1}]),
    "short list": ([True, 1], [{"sag_scale": 1}]),
    "one value": ([True], [{"sag_scale": 0.75}]),
    "dict": ([{"sag_enabled": True, "sag_scale": 1}], [{"sag_scale": 1.0}]),
    "dict and what follows": ([{"sag_scale": 1}, "ignored"], [{"sag_scale": 1}]),
    "alias": ([{"pag_blocks": "mid"}], [{"pag_blocks": "middle"}]),
    "alias of Comfy": ([{"pag_blocks": "d1, m0"}], [{"pag_blocks": "input.3, middle"}]),
    "spaces": ([{"pag_blocks": " INPUT.3 ,  middle"}], [{"pag_blocks": "input.3, middle"}]),
}


@pytest.mark.parametrize(("args", "same"), GOOD.values(), ids=GOOD)
def test_what_is_accepted(host: Host, args: list[Any], same: list[Any]) -> None:
    status, result = host.processing.answer(host.txt2img, host.processing.Processing(), {TITLE: args})
    assert status == 200
    assert torch.equal(result.latents[0], host.generate(*same)[0])
    assert not torch.equal(result.latents[0], host.plain()[0])


def test_nothing_sent(host: Host) -> None:
    for values in ({}, {TITLE: []}, {TITLE: [{}]}):
        status, result = host.processing.answer(host.txt2img, host.processing.Processing(), values)
        assert status == 200
        assert torch.equal(result.latents[0], host.plain()[0])
        assert "SAG" not in result.infotexts[0]


@pytest.mark.parametrize(("kind", "text", "valid"), [
    ("sdxl", "middle.2", "middle (.0 to .1)"), ("refiner", "input.1", "input.3, middle, output.0, output.1"),
])
def test_blocks_are_those_of_the_loaded_model(host: Host, kind: str, text: str, valid: str) -> None:
    host.use(kind)
    status, body = host.processing.answer(host.txt2img, host.processing.Processing(), {TITLE: [{"pag_blocks": text}]})
    assert status == 422
    assert valid in body["detail"]
