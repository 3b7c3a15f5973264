"""Forge and its kin: Forge, Forge Neo, reForge, Forge Classic.

Their ``CFGDenoiser.forward`` fires the CFG-denoiser callback, hands the prompts to the ``conditioning_modifiers`` of
the U-Net patcher's model options, and calls the model with chunks of rows, one for each prompt and the unconditional
one, the last first, in one call or, where memory is short, in several; at a CFG scale of 1 without the unconditional
one. Around each call stands the ``model_function_wrapper``. Then it combines, blends the mask in and fires the
after-CFG callback; there is no CFG-denoised one. Its denoiser gives x0 for every sampler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from importlib import import_module
from typing import Any

import torch
from modules import processing, sd_models
from torch import Tensor

from sag_pag.engine.attention import KeyValueInputs, unchanged_inputs
from sag_pag.engine.blocks import Topology
from sag_pag.engine.patching import Hook
from sag_pag.engine.rows import Row, StepRows
from sag_pag.engine.spaces import SigmaSpace, Space
from sag_pag.engine.topology import UNetTopology
from sag_pag.hosts.control import control_of, copied_lists
from sag_pag.hosts.family import Family, FamilyStep, is_circular
from sag_pag.hosts.interface import DenoiserCall, NoModelError, TakeCall, UnguidableModelError
from sag_pag.hosts.options import COND, UNCOND, CallRows, LayerOptions, transformers_before
from sag_pag.hosts.replaced import replacements_as_forwards, without_replaced_attentions

WRAPPER, MODIFIERS = "model_function_wrapper", "conditioning_modifiers"
_LIMITS = {
    "area": "prompts have areas of their own", "mask": "prompts have areas of their own",
    "default": "prompts have areas of their own", "timestep_start": "prompts hold for a part of the steps only",
    "timestep_end": "prompts hold for a part of the steps only",
}
"""What a prompt may be limited by, and what is said then."""
_ROW_AWARE = ("block_modifiers", "block_inner_modifiers")
"""Options of extensions that treat the chunks of a call each in its own way, and know of one conditional chunk only."""


@dataclass(frozen=True)
class Seam:
    """Where the two kinds of forks differ.

    ``memory`` is their module of memory management, ``predictor`` the model's attribute that knows timesteps and what
    the model predicts, ``margin`` what they multiply the memory that a call needs with; ``runs_layers``: the U-Net runs
    the layers of a block itself, so that a block's own forward is never called.
    """

    memory: str
    predictor: str
    margin: float
    runs_layers: bool


BACKEND = Seam("backend.memory_management", "predictor", margin=1.0, runs_layers=False)
"""Forge and Forge Neo."""
LDM_PATCHED = Seam("ldm_patched.modules.model_management", "model_sampling", margin=1.5, runs_layers=True)
"""reForge and Forge Classic."""


class Forge(Family):
    """The loaded model and options of a fork."""

    def __init__(self, seam: Seam) -> None:
        self.seam = seam

    def topology(self, known: Topology | None = None) -> UNetTopology:
        """As the interface says. A refiner or the hires pass may have loaded another model meanwhile."""
        model = sd_models.model_data.sd_model  # asking ``shared`` for it may load one
        objects = getattr(model, "forge_objects", None)
        if objects is None:
            raise NoModelError("no model is loaded yet")
        try:
            unet = objects.unet.model.diffusion_model
            if isinstance(known, UNetTopology) and known.is_still(unet):
                return known
            topology = UNetTopology(unet, runs_layers=self.seam.runs_layers)
        except (AttributeError, TypeError) as error:
            raise UnguidableModelError(f"{type(model).__name__} has no U-Net of the Stable Diffusion kind") from error
        if not topology.sites:
            raise UnguidableModelError(f"{type(model).__name__} has no self-attention")
        return topology

    def step(self, params: Any) -> ForgeStep:
        """The step that a CFG-denoiser callback is about."""
        return ForgeStep(self, params)

    def moves(self, hook: Hook) -> bool:
        """None: forks move weights inside the layers."""
        return False

    def key_value_inputs(self) -> KeyValueInputs:
        """Forks have no hypernetworks."""
        return unchanged_inputs

    def cfg_scales_that_save_rows(self) -> tuple[str, ...]:
        """Not every fork has a CFG scale of its own for the hires pass."""
        has_own = hasattr(processing.StableDiffusionProcessingTxt2Img, "hr_cfg")
        return ("cfg_scale", "hr_cfg") if has_own else ("cfg_scale",)

    def tell_page(self, failure: Exception) -> None:
        """A page's generation is a task of the main thread. reForge's drops what the task raises, and the page says of
        a task without a result that nothing can't be listed: so the failure is made its result.
        """
        main_thread = import_module("modules_forge.main_thread")
        if hasattr(main_thread, "last_exception"):  # Forge and Forge Neo keep it for the page
            return
        frame = sys._getframe()
        while frame is not None and frame.f_code is not main_thread.Task.work.__code__:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:  # the API's generations are no tasks
            said = escape(f"{type(failure).__name__}: {failure}")
            frame.f_locals["self"].result = [None, "", "", f"<div class='error'>{said}</div>"]

    def is_tiling(self) -> bool:
        """Whether "Tiling" has made the model's convolutions circular."""
        return is_circular(sd_models.model_data.sd_model.forge_objects.unet.model.diffusion_model)


