"""The routes of the extension in a real WebUI, open and with ``--api-auth``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from client import Client
from conftest import EXTENSIONS, ServerFactory
from installations import A1111
from server import Server
from test_generation import guided

from sag_pag.settings import PARAMETERS, Settings
from sag_pag.webui.presets import BUILT_IN

ROUTES = ("/sag-pag/v1/blocks", "/sag-pag/v1/presets", "/sag-pag/v1/schema")


def by_name(client: Client) -> dict[str, dict[str, Any]]:
    answer = client.call("/sag-pag/v1/blocks")
    return {block["name"]: block for block in answer["blocks"]}


def test_blocks_are_those_of_the_loaded_model(client: Client) -> None:
    client.load_checkpoint("sd1")
    client.txt2img(steps=1)
    sd1 = by_name(client)
    assert client.call("/sag-pag/v1/blocks")["checkpoint"] == "sd1"
    assert list(sd1) == [
        *(f"input.{n}" for n in (1, 2, 4, 5, 7, 8)), "middle", *(f"output.{n}" for n in range(3, 12)),
    ]
    downscales = {name: block["downscale"] for name, block in sd1.items()}
    assert downscales == {
        "input.1": 1, "input.2": 1, "input.4": 2, "input.5": 2, "input.7": 4, "input.8": 4, "middle": 8,
        **{f"output.{n}": 4 for n in (3, 4, 5)}, **{f"output.{n}": 2 for n in (6, 7, 8)},
        **{f"output.{n}": 1 for n in (9, 10, 11)},
    }
    assert {block["heads"] for block in sd1.values()} == {4}
    assert sd1["middle"] == {**sd1["middle"], "part": "middle", "transformer_blocks": ["middle.0"], "channels": 128}
    wide = {block["name"]: block for block in client.call("/sag-pag/v1/blocks?width=768&height=320")["blocks"]}
    assert (wide["input.1"]["resolution"], wide["middle"]["resolution"]) == ([96, 40], [12, 5])
    costs = [block["pag_cost"] for block in wide.values()]
    assert costs == sorted(costs, reverse=True), "the later a block, the more is shared"
    assert all(1 < block["pag_cost"] < 1.5 < block["sag_cost"] < 1.6 for block in wide.values())
    assert client.request("/sag-pag/v1/blocks?width=1").status == 422

    client.load_checkpoint("sdxl")
    client.txt2img(steps=1)
    sdxl = by_name(client)
    assert list(sdxl) == [
        *(f"input.{n}" for n in (4, 5, 7, 8)), "middle", *(f"output.{n}" for n in range(6)),
    ]
    assert [block["downscale"] for block in sdxl.values()] == [2, 2, 4, 4, 4, 4, 4, 4, 2, 2, 2]
    assert len(sdxl["middle"]["transformer_blocks"]) > 1
    every = ", ".join(name for block in sdxl.values() for name in block["transformer_blocks"])
    client.txt2img(steps=1, **guided(pag_blocks=every))  # the names can be used
    client.load_checkpoint("sd1")


@pytest.mark.only_on(A1111)
def test_a_model_that_can_not_be_guided(client: Client) -> None:
    client.load_checkpoint("sd1")
    with client.options(sd_unet="Other"):
        client.txt2img(steps=1)
        answer = client.request("/sag-pag/v1/blocks")
        assert answer.status == 409
        assert "Other" in answer.body["detail"]
    client.txt2img(steps=1)
    assert client.request("/sag-pag/v1/blocks").status == 200


def test_schema(client: Client) -> None:
    items = client.call("/sag-pag/v1/schema")["parameters"]
    assert [item["name"] for item in items] == list(PARAMETERS)
    for position, (item, parameter) in enumerate(zip(items, PARAMETERS.values(), strict=True)):
        assert item["position"] == position
        assert (item["default"], type(item["default"])) == (parameter.default, type(parameter.default))
        for key in ("feature", "label", "help", "infotext"):
            assert item[key] == getattr(parameter, key)
        assert item["type"] == parameter.kind
        number = parameter.kind in ("float", "int")
        assert item["minimum"] == (parameter.minimum if number else None)
        assert item["maximum"] == (parameter.maximum if number else None)
        assert item["step"] == (parameter.step if number else None)
        assert item["choices"] == (list(parameter.choices) or None)
    first = client.txt2img(alwayson_scripts={
        "self-attention & perturbed-attention guidance": {"args": [item["default"] for item in items]},
    })
    assert "PAG" not in first.infotext


def test_presets(webui: Server, client: Client) -> None:
    def listed() -> dict[str, dict[str, Any]]:
        answer = client.call("/sag-pag/v1/presets")
        assert len({preset["name"] for preset in answer["presets"]}) == len(answer["presets"])
        return {preset["name"]: preset for preset in answer["presets"]}

    shown = listed()
    for preset in BUILT_IN:
        assert shown[preset.name] == {
            "name": preset.name, "built_in": True, "description": preset.description, "values": dict(preset.values),
        }
        Settings.from_list([shown[preset.name]["values"]])
        if preset.values:
            client.txt2img(steps=1, **guided(**shown[preset.name]["values"]))
    # what a person has written by hand is there at once; what is broken is said, and nothing is written
    file = webui.data_folder / "extensions/sag-pag/presets.json"
    mine = {"name": "Mine", "values": {"pag_enabled": True, "pag_scale": 1.0, "pag_fade": False}}
    file.write_text(json.dumps({"presets": [mine]}), encoding="utf-8")
    assert listed()["Mine"]["values"] == mine["values"]
    assert [type(value) for value in listed()["Mine"]["values"].values()] == [bool, float, bool]
    file.write_text(json.dumps({"presets": [mine, {"name": "Bad"}]}), encoding="utf-8")
    before = file.read_bytes()
    assert "Mine" in listed()
    problem = client.call("/sag-pag/v1/presets")["problem"]
    assert problem.startswith("presets.json is broken: preset 2")
    assert file.read_bytes() == before
    file.unlink()
    assert "Mine" not in listed()


def test_they_are_described(client: Client) -> None:
    paths = client.call("/openapi.json")
    for route in ROUTES:
        get = paths["paths"][route]["get"]
        assert get["description"]
        schema = get["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        assert schema.rpartition("/")[2] in paths["components"]["schemas"]


@pytest.mark.parametrize("route", ROUTES)
def test_only_get(client: Client, route: str) -> None:
    assert client.request(route, {}).status == 405


@pytest.fixture(scope="module")
def guarded(start_server: ServerFactory) -> Server:
    """A WebUI with ``--api-auth``."""
    return start_server("guarded", extensions=EXTENSIONS, arguments=("--api-auth", "ann:secret,bob:word"))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("auth", [
    None, "ann:wrong", "ann:", ":", "bob:secret", "eve:secret", "ann:secret", "bob:word", "ann:sécret",
])
def test_credentials(guarded: Server, route: str, auth: str | None) -> None:
    """Answered as the WebUI's own routes are."""
    own = guarded.client.request("/sdapi/v1/scripts", auth=auth)
    answer = guarded.client.request(route, auth=auth)
    if auth in ("ann:secret", "bob:word"):
        assert answer.status in (200, 409)  # forks have loaded no model yet
        return
    assert answer.status == 401
    assert own.status in (401, 500)  # the WebUI itself fails over characters that are not ASCII
    if own.status == 401:
        assert answer.body == own.body
