"""A test extension: looks into the running WebUI, and breaks it on request. Needs nothing of the tested extension."""

from __future__ import annotations

from typing import Any

from modules import script_callbacks, scripts, sd_unet, shared

STATE: dict[str, Any] = {"calls": [], "raise_at": None, "hook": None}


def _unet() -> Any:
    return shared.sd_model.model.diffusion_model


def _before_unet(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["x"]
    STATE["calls"].append(int(x.shape[0]))


def _middle() -> Any:
    return _unet().joint_blocks[-1] if hasattr(_unet(), "joint_blocks") else _unet().middle_block


def _before_middle(_module: Any, _args: tuple[Any, ...]) -> None:
    if STATE["raise_at"] is not None and len(STATE["calls"]) >= STATE["raise_at"]:
        STATE["raise_at"] = None
        raise RuntimeError("raised by the probe inside the U-Net")


# Another extension's hooks may be part of the computation: these pass for the host's own, and are known to be none.
_before_unet.__module__ = _before_middle.__module__ = "modules.lowvram"


class Probe(scripts.Script):
    """Counts the rows of every U-Net call; with ``raise_at`` set, raises in the middle of that call."""

    def title(self) -> str:
        return "Probe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        remove_hooks()
        STATE["calls"].clear()
        unet = _unet()
        STATE["hook"] = (
            unet.register_forward_pre_hook(_before_unet, with_kwargs=True),
            _middle().register_forward_pre_hook(_before_middle),
        )


def remove_hooks() -> None:
    """Takes the probe's own hooks off."""
    for hook in STATE["hook"] or ():
        hook.remove()
    STATE["hook"] = None


class OtherUnet(sd_unet.SdUnet):
    """Stands for a U-Net that bypasses the model's modules, as TensorRT's does."""

    def forward(self, x: Any, timesteps: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        return x * 0.5


class OtherUnetOption(sd_unet.SdUnetOption):
    """Selectable in the options as ``Other``."""

    model_name = "other"
    label = "Other"

    def create_unet(self) -> sd_unet.SdUnet:
        return OtherUnet()


def leftovers() -> list[str]:
    """Every module of the model that carries a replaced forward or a hook."""
    found = []
    for name, module in shared.sd_model.named_modules():
        own = [key for key in ("forward", "_forward", "__call__") if key in vars(module)]
        hooks = [key for key in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, key)]
        if own or hooks:
            found.append(f"{name}: {own + hooks}")
    return found


def _on_app_started(_demo: Any, app: Any) -> None:
    def state() -> dict[str, Any]:
        remove_hooks()
        callbacks = {key: len(value) for key, value in script_callbacks.callback_map.items()}
        return {"calls": list(STATE["calls"]), "leftovers": leftovers(), "callbacks": callbacks}

    def raise_at(call: int) -> dict[str, int]:
        STATE["raise_at"] = call
        return {"raise_at": call}

    app.add_api_route("/probe/state", state, methods=["GET"])
    app.add_api_route("/probe/raise-at/{call}", raise_at, methods=["POST"])


script_callbacks.on_app_started(_on_app_started)
script_callbacks.on_list_unets(lambda options: options.append(OtherUnetOption()))
