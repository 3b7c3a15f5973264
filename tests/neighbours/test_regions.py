"""Regional Prompter in its latent mode: rows are sorted anew by region, and each region may have LoRAs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from client import Generation
from installations import Installation
from real_hosts import LEVEL, NULL, OURS, PROBE, TINY, difference, ours, started
from safetensors.torch import save_file
from server import Server

STRONG = {"pag": {"pag_enabled": True, "pag_scale": 3}, "sag": {"sag_enabled": True, "sag_scale": 1}}
LORAS = {"red": 1, "blue": 2}
PROMPTS = {"no LoRA": "a cat BREAK a dog", "a LoRA each": "a cat <lora:red:1> BREAK a dog <lora:blue:1>"}


def write_lora(file: Path, seed: int) -> None:
    """Of the tiny SD 1.5 checkpoint's cross-attention in the middle and beside it."""
    generator = torch.Generator().manual_seed(seed)
    layers = {"mid_block_attentions_0": 128, "down_blocks_1_attentions_0": 64, "up_blocks_1_attentions_2": 128}
    state = {}
    for place, width in layers.items():
        name = f"lora_unet_{place}_transformer_blocks_0_attn2_to_v"
        state[f"{name}.lora_down.weight"] = torch.randn(4, 64, generator=generator) / 8
        state[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator)
        state[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(state, str(file))


@pytest.fixture(scope="module")
def webui(
    webui_installation: Installation, neighbours_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("regions")
    (data / "models/Lora").mkdir(parents=True)
    for name, seed in LORAS.items():
        write_lora(data / f"models/Lora/{name}.safetensors", seed)
    with started(
        webui_installation, neighbours_folder, data, folders=["sd-webui-regional-prompter"],
        extensions={**OURS, **PROBE},
    ) as server:
        yield server


def made(webui: Server, settings: dict[str, Any] | None, prompt: str, **payload: Any) -> Generation:
    values = [
        True, False, "Matrix", "Columns", "Mask", "Prompt", "1,1", "0.2", False, False, False, "Latent", [False], "0",
        "0", "0.4", None, "0", "0", False,
    ]
    scripts = {"regional prompter": {"args": values}, **ours(settings)}
    return webui.client.txt2img(**{"prompt": prompt, "width": 64, "height": 64, "alwayson_scripts": scripts, **payload})


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_null_and_tiny(webui: Server, prompt: str) -> None:
    """Regional Prompter picks the region's LoRAs by counting the U-Net's calls: ours must not count."""
    off = made(webui, None, prompt)
    assert webui.client.call("/probe/state")["calls"] == [1, 1, 1] * 4
    assert (difference(off, made(webui, None, PROMPTS["no LoRA"])) > LEVEL) == ("lora" in prompt)
    for feature in ("pag", "sag"):
        null, tiny = made(webui, NULL[feature], prompt), made(webui, TINY[feature], prompt)
        assert difference(null, off) <= LEVEL
        assert difference(tiny, off) <= LEVEL
        assert f"{feature.upper()}: True" in tiny.infotext
        assert "note" not in tiny.infotext
    assert difference(made(webui, None, prompt), off) == 0


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("settings", [None, *STRONG.values()], ids=["off", *STRONG])
def test_alone_or_together(webui: Server, settings: dict[str, Any] | None, prompt: str) -> None:
    """With several pictures in a batch the rows are sorted by region for the time of the calls."""
    def pictures(**payload: Any) -> Generation:
        return made(webui, settings, prompt, width=128, height=128, **payload)

    both = pictures(batch_size=2)
    for number, picture in enumerate(both.images):
        alone = pictures(seed=1 + number)
        assert np.abs(picture.astype(int) - alone.image.astype(int)).max() <= LEVEL


@pytest.mark.parametrize("settings", [None, *STRONG.values()], ids=["off", *STRONG])
def test_a_prompt_guides_its_region_alone(webui: Server, settings: dict[str, Any] | None) -> None:
    """The same prompt in both regions is that prompt in the whole picture."""
    large = {"width": 128, "height": 128}
    regional = made(webui, settings, "a cat BREAK a cat", **large)
    whole = webui.client.txt2img(prompt="a cat", alwayson_scripts=ours(settings), **large)
    assert difference(regional, whole) <= LEVEL
