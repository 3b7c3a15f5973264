"""Global callbacks; what they raise is reported and forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules import errors

KINDS = (
    "cfg_denoiser", "cfg_denoised", "cfg_after_cfg", "infotext_pasted", "before_ui", "app_started", "script_unloaded",
)
callbacks: dict[str, list[Callable[..., None]]] = {kind: [] for kind in KINDS}


@dataclass
class CFGDenoiserParams:
    x: Any
    image_cond: Any
    sigma: Any
    sampling_step: int
    total_sampling_steps: int
    text_cond: Any
    text_uncond: Any
    denoiser: Any


@dataclass
class CFGDenoisedParams:
    x: Any
    sampling_step: int
    total_sampling_steps: int
    inner_model: Any


@dataclass
class AfterCFGCallbackParams:
    x: Any
    sampling_step: int
    total_sampling_steps: int


def run(kind: str, *args: Any) -> None:
    """Calls all callbacks of a kind in the order of registration."""
    for callback in list(callbacks[kind]):
        try:
            callback(*args)
        except Exception as error:  # noqa: BLE001 - as the host does
            errors.report(error)


def clear() -> None:
    """As "Reload UI" does."""
    for registered in callbacks.values():
        registered.clear()


def _registrar(kind: str) -> Callable[[Callable[..., None]], None]:
    return lambda callback: callbacks[kind].append(callback)


on_cfg_denoiser = _registrar("cfg_denoiser")
on_cfg_denoised = _registrar("cfg_denoised")
on_cfg_after_cfg = _registrar("cfg_after_cfg")
on_infotext_pasted = _registrar("infotext_pasted")
on_before_ui = _registrar("before_ui")
on_app_started = _registrar("app_started")
on_script_unloaded = _registrar("script_unloaded")
