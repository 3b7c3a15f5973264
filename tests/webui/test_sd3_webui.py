"""SD3 in a real WebUI, with a tiny random checkpoint: PAG in its joint blocks, and what there is not said so."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import element, open_panel, opened_page, screenshot, text_field
from client import Client, Picture
from conftest import EXTENSIONS, ServerFactory
from installations import Installation
from server import HERE, Server, environment
from test_generation import NOISE, difference, guided, state

NOTE = "SAG/PAG note"
PAG = {"pag_scale": 3.0, "pag_blocks": "joint.1"}
SMALL = {"small-sd3": HERE / "small_sd3"}
TOLERANCE = {"torch.float32": 2e-6, "torch.float64": 1e-13}


def run(installation: Installation, script: str, *arguments: object) -> str:
    """What one of the scripts beside this file prints, run by the WebUI's interpreter."""
    done = subprocess.run(
        [installation.python, HERE / script, *map(str, arguments)], cwd=installation.folder,
        env=environment(installation), text=True, capture_output=True, check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(installation: Installation, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sd3") / "sd3.safetensors"
    run(installation, "sd3_checkpoint.py", checkpoints / "clip-tiny", file)
    return file


def started(start: ServerFactory, checkpoint: Path, folder: Path, extensions: dict[str, Path]) -> Server:
    models = folder / "models" / "Stable-diffusion"
    models.mkdir(parents=True)
    (models / checkpoint.name).symlink_to(checkpoint)
    server = start(folder.name, data_folder=folder, extensions={**extensions, **SMALL})
    server.client.load_checkpoint("sd3")
    return server


@pytest.fixture(scope="module")
def sd3(start_server: ServerFactory, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return started(start_server, checkpoint, tmp_path_factory.mktemp("sd3-webui"), EXTENSIONS)


@pytest.fixture
def client(sd3: Server) -> Iterator[Client]:
    """Each test starts with SD3 and leaves nothing on the model."""
    if "sd3" not in sd3.client.get_options()["sd_model_checkpoint"]:
        sd3.client.load_checkpoint("sd3")
    yield sd3.client
    assert state(sd3.client)["leftovers"] == []


def same(a: Picture, b: Picture) -> bool:
    """To the bit."""
    return np.array_equal(a, b)


def test_off_on_off(
    client: Client, start_server: ServerFactory, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first and the third picture are those of a WebUI without the extension."""
    plain = started(start_server, checkpoint, tmp_path_factory.mktemp("sd3-plain"), {}).client
    expected = plain.txt2img()
    assert expected.info["sd_model_name"] == "sd3"
    assert expected.image.std() > 20
    assert difference(plain.txt2img(prompt="a red house").image, expected.image) > 1
    first = client.txt2img()
    assert same(first.image, expected.image)
    assert first.infotext == expected.infotext
    result = client.txt2img(**guided(**PAG))
    assert difference(result.image, expected.image) > 0.5
    assert "PAG: True, PAG scale: 3, PAG blocks: joint.1" in result.infotext
    assert NOTE not in result.infotext
    assert same(client.txt2img().image, expected.image)


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M SDE"])
def test_samplers(client: Client, sampler: str) -> None:
    """The perturbed row rides along in every call."""
    off = client.txt2img(sampler_name=sampler)
    plain_calls = state(client)["calls"]
    on = client.txt2img(sampler_name=sampler, **guided(**PAG))
    assert difference(on.image, off.image) > 0.5
    assert state(client)["calls"] == [3] * len(plain_calls)
    assert same(client.txt2img(sampler_name=sampler).image, off.image)


@pytest.mark.parametrize("request_", [
    {"batch_size": 2}, {"prompt": "a cat AND a dog :0.5"}, {"cfg_scale": 1.0}, {"width": 192, "height": 112},
    {"prompt": " ".join(["a long prompt of many words"] * 20)},
], ids=["batch", "AND", "CFG 1", "not square", "long prompt"])
def test_requests(client: Client, request_: dict[str, Any]) -> None:
    off = client.txt2img(**request_)
    on = client.txt2img(**request_, **guided(**PAG))
    assert all(difference(a, b) > 0.3 for a, b in zip(on.images, off.images, strict=True))
    assert NOTE not in on.infotext


def test_an_own_call_makes_the_same_picture(client: Client) -> None:
    together = client.txt2img(**guided(**PAG))
    with client.options(batch_cond_uncond=False):
        apart = client.txt2img(**guided(**PAG))
        assert state(client)["calls"] == [1, 1, 1] * 4
    assert np.abs(apart.image.astype(int) - together.image).max() <= 1


def test_img2img_and_inpainting(client: Client) -> None:
    off = client.img2img(init_images=[NOISE], denoising_strength=0.6)
    on = client.img2img(init_images=[NOISE], denoising_strength=0.6, **guided(**PAG))
    assert difference(on.image, off.image) > 0.5
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    fields = {"init_images": [NOISE], "mask": mask, "mask_blur": 0, "inpainting_fill": 1, "denoising_strength": 0.8}
    masked = client.img2img(**fields, **guided(**PAG)).image
    assert same(masked[:, :64], NOISE[:, :64])
    assert difference(masked, client.img2img(**fields).image) > 0.3


def test_the_default_and_sag(client: Client) -> None:
    """The default block is named, SAG's absence explained; SAG alone leaves the picture as it is."""
    expected = client.txt2img()
    both = client.txt2img(**guided(pag_scale=3.0, sag_scale=0.75))
    assert "PAG at joint.2, this model has no middle" in both.infotext
    assert "SAG not applied, SAG is defined for the U-Net" in both.infotext
    assert "SAG: True" not in both.infotext
    assert same(both.image, client.txt2img(**guided(pag_scale=3.0)).image)
    alone = client.txt2img(**guided(sag_scale=0.75))
    assert same(alone.image, expected.image)
    assert "not applied, SAG is defined" in alone.infotext


@pytest.mark.parametrize(("settings", "says"), [
    ({"pag_blocks": "joint.4"}, "joint.0 to joint.3"), ({"pag_blocks": "output.3"}, "joint.0 to joint.3"),
    ({"pag_perturbation": "swapped tokens"}, "'identity' on this model"),
])
def test_refused(client: Client, settings: dict[str, Any], says: str) -> None:
    answer = client.txt2img(expect=422, **guided(**settings))
    assert says in answer.body["detail"]


def test_blocks_and_presets(client: Client) -> None:
    found = client.call("/sag-pag/v1/blocks?width=128&height=128")
    assert [block["name"] for block in found["blocks"]] == [f"joint.{n}" for n in range(4)]
    assert found["blocks"][0]["resolution"] == [8, 8]
    assert found["blocks"][0]["sag_cost"] is None
    presets = {preset["name"]: preset["values"] for preset in client.call("/sag-pag/v1/presets")["presets"]}
    assert "PAG scale: 0.7" in client.txt2img(**guided(**presets["SD3"])).infotext


def test_an_error_in_a_step(client: Client) -> None:
    expected = client.txt2img()
    client.call("/probe/raise-at/2", {})
    client.txt2img(expect=500, **guided(**PAG))
    assert state(client)["leftovers"] == []
    assert same(client.txt2img().image, expected.image)


def test_after_a_u_net_and_before_one(client: Client) -> None:
    expected = client.txt2img(**guided(**PAG))
    client.load_checkpoint("sd1")
    assert "PAG" in client.txt2img(**guided(pag_scale=3.0)).infotext
    client.txt2img(expect=422, **guided(**PAG))
    client.load_checkpoint("sd3")
    assert same(client.txt2img(**guided(**PAG)).image, expected.image)


def test_the_map_in_a_browser(browser: Any, sd3: Server, client: Client) -> None:
    """One line of joint blocks to click on; where SAG's map would be it says why there is none."""
    with opened_page(browser, sd3.url) as page:
        panel = open_panel(page, "txt2img", "pag", "sag")
        page.wait_for_timeout(1500)
        cells = page.locator(f"{element('txt2img', 'pag_blocks_map')} button")
        assert [cell.get_attribute("data-name") for cell in cells.all()] == [f"joint.{n}" for n in range(4)]
        pressed = page.locator(f"{element('txt2img', 'pag_blocks_map')} button[aria-pressed='true']")
        assert [cell.get_attribute("data-name") for cell in pressed.all()] == ["joint.2"]
        screenshot(panel, "sd3")
        cells.nth(1).click()
        assert text_field(page, "txt2img", "pag_blocks").input_value() == "joint.1, joint.2"
        tops = {round(cell.bounding_box()["y"]) for cell in cells.all()}
        assert len(tops) == 1
        assert "SAG is defined for the U-Net" in page.locator(element("txt2img", "sag_block_map")).first.inner_text()
        assert "×" in panel.locator(".sag-pag-head").inner_text()


def test_the_literal_mask_in_the_webuis_own_transformer(installation: Installation) -> None:
    """The engine's rows are those of the whole map masked; the host's own rows are what they were, to the bit."""
    found = json.loads(run(installation, "compare_mmdit.py").splitlines()[-1])
    assert found.keys() == TOLERANCE.keys()
    for dtype, compared in found.items():
        assert len(compared) == 15
        for name, errors in compared.items():
            assert errors["perturbed"] < TOLERANCE[dtype], name
            assert errors["own"] == 0, name
            assert errors["effect"] > 0.05, name