class ForgeStep(FamilyStep):
    """One step of a fork's ``CFGDenoiser``."""

    def __init__(self, host: Forge, params: Any) -> None:
        super().__init__(params)
        self.host = host
        self.patcher = self.denoiser.inner_model.inner_model.forge_objects.unet
        self._prompts: list[Mapping[str, Any]] | None = None
        """The prompts with what they hold for, as they go into the step's calls; not known before."""
        self._left = 0
        self._with_uncond = False
        self._options: LayerOptions | None = None
        """Those of the model call under way."""
        self._as_forwards = False

    @contextmanager
    def taken_by(self, take: TakeCall) -> Iterator[None]:
        """As the interface says. What is put on the model options are plain functions: extensions copy these deeply."""
        options = self.patcher.model_options
        before = {name: options[name] for name in (WRAPPER, MODIFIERS) if name in options}
        previous = before.get(WRAPPER)
        open_still = True

        def learn(model: Any, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, *others: Any) -> tuple[Any, ...]:
            if open_still:
                self._learn(uncond, cond)
            return model, x, sigma, uncond, cond, *others

        def wrapper(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Any:
            def call(x: Tensor, sigma: Tensor, c: dict[str, Any], chunks: list[int]) -> Any:
                if previous is None:
                    return apply_model(x, sigma, **c)
                return previous(apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": chunks})

            rows = self._rows_of(args) if open_still else ()  # others may keep this beyond the step
            if not rows:
                return call(args["input"], args["timestep"], args["c"], args["cond_or_uncond"])
            return self._taken(take, call, args, rows, previous)

        # the last modifier: those before it may make calls of their own
        ours = {WRAPPER: wrapper, MODIFIERS: [*before.get(MODIFIERS, ()), learn]}
        options.update(ours)
        try:
            yield
        finally:
            open_still = False
            _give_back(options, ours, before)

    def _learn(self, uncond: Any, cond: Any) -> None:
        """The last thing before the step's calls."""
        self._prompts, self._left, self._with_uncond = list(cond), len(cond), uncond is not None

    def _rows_of(self, args: Mapping[str, Any]) -> tuple[Row, ...]:
        """What a call's rows are; nothing if it is not one of the step's: those come once, the last prompt first."""
        chunks = args["cond_or_uncond"]
        if self._prompts is None or chunks.count(COND) > self._left or chunks.count(UNCOND) > self._with_uncond:
            return ()
        images, rows = len(args["input"]) // len(chunks), list[Row]()
        for chunk in chunks:
            if chunk == COND:
                self._left -= 1
                rows += [Row("cond", image, self._left, _weight(self._prompts[self._left])) for image in range(images)]
            else:
                self._with_uncond = False
                rows += [Row("uncond", image) for image in range(images)]
        return tuple(rows)

    def _taken(
        self, take: TakeCall, call: Callable[..., Any], args: Mapping[str, Any], rows: tuple[Row, ...], previous: Any,
    ) -> Tensor:
        """Hands a call of the step's over, with everything that depends on its rows where it can be cut by row.

        ``previous`` is another extension's wrapper that the call goes through, if there is one.
        """
        x, c, control = args["input"], args["c"], self._control
        given = c["transformer_options"]
        kinds = tuple(UNCOND if row.role == "uncond" else COND for row in rows)
        cond = {
            "c": {key: value for key, value in c.items() if key not in ("transformer_options", "control")},
            "control": c.get("control"), "picture": x,
            "rows": CallRows(
                given, kinds, len(rows) // len(args["cond_or_uncond"]),
                transformers_before(self.patcher.model.diffusion_model),
            ),
        }

        def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Any:
            called: CallRows = cond["rows"]
            if self._as_forwards:
                called = replace(called, given=without_replaced_attentions(called.given))
            self._options = LayerOptions(called)
            c = {**cond["c"], "transformer_options": self._options}
            if control is not None:
                same = torch.equal(x, cond["picture"])
                c["control"] = copied_lists(cond["control"]) if same else control_of(control, x, sigma, c, called)
            return call(x, sigma, c, called.chunks)

        denoise.__wrapped__ = previous  # type: ignore[attr-defined]  # neighbours are known by it
        with self._replaced_attentions(given):
            return take(DenoiserCall(denoise, x, args["timestep"], cond, rows))

    @contextmanager
    def _replaced_attentions(self, options: Mapping[str, Any]) -> Iterator[None]:
        """While open, self-attentions that others have replaced are so in their forwards, and not in the options."""
        replacements = options.get("patches_replace", {}).get("attn1")
        if not replacements:
            yield
            return
        with replacements_as_forwards(self.host.topology(), replacements, self._current_options):
            self._as_forwards = True
            try:
                yield
            finally:
                self._as_forwards = False

    def _current_options(self) -> LayerOptions:
        assert self._options is not None
        return self._options

    @property
    def _control(self) -> Any:
        """The last of the ControlNet units that work in this step."""
        return next((prompt["control"] for prompt in self._prompts or () if prompt.get("control") is not None), None)

    @property
    def path(self) -> tuple[Any, ...]:
        """The model that the patcher patches."""
        return (self.patcher.model,)

    def wants_own_call(self, more: int) -> bool:
        """Where free memory is short by the host's own measure, or an extension knows of one conditional chunk only."""
        options = self.patcher.model_options.get("transformer_options", {})
        if options.get("patches_replace", {}).get("attn1") or any(options.get(name) for name in _ROW_AWARE):
            return True
        x = self.params.x
        needed = self.patcher.model.memory_required([len(self.rows.rows) + more, *x.shape[1:]])
        free = import_module(self.host.seam.memory).get_free_memory(x.device)
        return bool(needed * self.host.seam.margin >= free)

    def progress(self, sigma: Tensor) -> float:
        """On the scale of the WebUI's "Refiner: switch at"; ``sigma`` are noise levels."""
        return (999 - int(self._predictor.timestep(torch.max(sigma)[None]))) / 1000

    @property
    def _predictor(self) -> Any:
        return getattr(self.patcher.model, self.host.seam.predictor)

    @property
    def rows(self) -> StepRows:
        """Every prompt of each image, then the unconditional ones. Raises ``UnguidableModelError`` for limited ones."""
        assert self._prompts is not None  # a call of the step is under way
        for prompt in self._prompts:
            for key, reason in _LIMITS.items():
                if prompt.get(key) is not None:
                    raise UnguidableModelError(reason)
        images = len(self.params.x)
        conds = [
            Row("cond", image, number, _weight(prompt))
            for number, prompt in enumerate(self._prompts) for image in range(images)
        ]
        return StepRows((*conds, *(Row("uncond", image) for image in range(images))))

    @property
    def space(self) -> Space:
        """x0 and noise levels, for every sampler. Where a model predicts v, only a part of the picture stays in x0."""
        nothing, something = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        kept = self._predictor.calculate_denoised(torch.ones(1), nothing, something)
        return SigmaSpace(velocity=bool(kept < 1))

    @property
    def factor(self) -> float:
        """No sampler scales CFG."""
        return 1.0


def _weight(prompt: Mapping[str, Any]) -> float:
    return float(prompt.get("strength", 1.0))


def _give_back(options: dict[str, Any], ours: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Makes the options what they were, but for what others have put there meanwhile."""
    for name, value in ours.items():
        if options.get(name) is value:
            if name in before:
                options[name] = before[name]
            else:
                del options[name]
