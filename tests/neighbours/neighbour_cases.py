"""The extensions that are tried, at which commit, and with what of them switched on."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from client import Picture, encode_image

CONTROLNET = "sd-webui-controlnet"
COMMITS = {
    CONTROLNET: "56cec5b2", "sd-webui-negpip": "dc75fd2", "sd-webui-regional-prompter": "be62345",
    "sd-webui-incantations": "980d638", "sd-webui-kohya-hiresfix": "05af987",
    "multidiffusion-upscaler-for-automatic1111": "22798f6", "sd-webui-deepcache-standalone": "08bf052",
    "sd-dynamic-thresholding": "73e4e04", "sd-webui-cads": "11c7f1f", "prompt-fusion-extension": "1d86996",
    "sd-webui-lora-block-weight": "b403cb7", "sd-webui-freeu": "7568492", "sd_webui_SAG": "83d66a6",
}
ALONE, REPEATED = (1.35, 1.52), (2.01, 2.01)
"""The most that PAG and SAG may cost where nobody is, and where the host's rows run once more."""
FREEU = {"stage_infos": [{"backbone_factor": 1.4, "skip_factor": 0.7}] * 3}
LORA = "tiny"
CONTROLLED, ADAPTED, MORE = (1.19, 1.67), (1.35, 1.51), (1.28, 1.68)
"""Beside ControlNet's models, beside those that cost little themselves, and with more models, prompts or pixels."""


@dataclass(frozen=True)
class Case:
    """One row of the table. ``scripts`` are always-on scripts' arguments, ``options`` the WebUI's own, ``payload`` what
    else the request holds. ``null`` are the features that must do nothing at ``size``, in pixels of a side, ``refused``
    is one that is refused by name, ``noted`` says whether a note in the text is right. ``most``: what PAG and SAG may
    cost. ``together``: whether a picture in a batch is the one that it is alone, beside the neighbour without guidance.
    """

    name: str
    folder: str = ""
    scripts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] = field(default_factory=dict)
    size: int = 64
    null: Sequence[str] = ("pag", "sag")
    refused: str = ""
    noted: bool = False
    most: tuple[float, float] = REPEATED
    together: bool = True

    @property
    def acts(self) -> bool:
        """Whether a script or an option alone makes another picture."""
        return bool(self.scripts or self.options.keys() - APART.keys())


def noise(size: int = 64) -> Picture:
    """A picture of random pixels."""
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def unit(model: str, module: str = "none", **more: Any) -> dict[str, Any]:
    """One of ControlNet; ``model`` is the beginning of a name, which the test completes."""
    image = encode_image(noise())
    return {"enabled": True, "model": model, "module": module, "image": image, "processor_res": 64, **more}


def _controlnet(name: str, *units: dict[str, Any], most: tuple[float, float] = CONTROLLED, **more: Any) -> Case:
    title = f"ControlNet, {name}" if name else "ControlNet"
    return Case(title, CONTROLNET, {"controlnet": {"args": list(units)}}, most=most, **more)


def _reference(name: str, module: str = "reference_only", **more: Any) -> Case:
    """Noise is drawn for all rows of a batch at once, so that its pictures differ from those made alone."""
    weight = more.pop("weight", 1.0)
    return _controlnet(name, unit("None", module, weight=weight), most=REPEATED, together=False, **more)


def embedded() -> str:
    """A picture's embedding for the tiny IP-Adapter."""
    import torch

    buffer = io.BytesIO()
    torch.save({"image_embeds": torch.randn(1, 48, generator=torch.Generator().manual_seed(2))}, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _negpip(name: str, **more: Any) -> Case:
    return Case(name, "sd-webui-negpip", {"negpip": {"args": [True]}}, **more)


def _regional(name: str, negative: str = "bad", **more: Any) -> Case:
    """Where both prompts are of a length it counts, else it goes by the length."""
    values = [
        True, False, "Matrix", "Columns", "Mask", "Prompt", "1,1", "0.2", False, False, False, "Attention", [False],
        "0", "0", "0.4", None, "0", "0", False,
    ]
    payload = {"prompt": "a cat BREAK a dog", "negative_prompt": negative}
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
        name, "multidiffusion-upscaler-for-automatic1111", scripts, payload={"width": 192, "height": 192}, null=(),
        refused="sag", most=ALONE, **more,
    )


