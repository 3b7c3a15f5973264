"""A U-Net that stands in for the model's own, such as a TensorRT engine."""

from __future__ import annotations

from typing import Any

current_unet: Any = None
