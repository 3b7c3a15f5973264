"""ControlNet (sd-webui-controlnet) with what it runs: its own models, T2I, LLLite, IP-Adapter, InstantID.

It replaces the U-Net's forward, runs its models there and adds what they put out to skip connections. Whose prompt a
row is it reads from the row itself, so that any of the host's rows may make a call of their own. Its call is made once:
a call of ours at the same picture takes what its models put out in the host's, cut to our rows. What it keeps by row
from its first call is cut for the time of our calls.

Its reference modes and style align let rows look at each other: there the host's rows run once more. What its first
call has encoded, with random numbers, is encoded once more too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from sag_pag.engine.calls import APART, REPEATED, Manner, Watch
from sag_pag.engine.patching import Forward, forward_replaced
from sag_pag.engine.rows import copied, take_rows
from sag_pag.neighbours.scene import Scene
from sag_pag.neighbours.unknown import Change

NAME = "ControlNet"
_FORWARD = "UnetHook.hook.<locals>.forward_webui"
_RUN_IN_EACH_CALL = {"ControlNet", "ControlNetUnion", "InstantID", "ControlLoRA"}
_BY_ROW = {*_RUN_IN_EACH_CALL, "T2I_Adapter", "IPAdapter", "Controlllite"}
_LEFT = "UnetHook.hook.<locals>.hacked_"
_ENCODED = "controlnet_vae_cache"
_KEPT_BY_ROW = ("used_hint_cond_latent", "used_hint_inpaint_hijack")


def controlnet(scene: Scene) -> Manner | None:
    """Calls of the rows that are needed, where ControlNet alone is in the U-Net, with models that allow it."""
    own = [change for change in scene.found.changes if _is_its_forward(scene, change)]
    others = [change for change in scene.found.changes if change not in own]
    if not own:
        return None
    captured = _captured(own[0].function)
    units = list(getattr(captured.get("outer"), "control_params", None) or ())
    alone = not scene.found.layers and not scene.found.classes and all(_is_adapter(change) for change in others)
    if not alone or captured.get("batch_option_uint_separate") or not all(map(_treats_rows_alike, units)):
        process = captured.get("process")
        return replace(REPEATED, trust=scene.trust, watch=lambda: EncodedAgain(process, scene.watch()))
    return replace(APART, moves=scene.moves, watch=lambda: ControlNetWatch(units, scene.watch()))


def _is_its_forward(scene: Scene, change: Change) -> bool:
    function = getattr(change.function, "__func__", change.function)
    return change.module is scene.topology.network and getattr(function, "__qualname__", "") == _FORWARD


def is_left_of_controlnet(change: Change) -> bool:
    """Whether it is what a reference mode has left on a block when its picture was done: the block's own forward, as
    long as nothing is noted there.
    """
    function = getattr(change.function, "__func__", change.function)
    if not getattr(function, "__qualname__", "").startswith(_LEFT):
        return False
    hook, own = _captured(function).get("outer"), vars(change.module)
    machines = (getattr(hook, name, None) for name in ("attention_auto_machine", "gn_auto_machine"))
    noted = any(own.get(name) for name in ("bank", "mean_bank", "var_bank"))
    reads = all(getattr(machine, "name", "") == "Read" for machine in machines)
    return reads and not noted and getattr(hook, "control_params", ()) is None


def _is_adapter(change: Change) -> bool:
    """IP-Adapter works on the rows of the context, LLLite adds the same to each row."""
    own = vars(change.module)
    return not change.hook and bool(own.get("ipadapter_hacks") or own.get("lllite_list"))


def _captured(function: Any) -> dict[str, Any]:
    """What a function has captured, by name; with what the functions among that have captured in turn."""
    function = getattr(function, "__func__", function)
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        content = cell.cell_contents
        if hasattr(content, "__code__") and content is not function:
            found = {**_captured(content), **found}
        found[name] = content
    return found


def _kind(unit: Any) -> str:
    return str(getattr(unit.control_model_type, "name", ""))


def _treats_rows_alike(unit: Any) -> bool:
    """A hint for several rows is shared out among them by their place in the batch."""
    hints = (getattr(unit, name, None) for name in ("hint_cond", "hr_hint_cond"))
    return _kind(unit) in _BY_ROW and not any(
        isinstance(hint, Tensor) and hint.ndim == 4 and len(hint) != 1 for hint in hints
    )


class EncodedAgain(Watch):
    """What ControlNet has encoded in the host's call is not there yet in ours. It is kept by the generation."""

    def __init__(self, process: Any, unnoticed: Watch) -> None:
        self._process = process
        self._unnoticed = unnoticed
        self._before: dict[str, Any] = {}

    @contextmanager
    def host_call(self, *, total: int, again: Sequence[int]) -> Iterator[None]:
        """Remembers what had been encoded."""
        self._before = dict(getattr(getattr(self._process, _ENCODED, None), "cache", {}))
        with self._unnoticed.host_call(total=total, again=again):
            yield

    @contextmanager
    def own_call(self, rows: Sequence[int], *, same_picture: bool) -> Iterator[None]:
        """Only that is there."""
        with ExitStack() as stack:
            stack.enter_context(self._unnoticed.own_call(rows, same_picture=same_picture))
            encoded = getattr(self._process, _ENCODED, None)
            if encoded is not None:
                stack.enter_context(_set(encoded, "cache", dict(self._before)))
            yield


