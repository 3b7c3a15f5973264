"""The HTTP routes, through a real FastAPI application and the double of the WebUI."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pytest
from double import Host
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sag_pag.settings import PARAMETERS, Settings

ROUTES = ("blocks", "presets", "schema")


def client(host: Host, *, api: bool = True, auth: str | None = None) -> TestClient:
    """A WebUI's server with our routes added as it would."""
    host.shared.cmd_opts = SimpleNamespace(api=api, nowebui=False, api_auth=auth)
    app = FastAPI()
    host.script_callbacks.run("app_started", None, app)
    return TestClient(app)


def get(host: Host, route: str, **query: Any) -> Any:
    answer = client(host).get(f"/sag-pag/v1/{route}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_blocks(host: Host) -> None:
    found = get(host, "blocks", width=96, height=64)
    assert found["checkpoint"] == "sd1"
    blocks = {block["name"]: block for block in found["blocks"]}
    assert list(blocks) == ["input.1", "input.3", "middle", "output.0", "output.1", "output.2", "output.3"]
    assert blocks["middle"]["transformer_blocks"] == ["middle.0"]
    assert (blocks["middle"]["heads"], blocks["middle"]["channels"]) == (2, 64)
    assert (blocks["middle"]["downscale"], blocks["middle"]["resolution"]) == (2, [6, 4])
    assert 1 < blocks["output.3"]["pag_cost"] < blocks["middle"]["pag_cost"] < blocks["input.1"]["pag_cost"] < 1.5
    assert 1.5 < blocks["middle"]["sag_cost"] < 1.6


@pytest.mark.parametrize("query", [{"width": 8}, {"height": 99999}, {"width": "wide"}])
def test_sizes_that_can_not_be(host: Host, query: dict[str, Any]) -> None:
    assert client(host).get("/sag-pag/v1/blocks", params=query).status_code == 422


@pytest.mark.parametrize(("model", "says"), [(None, "no model is loaded"), (SimpleNamespace(), "no U-Net")])
def test_a_model_that_can_not_be_guided(host: Host, monkeypatch: pytest.MonkeyPatch, model: Any, says: str) -> None:
    monkeypatch.setattr(host.sd_models, "model_data", SimpleNamespace(sd_model=model))
    answer = client(host).get("/sag-pag/v1/blocks")
    assert answer.status_code == 409
    assert says in answer.json()["detail"]


def test_schema(host: Host) -> None:
    listed = get(host, "schema")["parameters"]
    assert [(item["position"], item["name"]) for item in listed] == list(enumerate(PARAMETERS))
    for item, parameter in zip(listed, PARAMETERS.values(), strict=True):
        assert item["default"] == parameter.default
        assert type(item["default"]) is type(parameter.default)
        assert (item["minimum"] is None) is (not parameter.is_number)


def test_presets_can_be_sent_as_they_are(host: Host) -> None:
    for preset in get(host, "presets")["presets"]:
        Settings.from_list([preset["values"]])


def authorised(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


@pytest.mark.parametrize("route", ROUTES)
def test_credentials(host: Host, route: str) -> None:
    """As the WebUI's own routes with ``--api-auth``."""
    server = client(host, auth="one:secret,two:other")
    path = f"/sag-pag/v1/{route}"
    for headers in ({}, authorised("one", "wrong"), authorised("one", "other"), authorised("three", "secret")):
        answer = server.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Basic"
    for headers in (authorised("one", "secret"), authorised("two", "other")):
        assert server.get(path, headers=headers).status_code == 200


def test_no_routes_without_an_api(host: Host) -> None:
    assert client(host, api=False).get("/sag-pag/v1/schema").status_code == 404
