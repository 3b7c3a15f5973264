"""The extensions that are tried, at which commit, and with what of them switched on."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

CONTROLNET = "sd-webui-controlnet"
COMMITS = {
    CONTROLNET: "56cec5b2", "sd-webui-negpip": "dc75fd2", "sd-webui-regional-prompter": "be62345",
    "sd-webui-incantations": "980d638", "sd-webui-kohya-hiresfix": "05af987",
    "multidiffusion-upscaler-for-automatic1111": "22798f6", "sd-webui-deepcache-standalone": "08bf052",
}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``scripts`` are always-on scripts' arguments, ``options`` the WebUI's own, ``payload`` what
    else the request holds. ``null`` says whether guidance must do nothing at 64 x 64 pixels, ``refused`` which feature
    is refused by name, ``noted`` whether a note in the text is right.
    """

    name: str
    folder: str = ""
    scripts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] = field(default_factory=dict)
    null: bool = True
    refused: str = ""
    noted: bool = False


def _picture(size: int = 64) -> str:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def controlnet(model: str, module: str = "none", **more: Any) -> dict[str, Any]:
    """One unit; ``model`` is the beginning of a name, which the test completes."""
    unit = {"enabled": True, "model": model, "module": module, "image": _picture(), "processor_res": 64, **more}
    return {"controlnet": {"args": [unit]}}


def embedded() -> str:
    """A picture's embedding for the tiny IP-Adapter."""
    import torch

    buffer = io.BytesIO()
    torch.save({"image_embeds": torch.randn(1, 48, generator=torch.Generator().manual_seed(2))}, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _negpip(name: str, **more: Any) -> Case:
    return Case(name, "sd-webui-negpip", {"negpip": {"args": [True]}}, **more)


def _regional(name: str, **more: Any) -> Case:
    values = [
        True, False, "Matrix", "Columns", "Mask", "Prompt", "1,1", "0.2", False, False, False, "Attention", [False],
        "0", "0", "0.4", None, "0", "0", False,
    ]
    payload = {"prompt": "a cat BREAK a dog", "negative_prompt": "bad"}
    return Case(name, "sd-webui-regional-prompter", {"regional prompter": {"args": values}}, payload=payload, **more)


def _incantations(**changed: Any) -> dict[str, Any]:
    values: list[Any] = [
        False, 11.0, 0, 150, False, 1.0, 0.8, 3.0, 0.0, 0, 150, 4, False, 0, 0, 150, False, "Constant", 0, 100, False,
        False, False, 2, 0.1, 0.5, 0.0, "", 0.0, 25, 1, False,
    ]
    for place, value in changed.items():
        values[int(place[1:])] = value
    return {"incantations": {"args": values}}


def _tiled(name: str, method: str, at_once: int, **more: Any) -> Case:
    scripts = {"tiled diffusion": {"args": [True, method, False, True, 64, 64, 16, 16, 8, at_once]}}
    return Case(
        name, "multidiffusion-upscaler-for-automatic1111", scripts, payload={"width": 192, "height": 192}, null=False,
        refused="sag", **more,
    )


APART = {"batch_cond_uncond": False}
CASES = (
    Case("nobody"),
    Case("HyperTile (built in)", options={"hypertile_enable_unet": True}),
    Case("HyperTile, batching off", options={"hypertile_enable_unet": True, **APART}),
    _negpip("NegPiP, one call", payload={"prompt": "a cat (dog:-1.0)"}),
    _negpip("NegPiP, unequal lengths", payload={"prompt": "a cat (dog:-1.0)" + ", very long" * 60}),
    _negpip("NegPiP, batching off", payload={"prompt": "a cat (dog:-1.0)"}, options=APART),
    _regional("Regional Prompter, attention"),
    _regional("Regional Prompter, attention, batching off", options=APART),
    Case("Kohya hires. fix", "sd-webui-kohya-hiresfix", {"kohya hires.fix": {"args": [True]}}, payload={
        "steps": 8
    }),
    Case("incantations, SEG", "sd-webui-incantations", _incantations(_0=True)),
    Case("incantations, S-CFG", "sd-webui-incantations", _incantations(_4=True)),
    Case(
        "DeepCache standalone", "sd-webui-deepcache-standalone", noted=True, payload={"steps": 8}, options={
            "deepcache_enable_pass": "both passes", "deepcache_cache_enable_step_percentage": 0.2,
            "deepcache_full_run_step_rate": 2,
        },
    ),
    _tiled("Tiled Diffusion, one tile at a time", "MultiDiffusion", 1),
    _tiled("Tiled Diffusion, four at a time", "MultiDiffusion", 4),
    _tiled("Mixture of Diffusers, four at a time", "Mixture of Diffusers", 4),
    Case("ControlNet", CONTROLNET, controlnet("control_tiny_sd15")),
    Case("ControlNet, batching off", CONTROLNET, controlnet("control_tiny_sd15"), options=APART),
    Case("ControlNet, T2I-Adapter", CONTROLNET, controlnet("t2iadapter")),
    Case("ControlNet, LLLite", CONTROLNET, controlnet("lllite")),
    Case("ControlNet, IP-Adapter", CONTROLNET, controlnet(
        "ip-adapter_tiny_sd15", "ip-adapter_clip_sd15", ipadapter_input=[embedded()]
    )),
    Case("ControlNet, reference_only", CONTROLNET, controlnet("None", "reference_only"), null=False),
)
