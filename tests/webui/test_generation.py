"""Guided pictures made by a real WebUI, and what must not change."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client import DEFAULTS, Client, Picture
from installations import A1111
from server import Server

TITLE = "self-attention & perturbed-attention guidance"
BOTH = {"sag_scale": 0.75, "pag_scale": 3.0}
CHECKPOINTS = ("sd1", "sd1-v", "sd1-inpainting", "sd2", "sd2-v", "sdxl", "sdxl-inpainting")
SAMPLERS = (
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler",
    "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC",
    "LCM",
)  # fmt: skip
"""Those of AUTOMATIC1111's WebUI."""
FOR_FLOW_MODELS = ("DPM++ 2S Ancestral Comfy RF", "DPM++ 2s a RF")
"""Of forks: they take noise levels above 1 for none, and give a picture of one colour, guided or not."""
NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def guided(**settings: Any) -> dict[str, Any]:
    """The request's part that switches guidance on."""
    return {"alwayson_scripts": {TITLE: {"args": [settings]}}}


def hires(host: str, scale: float) -> dict[str, Any]:
    """The request's part that switches hires. fix on."""
    return {
        "enable_hr": True, "hr_scale": scale, "denoising_strength": 0.7,
        "hr_upscaler": "None" if host == "neo" else "Latent",  # that one has no other without a download
        "hr_cfg": 5.0, "hr_additional_modules": [],  # of forks: without, they have a CFG scale of 1, or answer 500
    }


def difference(a: Picture, b: Picture) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def load_known(client: Client, checkpoint: str, host: str) -> None:
    """Loads a checkpoint, of a kind that this WebUI has."""
    if host == "neo" and checkpoint.startswith("sd2"):
        pytest.skip("it has no Stable Diffusion 2")
    client.load_checkpoint(checkpoint)


def state(client: Client) -> dict[str, Any]:
    """Rows of the last generation's U-Net calls, and what is left on the model."""
    answer: dict[str, Any] = client.call("/probe/state")
    return answer


@contextlib.contextmanager
def short_of_memory(client: Client, host: str) -> Iterator[None]:
    """The WebUI makes several calls of a step's rows, and extra rows make a call of their own."""
    if host == A1111:
        with client.options(batch_cond_uncond=False):
            yield
        return
    client.call("/probe/short_of_memory/1", {})
    try:
        yield
    finally:
        client.call("/probe/short_of_memory/0", {})


def has_sampler(client: Client, name: str) -> bool:
    """Whether the WebUI has this sampler; each has some of its own."""
    return name in {sampler["name"] for sampler in client.call("/sdapi/v1/samplers")}


@pytest.fixture(autouse=True)
def _sd1_again(client: Client) -> Iterator[None]:
    """Each test starts with the sd1 checkpoint and leaves nothing on the model."""
    client.load_checkpoint("sd1")
    yield
    assert state(client)["leftovers"] == []


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_model_is_guided_and_then_not(
    checkpoint: str, client: Client, plain_client: Client, host: str
) -> None:
    """Off, on, off again: the first and third picture are those of a WebUI without the extension."""
    load_known(client, checkpoint, host)
    plain_client.load_checkpoint(checkpoint)
    expected = plain_client.txt2img()
    first = client.txt2img()
    assert np.array_equal(first.image, expected.image)
    assert first.infotext == expected.infotext
    for settings in ({"pag_scale": 3.0}, {"sag_scale": 0.75}, BOTH):
        result = client.txt2img(**guided(**settings))
        assert result.info["sd_model_name"] == checkpoint
        assert difference(result.image, expected.image) > 0.5
    assert np.array_equal(client.txt2img().image, expected.image)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler: str, client: Client) -> None:
    """PAG rides in the step's own call, SAG adds one row's call, and every call of the sampler is guided."""
    if not has_sampler(client, sampler):
        pytest.skip("another WebUI's sampler")
    off = client.txt2img(sampler_name=sampler)
    plain_calls = state(client)["calls"]
    on = client.txt2img(sampler_name=sampler, **guided(**BOTH))
    calls = state(client)["calls"]
    assert difference(on.image, off.image) > 0.5
    if sampler != "DPM adaptive":  # its number of steps depends on the predictions
        assert calls == [3, 1] * len(plain_calls)
    assert np.array_equal(client.txt2img(sampler_name=sampler).image, off.image)


