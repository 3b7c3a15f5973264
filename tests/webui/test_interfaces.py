"""The API's arguments, infotext and X/Y/Z plot in a real WebUI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from client import DEFAULTS, Client
from test_generation import BOTH, TITLE, guided, hires, state

from sag_pag.settings import PARAMETERS

FULL = {
    "sag_scale": 0.61, "sag_threshold": 0.9, "sag_blur_sigma": 1.5, "sag_block": "output.3", "sag_start": 0.05,
    "sag_end": 0.9, "pag_scale": 2.35, "pag_blocks": "middle, output.3-5", "pag_start": 0.1, "pag_end": 0.95,
    "pag_fade": True, "rescale": 0.4, "rescale_mode": "partial",
}  # fmt: skip


def test_list_short_list_and_dict_mean_the_same(client: Client) -> None:
    named = client.txt2img(**guided(pag_scale=2.5))
    values = [False, 0.75, 1.0, 1.0, "middle", 0, 1, True, 2.5]
    listed = client.txt2img(alwayson_scripts={TITLE: {"args": values}})
    whole = [*values, "middle", 0.0, 1.0, False, 0.0, "full", "both passes", False, 0.75, 3.0]
    assert np.array_equal(named.image, listed.image)
    assert np.array_equal(named.image, client.txt2img(alwayson_scripts={TITLE: {"args": whole}}).image)
    assert named.infotext == listed.infotext


@pytest.mark.parametrize(("settings", "field", "allowed"), [
    ({"pag_scal": 3}, "pag_scal", "pag_scale"),
    ({"pag_scale": "3"}, "pag_scale", "a number from 0 to 20"),
    ({"pag_scale": True}, "pag_scale", "a number"),
    ({"pag_scale": 21}, "pag_scale", "0 to 20"),
    ({"sag_scale": -1}, "sag_scale", "0 to 5"),
    ({"sag_scale": None}, "sag_scale", "0 to 5"),
    ({"pag_enabled": 1}, "pag_enabled", "true or false"),
    ({"pag_scale": 3, "rescale_mode": "half"}, "rescale_mode", "'partial'"),
    ({"pag_blocks": "input.3"}, "pag_blocks", "input.4"),
    ({"pag_blocks": "middle, nowhere"}, "pag_blocks", "output.11"),
    ({"sag_block": "input.1, middle"}, "sag_block", "one block"),
    ({"sag_block": "output.3-5"}, "sag_block", "one block"),
    ({"pag_start": 0.9, "pag_end": 0.1}, "pag_start", "pag_end"),
])  # fmt: skip
def test_bad_values_are_refused(settings: dict[str, Any], field: str, allowed: str, client: Client) -> None:
    """With an HTTP error that names the field, what was sent and what is allowed; nothing is generated."""
    client.load_checkpoint("sd1")
    client.txt2img(steps=1)
    before = len(state(client)["calls"])
    answer = client.request("/sdapi/v1/txt2img", DEFAULTS | guided(**settings))
    assert answer.status == 422
    assert field in answer.body["detail"]
    assert allowed in answer.body["detail"]
    sent = settings.get(field, "")
    wrong = sent.removeprefix("middle, ") if field == "pag_blocks" else sent  # of a list of blocks, the one
    assert repr(wrong) in answer.body["detail"]
    assert len(state(client)["calls"]) in (0, before)
    client.txt2img(steps=1)


def test_blocks_are_those_of_the_loaded_model(client: Client) -> None:
    client.load_checkpoint("sdxl")
    assert client.request("/sdapi/v1/txt2img", DEFAULTS | guided(pag_blocks="output.8")).status == 422
    client.txt2img(**guided(pag_blocks="output.0.1, m0"))
    client.load_checkpoint("sd1")
    client.txt2img(**guided(pag_blocks="output.8, mid, down.block_2"))


@pytest.mark.only_on("a1111")  # to any infotext field Forge's API answers 500 by itself, in get_field_value
def test_infotext_comes_back_exactly(client: Client) -> None:
    client.load_checkpoint("sd1")
    first = client.txt2img(**guided(**FULL))
    assert first.png_infotexts[0] == first.infotext
    read = client.call("/sdapi/v1/png-info", {"image": "data:image/png;base64," + first.body["images"][0]})
    assert read["info"] == first.infotext
    again = client.request("/sdapi/v1/txt2img", {"infotext": read["info"]})
    assert again.status == 200
    assert again.body["images"][0] == first.body["images"][0]
    for fragment in ("SAG: True", "SAG scale: 0.61", 'PAG blocks: "middle, output.3-5"', "PAG fade: True"):
        assert fragment in first.infotext
    off = client.txt2img().infotext
    assert "SAG" not in off
    assert "PAG" not in off


def controls_of(client: Client, script: str, *, img2img: bool = False) -> list[dict[str, Any]]:
    """The controls of a script that is chosen; each WebUI has some of its own."""
    (controls,) = [
        info["args"] for info in client.call("/sdapi/v1/script-info")
        if info["name"] == script and info["is_img2img"] is img2img
    ]
    return list(controls)


def values_of(controls: list[dict[str, Any]], chosen: dict[str, Any]) -> list[Any]:
    """What is chosen by label, in small letters, and the controls' own values for all others."""
    return [chosen.get(str(control["label"]).lower(), control["value"]) for control in controls]