class ControlNetWatch(Watch):
    """Keeps what ControlNet's models put out in the host's call, by row, for our call at the same picture."""

    def __init__(self, units: Sequence[Any], unnoticed: Watch) -> None:
        self._units = units
        self._unnoticed = unnoticed
        self._total = 0
        self._again: Sequence[int] = ()
        self._out: dict[nn.Module, list[Any]] = {}
        self._kept: list[tuple[Any, str, Any]] = []

    @contextmanager
    def host_call(self, *, total: int, again: Sequence[int]) -> Iterator[None]:
        """Records, if our call will come."""
        self._total, self._again = total, again
        models = [unit.control_model for unit in self._units if _kind(unit) in _RUN_IN_EACH_CALL]
        self._out = {model: [] for model in models} if again else {}
        with ExitStack() as stack:
            stack.enter_context(self._unnoticed.host_call(total=total, again=again))
            for model in self._out:
                stack.enter_context(forward_replaced(model, partial(self._recorded, model)))
            yield

    @contextmanager
    def own_call(self, rows: Sequence[int], *, same_picture: bool) -> Iterator[None]:
        """Puts out what was recorded, or at another picture runs the models for ``rows``."""
        owners = [(unit, name) for unit in self._units for name in _KEPT_BY_ROW]
        owners += [(unit.control_model, "cache") for unit in self._units if _kind(unit) == "IPAdapter"]
        kept = self._kept = [
            (owner, name, self._cut(getattr(owner, name), rows)) for owner, name in owners if hasattr(owner, name)
        ]
        with ExitStack() as stack:
            stack.enter_context(self._unnoticed.own_call(rows, same_picture=same_picture))
            for owner, name, value in kept:
                stack.enter_context(_set(owner, name, value))
            for model in self._out if same_picture else ():
                stack.enter_context(forward_replaced(model, partial(self._replayed, model)))
            yield

    def passed(self) -> Any:
        return self._unnoticed.passed()

    def skip_to(self, passed: Any) -> None:
        """Others are where they were then; what is cut to our rows stays so."""
        self._unnoticed.skip_to(passed)
        for owner, name, value in self._kept:
            setattr(owner, name, value)

    def _cut(self, value: Any, rows: Sequence[int]) -> Any:
        return take_rows(value, rows, total=self._total)

    def _recorded(self, model: nn.Module, host: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = host(*args, **kwargs)
            self._out[model].append(copied(self._cut(out, self._again)))
            return out

        return forward

    def _replayed(self, model: nn.Module, _: Forward) -> Forward:
        return lambda *args, **kwargs: self._out[model].pop(0)


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