def test_every_other_sampler(client: Client, host: str) -> None:
    """Forks have many of their own, those with CFG++ among them."""
    others = [sampler["name"] for sampler in client.call("/sdapi/v1/samplers") if sampler["name"] not in SAMPLERS]
    assert host != A1111 or not others
    wrong = []
    for sampler in others:
        request = {"sampler_name": sampler}
        off = client.txt2img(**request)
        if sampler in FOR_FLOW_MODELS:
            assert off.image.std() < 1
            continue
        plain, on = state(client)["calls"], client.txt2img(**request, **guided(**BOTH))
        calls = state(client)["calls"]
        again = client.txt2img(**request)
        every = set(plain) == {2} and calls[::2] == [3] * (len(calls) // 2) and calls[1::2] == [1] * (len(calls) // 2)
        if "note" in on.infotext or difference(on.image, off.image) < 0.3 or not np.array_equal(again.image, off.image):
            wrong.append((sampler, on.infotext, difference(on.image, off.image), difference(again.image, off.image)))
        elif not every:
            wrong.append((sampler, plain, calls))
    assert not wrong


def test_scale_zero_and_out_of_range_cost_nothing(client: Client) -> None:
    off = client.txt2img()
    for settings in (
        {"sag_scale": 0, "pag_scale": 0}, {"sag_scale": 1, "sag_blur_sigma": 0},
        {"pag_scale": 3, "pag_start": 1.0}, {"pag_scale": 3, "hires_pass": "hires pass", "pag_enabled": False},
    ):  # fmt: skip
        assert np.array_equal(client.txt2img(**guided(**settings)).image, off.image), settings
        assert state(client)["calls"] == [2] * 4


def test_after_an_exception_in_the_unet(client: Client) -> None:
    off = client.txt2img()
    for call in (1, 2, 3):
        client.call(f"/probe/raise-at/{call}", {})
        failed = client.request("/sdapi/v1/txt2img", DEFAULTS | guided(**BOTH))
        assert failed.status == 500
        assert "raised by the probe" in str(failed.body)
        assert state(client)["leftovers"] == []
        assert np.array_equal(client.txt2img().image, off.image)


def test_after_an_interrupt(client: Client) -> None:
    off = client.txt2img()
    done: list[Any] = []
    work = threading.Thread(target=lambda: done.append(client.txt2img(steps=150, **guided(**BOTH))))
    work.start()
    while client.progress()["state"]["sampling_step"] < 3:
        time.sleep(0.05)
    client.interrupt()
    work.join()
    assert state(client)["leftovers"] == []
    assert len(state(client)["calls"]) < 300
    assert np.array_equal(client.txt2img().image, off.image)


@pytest.mark.parametrize("checkpoint", ["sd1", "sdxl", "sd2-v"])
def test_own_call_gives_the_same_picture(checkpoint: str, client: Client, host: str) -> None:
    load_known(client, checkpoint, host)
    together = client.txt2img(**guided(**BOTH)).image
    with short_of_memory(client, host):
        apart = client.txt2img(**guided(**BOTH)).image
        assert state(client)["calls"] == [1, 1, 1, 1] * 4  # cond, perturbed, uncond, in some order, and degraded
    assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1


@pytest.mark.parametrize("payload", [
    pytest.param({"batch_size": 2, "n_iter": 2}, id="batches"),
    pytest.param({"prompt": "a cat AND a red hat :0.6 AND snow :1.2"}, id="and"),
    pytest.param({"prompt": "a cat, " * 40}, id="long-prompt"),
    pytest.param({"prompt": "[cat:dog:0.5] in (snow:1.2)"}, id="prompt-editing"),
    pytest.param({"s_min_uncond": 3.0, "steps": 8}, id="s-min-uncond"),
    pytest.param({"override_settings": {"skip_early_cond": 0.5}}, id="skip-early-cfg"),
    pytest.param({"cfg_scale": 1.0}, id="cfg-1"),
    pytest.param({"negative_prompt": ""}, id="no-negative-prompt"),
    pytest.param({"width": 136, "height": 72}, id="multiples-of-8"),
    pytest.param({"width": 64, "height": 200}, id="tall"),
    pytest.param({"batch_size": 2, "prompt": "a AND b", "short_of_memory": True}, id="split"),
    pytest.param({"prompt": "a cat, " * 40, "override_settings": {"pad_cond_uncond": True}}, id="padded"),
    pytest.param({"prompt": "a cat", "scheduler": "Karras", "sampler_name": "DPM++ 2M"}, id="karras"),
    pytest.param({"override_settings": {"token_merging_ratio": 0.5}}, id="token-merging"),
    pytest.param({"tiling": True}, id="tiling"),
])  # fmt: skip
def test_every_way_to_generate(payload: dict[str, Any], client: Client, host: str) -> None:
    # not sent as override_settings: the WebUI does not restore options that its config.json does not hold
    options = payload.get("override_settings", {})
    if unknown := options.keys() - client.get_options().keys():
        pytest.skip(f"no option {', '.join(unknown)}")
    request = {key: value for key, value in payload.items() if key not in ("override_settings", "short_of_memory")}
    short = short_of_memory(client, host) if payload.get("short_of_memory") else contextlib.nullcontext()
    with client.options(**options), short:
        off_and_on(client, request)


def off_and_on(client: Client, payload: dict[str, Any]) -> None:
    """The same request off, on, and off again."""
    off = client.txt2img(**payload)
    on = client.txt2img(**payload, **guided(**BOTH, rescale=0.3))
    assert len(on.images) == len(off.images)
    for a, b in zip(on.images, off.images, strict=True):
        assert difference(a, b) > 0.3
    again = client.txt2img(**payload)
    assert all(np.array_equal(a, b) for a, b in zip(again.images, off.images, strict=True))


def test_an_image_is_the_same_alone_and_in_a_batch(client: Client) -> None:
    batch = client.txt2img(batch_size=2, **guided(**BOTH)).images[-2:]
    for i, image in enumerate(batch):
        alone = client.txt2img(seed=DEFAULTS["seed"] + i, **guided(**BOTH)).image
        assert np.abs(alone.astype(int) - image.astype(int)).max() <= 1


@pytest.mark.parametrize("checkpoint", ["sd1", "sd1-inpainting", "sdxl-inpainting"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_inpainting_leaves_the_protected_area_alone(checkpoint: str, sampler: str, client: Client) -> None:
    client.load_checkpoint(checkpoint)
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    request = {
        "init_images": [NOISE], "mask": mask, "mask_blur": 0, "inpainting_fill": 1, "sampler_name": sampler,
        "denoising_strength": 0.8, "steps": 6,
    }  # fmt: skip
    client.img2img(**request)  # Forge's first one differs from later ones by itself
    off, on = client.img2img(**request).image, client.img2img(**request, **guided(**BOTH, rescale=0.5)).image
    inside = np.zeros((128, 128), bool)
    inside[32:96, 32:96] = True
    assert np.array_equal(on[~inside], NOISE[~inside])
    assert difference(on[inside], off[inside]) > 0.5


@pytest.mark.only_on(A1111)
def test_instruct_pix2pix(client: Client) -> None:
    client.load_checkpoint("sd1-pix2pix")
    request = {"init_images": [NOISE], "denoising_strength": 0.9, "image_cfg_scale": 1.5, "steps": 6}
    off = client.img2img(**request)
    assert set(state(client)["calls"]) == {3}
    on = client.img2img(**request, **guided(**BOTH))
    assert set(state(client)["calls"]) == {4, 1}
    assert difference(on.image, off.image) > 0.5
    assert np.array_equal(client.img2img(**request).image, off.image)


def test_hires_passes_and_their_own_scales(client: Client, host: str) -> None:
    request = hires(host, 1.5)

    def rows(**settings: Any) -> tuple[list[int], list[int]]:
        client.txt2img(**request, **guided(pag_scale=3.0, **settings))
        calls = state(client)["calls"]
        return calls[:4], calls[4:]

    assert rows() == ([3] * 4, [3] * 4)
    assert rows(hires_pass="first pass") == ([3] * 4, [2] * 4)
    assert rows(hires_pass="hires pass") == ([2] * 4, [3] * 4)
    assert rows(hires_own_scales=True, hires_pag_scale=0) == ([3] * 4, [2] * 4)
    same = client.txt2img(**request, **guided(pag_scale=3.0)).image
    other = client.txt2img(**request, **guided(pag_scale=3.0, hires_own_scales=True, hires_pag_scale=6.0)).image
    assert difference(same, other) > 0.5


def test_refiner_and_checkpoint_switch(client: Client) -> None:
    request = {"refiner_checkpoint": "sd1-v", "refiner_switch_at": 0.5, "steps": 8}
    off = client.txt2img(**request)
    plain = state(client)["calls"]
    on = client.txt2img(**request, **guided(**BOTH))
    assert state(client)["calls"][-2:] == [3, 1] or len(state(client)["calls"]) >= len(plain)
    assert "Refiner" in on.infotext
    assert difference(on.image, off.image) > 0.5
    assert np.array_equal(client.txt2img(**request).image, off.image)
    overridden = client.txt2img(override_settings={"sd_model_checkpoint": "sdxl"}, **guided(**BOTH))
    assert overridden.info["sd_model_name"] == "sdxl"


@pytest.mark.only_on(A1111)
def test_a_unet_that_bypasses_the_modules(client: Client, webui: Server) -> None:
    """Unguided, and the metadata and one log line say why."""
    with client.options(sd_unet="Other"):
        off = client.txt2img()
        mark = webui.log_mark()
        on = client.txt2img(n_iter=2, **guided(**BOTH))
        assert np.array_equal(on.images[-2], off.image)
        assert "SAG/PAG note: " in on.infotext
        assert "replaces the model's own" in on.infotext
        assert "PAG scale" not in on.infotext
        assert webui.log(mark).count("replaces the model's own") == 1
    assert difference(client.txt2img(**guided(**BOTH)).image, client.txt2img().image) > 0.5


@pytest.mark.only_on(A1111)
def test_memory_saving_mode(start_server: Any, client: Client) -> None:
    """With ``--medvram`` the extra rows run in calls of their own; the picture stays."""
    from conftest import EXTENSIONS

    server: Server = start_server("medvram", extensions=EXTENSIONS, arguments=("--medvram",))
    there = server.client.txt2img(**guided(**BOTH)).image
    assert state(server.client)["calls"] == [2, 1, 1] * 4
    here = client.txt2img(**guided(**BOTH)).image
    assert np.abs(there.astype(int) - here.astype(int)).max() <= 1
    server.stop()