def plot(client: Client, x: tuple[str, str], y: tuple[str, str] = ("Nothing", "")) -> dict[str, Any]:
    """A request for a grid with the cells' pictures; an axis is its label and its values."""
    controls = controls_of(client, "x/y/z plot")
    labels: list[str] = controls[0]["choices"]
    assert labels.count(x[0]) == labels.count(y[0]) == 1
    axes = [labels.index(x[0]), x[1], "", labels.index(y[0]), y[1], "", 0, "", ""]
    chosen = {"draw legend": False, "include sub images": True, "use text inputs instead of dropdowns": True}
    return DEFAULTS | {
        "script_name": "x/y/z plot", "script_args": [*axes, *values_of(controls[len(axes):], chosen)],
    }


def test_axes_switch_features_on(client: Client) -> None:
    client.load_checkpoint("sd1")
    grid = client.txt2img(**plot(client, ("[PAG] Scale", "0, 3"), ("[SAG] Scale", "0, 0.75")))
    cells = grid.images[-4:]
    expected = [client.txt2img(**guided(pag_scale=p, sag_scale=s)).image for s in (0, 0.75) for p in (0, 3)]
    for cell, image in zip(cells, expected, strict=True):
        assert np.array_equal(cell, image)
    assert "PAG scale: 3" in grid.info["infotexts"][-1]


@pytest.mark.parametrize(("label", "values"), [
    ("[SAG] Enable", "False, True"), ("[SAG] Mask threshold", "0.5, 1.2"), ("[SAG] Blur sigma", "0.5, 3"),
    ("[SAG] Read attention from", "middle, output.3"), ("[SAG] Start", "0, 0.5"), ("[SAG] End", "0.5, 1"),
    ("[PAG] Enable", "False, True"), ("[PAG] Blocks to perturb", '"middle, output.4", input.4'),
    ("[PAG] Start", "0, 0.5"), ("[PAG] End", "0.5, 1"), ("[PAG] Fade to the end", "False, True"),
    ("[PAG] Steer away from", "identity, swapped tokens"),
    ("[PAG] Every n-th step", "1, 2"), ("[SAG] Every n-th step", "1, 2"),
])  # fmt: skip
def test_every_axis_changes_the_picture(label: str, values: str, client: Client) -> None:
    client.load_checkpoint("sd1")
    first, second = client.txt2img(**plot(client, (label, values))).images[-2:]
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("label", "values"), [
    ("[SAG/PAG] Softer contrast (rescale)", "0, 0.7"), ("[SAG/PAG] What is softened", "full, snf"),
])
def test_shared_axes(label: str, values: str, client: Client) -> None:
    """These switch nothing on by themselves: there is no telling which feature is meant."""
    client.load_checkpoint("sd1")
    first, second = client.txt2img(**plot(client, (label, values)), **guided(**BOTH, rescale=0.7)).images[-2:]
    assert not np.array_equal(first, second)


def test_every_parameter_has_one_axis(client: Client) -> None:
    labels = controls_of(client, "x/y/z plot")[0]["choices"]
    ours = [label for label in labels if label.startswith(("[SAG]", "[PAG]", "[SAG/PAG]"))]
    assert len(ours) == len(set(ours)) == len(PARAMETERS)


@pytest.mark.parametrize(("label", "values"), [
    ("[PAG] Scale", "1, 99"), ("[PAG] Scale", "1, x"), ("[PAG] Blocks to perturb", "middle, nowhere"),
    ("[PAG] Enable", "True, maybe"), ("[SAG/PAG] What is softened", "full, half"),
])
def test_a_bad_value_is_refused_before_the_first_picture(label: str, values: str, client: Client) -> None:
    client.load_checkpoint("sd1")
    client.txt2img(steps=1)
    before = state(client)["calls"]
    answer = client.request("/sdapi/v1/txt2img", plot(client, (label, values)))
    assert answer.status in (422, 500)
    assert any(answer.body.get(key) for key in ("errors", "message", "detail"))  # as each WebUI calls it
    assert state(client)["calls"] == before


@pytest.mark.parametrize("more", [{}, {"batch_size": 2, "n_iter": 2}, {"enable_hr": True}], ids=str)
def test_what_sag_sees(client: Client, host: str, more: dict[str, Any]) -> None:
    """One more picture for each, in the gallery's order at the end; no other picture changes."""
    more = more | (hires(host, 2) if "enable_hr" in more else {})
    without = client.txt2img(**guided(sag_scale=1), **more)
    shown = client.txt2img(**guided(sag_scale=1, sag_show=True), **more)
    count = len(without.images)
    made = more.get("batch_size", 1) * more.get("n_iter", 1)
    assert len(shown.images) == count + made
    for before, after in zip(without.images, shown.images[:count], strict=True):
        assert np.array_equal(before, after)
    for sheet in shown.images[count:]:
        assert sheet.shape[1] > 3.5 * 256
        assert sheet.std() > 10
    infotexts = shown.info["infotexts"]
    assert infotexts[count:] == [f"{text}, SAG sheet: mask and attention" for text in infotexts[count - made : count]]
    assert len(client.txt2img(**guided(pag_scale=1)).images) == 1


def test_what_sag_sees_leaves_tiles_alone(client: Client) -> None:
    """SD upscale takes every picture of a part for a tile."""
    client.load_checkpoint("sd1")
    picture = np.linspace(0, 255, 192 * 192 * 3).reshape(192, 192, 3).astype(np.uint8)
    request = {
        "init_images": [picture], "denoising_strength": 0.5, "script_name": "sd upscale", "script_args": values_of(
            controls_of(client, "sd upscale", img2img=True),
            {"tile overlap": 32, "upscaler": "None", "scale factor": 2},
        ),
    }
    without = client.img2img(**request, **guided(sag_scale=1))
    shown = client.img2img(**request, **guided(sag_scale=1, sag_show=True))
    assert len(shown.images) == len(without.images) == 1
    assert shown.image.shape == picture.shape
    assert np.array_equal(shown.image, without.image)