HYPERTILE = {"hypertile_enable_unet": True, "hypertile_max_tile_unet": 128}
"""At 256 pixels it draws how to cut."""
APART = {"batch_cond_uncond": False}
CONTROL = unit("control_tiny_sd15")
IP_ADAPTER = unit("ip-adapter_tiny_sd15", "ip-adapter_clip_sd15", ipadapter_input=[embedded()])
INPAINTED = {
    "init_images": [noise()], "mask": np.pad(np.full((32, 64, 3), 255, np.uint8), ((32, 0), (0, 0), (0, 0))),
    "denoising_strength": 0.8,
}
SDXL: dict[str, Any] = {"options": {"sd_model_checkpoint": "sdxl.safetensors"}, "size": 32}
CASES = (
    Case("nobody", most=ALONE),
    Case("token merging (built in)", options={"token_merging_ratio": 0.5}, most=ALONE),
    Case("LoRA (built in)", payload={"prompt": f"a cat <lora:{LORA}:1>"}, most=ALONE),
    Case("HyperTile (built in)", options=HYPERTILE, most=ALONE, size=256, null=()),
    Case("HyperTile, batching off", options={**HYPERTILE, **APART}, most=ALONE, size=256, null=()),
    _negpip("NegPiP, one call", payload={"prompt": "a cat (dog:-1.0)"}),
    _negpip("NegPiP, unequal lengths", payload={"prompt": "a cat (dog:-1.0)" + ", very long" * 60}),
    _negpip("NegPiP, batching off", payload={"prompt": "a cat (dog:-1.0)"}, options=APART),
    _regional("Regional Prompter, attention"),
    _regional("Regional Prompter, attention, batching off", "bad BREAK worse", options=APART),
    Case("Kohya hires. fix", "sd-webui-kohya-hiresfix", {"kohya hires.fix": {"args": [True]}}, payload={
        "steps": 8
    }),
    Case("incantations, SEG", "sd-webui-incantations", _incantations(_0=True), size=256, null=()),
    Case("incantations, S-CFG", "sd-webui-incantations", _incantations(_4=True)),
    Case(
        "DeepCache standalone", "sd-webui-deepcache-standalone", noted=True, payload={"steps": 8}, options={
            "deepcache_enable_pass": "both passes", "deepcache_cache_enable_step_percentage": 0.2,
            "deepcache_full_run_step_rate": 2,
        },
    ),
    Case("LoRA block weight", "sd-webui-lora-block-weight", most=ALONE, payload={
        "prompt": f"a cat <lora:{LORA}:1:lbw=MIDD>"
    }),
    Case("prompt-fusion", "prompt-fusion-extension", most=ALONE, payload={"prompt": "[a cat:a dog:0,4] in the rain"}),
    Case("Dynamic Thresholding", "sd-dynamic-thresholding", {"dynamic thresholding (cfg scale fix)": {"args": [
        True, 3.0, 99.0, "Constant", 0.0, "Constant", 0.0, 4.0, True, "MEAN", "AD", 1.0,
    ]}}, most=ALONE),
    Case("CADS", "sd-webui-cads", {"cads": {"args": [True, 0.6, 0.9, 0.25, 1.0, True, False]}}, most=ALONE,
         together=False),
    Case("FreeU", "sd-webui-freeu", {"freeu": {"args": [FREEU]}}, most=ALONE),
    Case("sd_webui_SAG", "sd_webui_SAG", {"self attention guidance": {"args": [True, 0.75, 1.0]}}, together=False),
    _tiled("Tiled Diffusion, one tile at a time", "MultiDiffusion", 1),
    _tiled("Tiled Diffusion, four at a time", "MultiDiffusion", 4),
    _tiled("Mixture of Diffusers, four at a time", "Mixture of Diffusers", 4),
    _controlnet("", CONTROL),
    _controlnet("batching off", CONTROL, options=APART),
    _controlnet("more important", unit("control_tiny_sd15", control_mode="ControlNet is more important")),
    _controlnet("two units", CONTROL, CONTROL, most=MORE),
    _controlnet("AND", CONTROL, most=MORE, payload={"prompt": "a cat AND a dog"}),
    _controlnet("low VRAM", unit("control_tiny_sd15", low_vram=True)),
    _controlnet("hires. fix", CONTROL, most=MORE, null=(), payload={
        "enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7,
    }),
    _controlnet("inpaint_only", unit("control_tiny_sd15", "inpaint_only", image=None), payload=INPAINTED),
    _controlnet("shuffle", unit("control_tiny_shuffle")),
    _controlnet("T2I-Adapter", unit("t2iadapter"), most=ADAPTED),
    _controlnet("LLLite", unit("lllite"), most=ADAPTED),
    _controlnet("IP-Adapter", IP_ADAPTER, most=ADAPTED),
    _controlnet("InstantID", IP_ADAPTER, unit("control_tiny_instant_id")),
    _controlnet("SDXL", unit("control_tiny_sdxl"), **SDXL),
    _controlnet("IP-Adapter, SDXL", unit(
        "ip-adapter_tiny_sdxl", "ip-adapter_clip_sdxl", ipadapter_input=[embedded()]
    ), most=ADAPTED, **SDXL),
    _reference("reference_only", null=("sag",)),
    _reference("reference_only, batching off", null=("sag",), options=APART),
    _reference("reference_only, not in the middle block", weight=0.1),
    _reference("reference_adain", "reference_adain"),
)
