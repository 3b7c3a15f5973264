"""What has to be made or changed for a neighbour to have something to do in the small models."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from neighbour_cases import LORA
from safetensors.torch import save_file

WIDTHS = {"sd-webui-freeu": ("lib_free_u/unet.py", "[1280, 640, 320].index", "[128, 64, 32].index")}
"""A neighbour's file that knows channels of the models' levels, and what is in it in place of what."""


def fitted(source: Path, folder: Path) -> Path:
    """The neighbour, or a copy of it in ``folder`` that knows the small models' channels."""
    if source.name not in WIDTHS:
        return source
    name, real, small = WIDTHS[source.name]
    copy = shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns(".git"))
    text = (copy / name).read_text(encoding="utf-8")
    assert real in text
    (copy / name).write_text(text.replace(real, small), encoding="utf-8")
    return copy


def write_lora(folder: Path) -> None:
    """A LoRA for two layers of the small SD 1.5."""
    generator = torch.Generator().manual_seed(7)
    layers = {
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_v": (128, 128),
        "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": (32, 64),
    }
    weights = {}
    for name, (out, taken) in layers.items():
        weights[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        weights[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, taken, generator=generator) * 0.1
        weights[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    folder.mkdir(parents=True)
    save_file(weights, folder / f"{LORA}.safetensors")
