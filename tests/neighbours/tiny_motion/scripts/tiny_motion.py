"""A test extension: AnimateDiff's motion modules as small as the tests' checkpoints, and one with random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from modules import script_callbacks
from safetensors.torch import save_file

NAME = "tiny.safetensors"
SMALLER = 10
"""The widths of Stable Diffusion 1.5, 320 and so on, over the tiny checkpoints'; its fourth is as wide as the third."""


def _make(_demo: Any, _app: Any) -> None:
    module = sys.modules["motion_module"]
    made = module.MotionModule.__init__

    def smaller(self: Any, in_channels: int, *args: Any, **kwargs: Any) -> None:
        made(self, in_channels // SMALLER, *args, **kwargs)

    module.MotionModule.__init__ = smaller
    motion = module.MotionWrapper(NAME, "", module.MotionModuleType.AnimateDiffV3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(motion.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else noise * parameter[0].numel() ** -0.5 * 0.5)
    folder = Path(sys.modules["scripts.animatediff_mm"].mm_animatediff.get_model_dir())
    folder.mkdir(exist_ok=True)
    save_file(motion.state_dict(), str(folder / NAME))


script_callbacks.on_app_started(_make)
