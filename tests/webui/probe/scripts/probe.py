"""A test extension: looks into the running WebUI, and breaks it on request. Needs nothing of the tested extension."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from mechanisms import MECHANISMS
from modules import script_callbacks, scripts, sd_unet, shared
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

STATE: dict[str, Any] = {
    "calls": [], "control_calls": [], "times": [], "raise_at": None, "hooks": [], "control_hooks": [], "counted": None,
    "counter": None, "replaced": {}, "precision": None,
}


def _patcher() -> Any:
    """The U-Net patcher of a fork."""
    return shared.sd_model.forge_objects.unet


def _unet() -> Any:
    if hasattr(shared.sd_model, "forge_objects"):
        return _patcher().model.diffusion_model
    return shared.sd_model.model.diffusion_model


class _Apart(TorchDispatchMode):
    """In inference mode torch hands convolutions and products over as they were called, and older counters know only
    what they are made of: so they are taken apart first.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if out is NotImplemented else out


def _before_model(calls: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Notes the rows of a call of the U-Net, or of one that controls it, and begins to count."""
    x = args[0] if args else kwargs["x"]
    STATE[calls].append(int(x.shape[0]))
    if calls == "calls":
        times = args[1] if len(args) > 1 else kwargs.get("timesteps")
        STATE["times"].append(None if times is None else float(times.flatten()[0]))
    if STATE["counted"] is not None:
        STATE["counter"] = FlopCounterMode(display=False), _Apart()
        for mode in STATE["counter"]:
            mode.__enter__()


def _after_model(*_: Any) -> None:
    if STATE["counter"] is not None:
        (counter, apart), STATE["counter"] = STATE["counter"], None
        for mode in (apart, counter):
            mode.__exit__(None, None, None)
        STATE["counted"].append(counter.get_total_flops())


def _middle() -> Any:
    return _unet().joint_blocks[-1] if hasattr(_unet(), "joint_blocks") else _unet().middle_block[0]


def _before_middle(module: Any, args: tuple[Any, ...]) -> None:
    weight = next(parameter for parameter in module.parameters() if parameter.ndim > 1)
    STATE["precision"] = {"stored": str(weight.dtype), "computed": str(args[0].dtype)}
    if STATE["raise_at"] is not None and len(STATE["calls"]) >= STATE["raise_at"]:
        STATE["raise_at"] = None
        raise RuntimeError("raised by the probe inside the U-Net")


_before_unet, _before_control = partial(_before_model, "calls"), partial(_before_model, "control_calls")
# Another extension's hooks may be part of the computation: these pass for torch's own, and are known to be none.
for _hook in (_before_unet, _before_control, _after_model, _before_middle):
    _hook.__module__ = "torch"


class Probe(scripts.Script):
    """Counts the rows of every U-Net call; with ``raise_at`` set, raises in the middle of that call."""

    sorting_priority = 1000  # after ControlNet, in forks

    def title(self) -> str:
        return "Probe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        remove_hooks()
        STATE["calls"].clear()
        STATE["control_calls"].clear()
        STATE["times"].clear()
        unet = _unet()
        STATE["hooks"] += [
            unet.register_forward_pre_hook(_before_unet, with_kwargs=True),
            unet.register_forward_hook(_after_model),
            _middle().register_forward_pre_hook(_before_middle),
        ]

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(shared.sd_model, "forge_objects"):
            return
        remove_hooks("control_hooks")  # a hires pass has its own
        for unit in _patcher().list_controlnets():
            model = getattr(unit, "control_model", None) or getattr(unit, "t2i_model", None)
            STATE["control_hooks"] += [
                model.register_forward_pre_hook(_before_control, with_kwargs=True),
                model.register_forward_hook(_after_model),
            ]


def remove_hooks(*kinds: str) -> None:
    """Takes the probe's own hooks off."""
    for kind in kinds or ("hooks", "control_hooks"):
        while STATE[kind]:
            STATE[kind].pop().remove()


def short_of_memory(on: int) -> dict[str, int]:
    """Makes a fork believe, by its own measure, that there is no free memory."""
    for name in ("backend.memory_management", "ldm_patched.modules.model_management"):
        measure = getattr(sys.modules.get(name), "get_free_memory", None)
        _replace(sys.modules.get(name), "get_free_memory", partial(_no_memory, measure), on)
    return {"on": on}


def computes_in(dtype: str) -> dict[str, str]:
    """Makes a fork compute the U-Nets that it loads from now on in this precision, as it would on a GPU: on a processor
    it chooses float32, whatever precision weights are stored in.
    """
    wanted = getattr(torch, dtype)
    backend, patched = map(sys.modules.get, ("backend.memory_management", "ldm_patched.modules.model_management"))
    _replace(patched, "unet_manual_cast", lambda stored, *_: None if stored == wanted else wanted, on=1)
    for chooses in ("get_computation_dtype", "inference_cast"):
        if hasattr(backend, chooses):
            _replace(backend, chooses, lambda *_, **__: wanted, on=1)
    return {"dtype": dtype}


def processors(count: int) -> dict[str, int]:
    """Makes scripts that share their work out by the number of processors believe in another one."""
    for data in scripts.scripts_data:
        if hasattr(data.module, "cpu_count"):
            data.module.cpu_count = lambda: count
    return {"count": count}


def _no_memory(measure: Any, *args: Any, **kwargs: Any) -> Any:
    """None for a call of the model; what is made in pieces of the memory that there is goes on as always."""
    asking = sys._getframe(1).f_code.co_name
    return 0 if asking in ("calc_cond_uncond_batch", "_calc_cond_batch", "wants_own_call") else measure(*args, **kwargs)


def plain_rows(on: int) -> dict[str, int]:
    """Makes extra rows of the tested extension run through the whole U-Net, sharing nothing."""
    topology = sys.modules.get("sag_pag.engine.topology")
    _replace(getattr(topology, "Topology", None), "prefix", lambda *_: [], on)
    return {"on": on}


def without(mechanism: str, on: int) -> dict[str, int]:
    """Takes away one of the things that keep the tested extension's own calls unnoticed, or gives it back."""
    taken = MECHANISMS[mechanism]
    owner = getattr(sys.modules.get(taken.module), taken.owner, None)
    _replace(owner, taken.method, taken.replacement, on)
    return {"on": on}


def _replace(owner: Any, name: str, value: Any, on: int) -> None:
    """Replaces something, or gives it back; nothing where there is no such owner."""
    if owner is not None and on:
        STATE["replaced"][name] = getattr(owner, name)
        setattr(owner, name, value)
    elif owner is not None and name in STATE["replaced"]:
        setattr(owner, name, STATE["replaced"].pop(name))


def count(on: int) -> dict[str, Any]:
    """Starts counting the U-Net's floating-point operations anew, or ends it; gives those counted so far, of all calls
    and of each.
    """
    counted, STATE["counted"] = STATE["counted"] or [], [] if on else None
    return {"counted": sum(counted), "each": counted}


class OtherUnet(getattr(sd_unet, "SdUnet", object)):  # type: ignore[misc]
    """Stands for a U-Net that bypasses the model's modules, as TensorRT's does."""

    def forward(self, x: Any, timesteps: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        return x * 0.5


class OtherUnetOption(getattr(sd_unet, "SdUnetOption", object)):  # type: ignore[misc]
    """Selectable in the options as ``Other``."""

    model_name = "other"
    label = "Other"

    def create_unet(self) -> Any:
        return OtherUnet()


def leftovers() -> list[str]:
    """Every module of the model that carries a replaced forward or a hook."""
    found = []
    is_fork = hasattr(shared.sd_model, "forge_objects")
    if is_fork:
        options = _patcher().model_options
        found += [key for key in ("model_function_wrapper", "conditioning_modifiers") if key in options]
    elif not hasattr(shared.sd_model, "named_modules"):
        return []  # a fork that has loaded none yet
    for name, module in (_unet() if is_fork else shared.sd_model).named_modules():
        own = [key for key in ("forward", "_forward", "__call__") if key in vars(module)]
        hooks = [key for key in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, key)]
        if own or hooks:
            found.append(f"{name}: {own + hooks}")
    return found


def _on_app_started(_demo: Any, app: Any) -> None:
    def state() -> dict[str, Any]:
        remove_hooks()
        callbacks = {key: len(value) for key, value in script_callbacks.callback_map.items()}
        seen = {name: list(STATE[name]) for name in ("calls", "control_calls", "times")}
        return {**seen, "leftovers": leftovers(), "callbacks": callbacks, "precision": STATE["precision"]}

    def raise_at(call: int) -> dict[str, int]:
        STATE["raise_at"] = call
        return {"raise_at": call}

    app.add_api_route("/probe/state", state, methods=["GET"])
    for route in (short_of_memory, plain_rows, count):
        app.add_api_route(f"/probe/{route.__name__}/{{on}}", route, methods=["POST"])
    app.add_api_route("/probe/processors/{count}", processors, methods=["POST"])
    app.add_api_route("/probe/computes-in/{dtype}", computes_in, methods=["POST"])
    app.add_api_route("/probe/without/{mechanism}/{on}", without, methods=["POST"])
    app.add_api_route("/probe/raise-at/{call}", raise_at, methods=["POST"])


def _add_preprocessor() -> None:
    """For IP-Adapter in a fork: gives two embeddings, and needs no model that makes them."""
    try:
        from modules_forge.shared import add_supported_preprocessor
        from modules_forge.supported_preprocessor import Preprocessor
    except ImportError:
        return

    class Embedding(Preprocessor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.name = "an embedding"

        def __call__(self, *_: Any, **__: Any) -> dict[str, Any]:
            embedding = torch.randn(1, 48, generator=torch.Generator().manual_seed(2))
            return {"clip_vision": None, "image": None, "embeds": torch.stack([embedding, embedding * 0])}

    add_supported_preprocessor(Embedding())


_add_preprocessor()
script_callbacks.on_app_started(_on_app_started)
if hasattr(script_callbacks, "on_list_unets"):
    script_callbacks.on_list_unets(lambda options: options.append(OtherUnetOption()))
