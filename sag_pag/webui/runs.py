"""Guidance in the WebUI's sampling loop.

A ``GuidedRun`` lives as long as one call of ``p.sample``, and everything it puts on the host's objects goes when that
call ends, however it ends. Within it each step goes: CFG-denoiser callback (the denoiser's forward is replaced) → U-Net
calls → denoised callback (the forward is given back, SAG makes its own call) → CFG → after-CFG callback (the guidance
is added). The WebUI prints and swallows exceptions from callbacks: they are kept here and raised where it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from sag_pag.engine.patching import Forward, forward_replaced
from sag_pag.engine.session import GuidedStep, SagView, check_blocks, guides_pass, plan_step, unknown_blocks
from sag_pag.hosts import a1111 as host
from sag_pag.settings import SettingError, Settings

logger = logging.getLogger(__name__)

NOTE = "SAG/PAG note"
"""Infotext field that says why a picture is not guided though a feature was on."""


VIEWS = "sag_pag_views"
"""Attribute of a processing object: what SAG saw while the batch was sampled, if that is to be shown."""

_WAITING = "sag_pag_waiting"
"""Attribute of a processing object whose ``sample`` has been stood in for and not been called yet."""


class RefusedError(ValueError):
    """A generation refused for a setting; the API answers with this status code and detail."""

    def __init__(self, error: SettingError) -> None:
        super().__init__(str(error))
        self.status_code = 422
        self.detail = str(error)
        self.body = {"field": error.field, "value": repr(error.value), "allowed": error.allowed}


class GuidedRun:
    """One guided call of ``p.sample``."""

    def __init__(self, p: Any, settings: Settings) -> None:
        self.p = p
        self.settings = settings
        self._step: GuidedStep | None = None
        self._denoiser: Any = None
        self._patch = ExitStack()
        self._standing: Forward | None = None
        self._error: Exception | None = None
        self._progress = 0.0
        self.views: list[tuple[float, SagView]] = []
        """What SAG saw, with the progress of its steps, if that is to be shown."""

    def check(self) -> bool:
        """Whether the loaded model can be guided; if not, the picture's metadata and the log say why.

        Raises ``RefusedError`` for blocks that it does not have.
        """
        topology = None
        try:
            topology = host.loaded_topology()
        except host.UnguidableModelError as error:
            for key in self.settings.infotext():
                self.p.extra_generation_params.pop(key, None)
            self.note(f"not applied, {error}")
        try:
            check_blocks(self.settings, topology)
        except SettingError as error:
            raise RefusedError(error) from error
        return topology is not None

    def note(self, text: str) -> None:
        """Says once, in the picture's metadata and in the log, what guidance did not do."""
        if self.p.extra_generation_params.get(NOTE) != text:
            self.p.extra_generation_params[NOTE] = text
            logger.warning("Self-Attention & Perturbed-Attention Guidance: %s", text)

    def begin_step(self, denoiser: Any) -> None:
        """CFG-denoiser callback: stands in for the denoiser's forward until the step's U-Net calls are done."""
        self._patch.close()
        self._step, self._denoiser = None, denoiser
        self._patch.enter_context(forward_replaced(denoiser.inner_model, self._stand_in))

    def _stand_in(self, denoise: Forward) -> Forward:
        def forward(x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
            if self._standing is not forward:  # another extension has kept it beyond its step
                return denoise(x, sigma, **kwargs)
            if self._error is not None:
                raise self._error
            if self._step is None:
                self._step = self._make_step(denoise, sigma)
            return denoise(x, sigma, **kwargs) if self._step is None else self._step(x, sigma, **kwargs)

        self._standing = forward
        self._patch.callback(self._stand_down)
        return forward

    def _stand_down(self) -> None:
        self._standing = None

    def _make_step(self, denoise: Forward, sigma: Tensor) -> GuidedStep | None:
        """This step's guidance. Resolved against the live model: a refiner may have taken over."""
        hires = host.hires_pass(self.p)
        if not guides_pass(self.settings, hires):
            return None
        try:
            topology = host.loaded_topology()
        except host.UnguidableModelError as error:
            self.note(f"not applied to the end, {error}")
            return None
        if unknown := unknown_blocks(self.settings, topology):
            self.note(f"not applied to the end in {', '.join(unknown)}: a model that took over has no such block")
        self._progress = host.progress(self._denoiser, sigma)
        plan = plan_step(self.settings, topology, progress=self._progress, hires=hires)
        if plan is None:
            return None
        return GuidedStep(
            denoise, plan, topology=topology, layout=host.row_layout(self._denoiser), space=host.space(self._denoiser),
            own_call=host.wants_own_call(), key_value_inputs=host.key_value_inputs(),
        )

    def steps_with(self, inner_model: Any) -> bool:
        """Whether the step under way is of the denoiser with this inner model."""
        return self._denoiser is not None and self._denoiser.inner_model is inner_model

    def end_calls(self) -> None:
        """CFG-denoised callback: all of the step's U-Net calls are done."""
        self._patch.close()
        if self._step is not None:
            self._step.finish()
            if self._step.seen_by_sag is not None:
                self.views.append((self._progress, self._step.seen_by_sag))

    def guide(self, combined: Tensor) -> Tensor:
        """After-CFG callback: the host's result with the guidance added."""
        step, self._step = self._step, None
        denoiser, self._denoiser = self._denoiser, None
        if step is None or self._error is not None:
            return combined
        return step.apply(
            combined, factor=getattr(denoiser, "cond_scale_miltiplier", 1.0), weight=host.inpainting_weight(denoiser)
        )

    def failing_visibly(self, work: Callable[[], Any]) -> Any:
        """Runs a callback's work; an exception is kept for the next U-Net call, or the end, to raise."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the host would print and forget it
            self._error = self._error or error
            return None

    def close(self) -> None:
        """Gives back whatever is still replaced."""
        self._patch.close()
        self._step = self._denoiser = None

    def raise_if_failed(self) -> None:
        """Raises what a callback failed with, if any did."""
        if self._error is not None:
            raise self._error


class GuidedSample:
    """Stands in for ``p.sample`` once: guides it, or refuses. The WebUI swallows exceptions from script methods, but
    not from ``p.sample``.
    """

    def __init__(self, callbacks: Callbacks, p: Any, settings: Settings | SettingError) -> None:
        self.callbacks = callbacks
        self.p = p
        self.settings: Settings | SettingError | None = settings
        self.had_own = "sample" in vars(p)
        self.original = p.sample
        p.sample = self
        setattr(p, _WAITING, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        settings, self.settings = self.settings, None
        self._remove(self.p)
        if isinstance(settings, SettingError):
            raise RefusedError(settings)
        sample = partial(self.original, *args, **kwargs)
        if settings is None:
            return sample()
        run = GuidedRun(self.p, settings)
        result = self.callbacks.sample(run, sample)
        if settings.sag_show:
            setattr(self.p, VIEWS, run.views)
        return result

    @classmethod
    def withdraw(cls, p: Any) -> None:
        """Takes off what waits on ``p``: a batch that was aborted, or one that ``p`` was copied from."""
        waiting = vars(p).get(_WAITING)
        if waiting is not None:
            if waiting.p is p:
                waiting.settings = None
            waiting._remove(p)

    def _remove(self, p: Any) -> None:
        """Gives ``p.sample`` back, unless another extension has wrapped this one by now; then it only passes on."""
        vars(p).pop(_WAITING, None)
        if vars(p).get("sample") is self:
            del p.sample
            if self.had_own:
                p.sample = self.original


class Callbacks:
    """The three CFG callbacks, for whichever guided run is going on. Between runs it holds nothing."""

    def __init__(self) -> None:
        self._running: list[GuidedRun] = []
        self._steps: list[GuidedRun | None] = []  # steps under way, a nested generation's inside its outer one's

    def prepare(self, p: Any, settings: Settings | SettingError | None) -> None:
        """Makes the next ``p.sample`` guided by ``settings`` or refused for them; ``None``: neither."""
        GuidedSample.withdraw(p)
        if settings is not None:
            GuidedSample(self, p, settings)

    def sample(self, run: GuidedRun, sample: Callable[[], Any]) -> Any:
        """Runs ``sample`` with guidance. Raises whatever it raises, and what a callback failed with."""
        if not run.check():
            return sample()
        self._running.append(run)
        try:
            result = sample()
        finally:
            self._running.remove(run)
            self._forget_steps(run)
            run.close()
        run.raise_if_failed()
        return result

    def on_cfg_denoiser(self, params: Any) -> None:
        """Before a step's U-Net calls."""
        if not self._running:
            return
        run = next((run for run in self._running if run.p is params.denoiser.p), None)
        self._forget_steps(run)
        self._steps.append(run)
        if run is not None:
            run.failing_visibly(partial(run.begin_step, params.denoiser))

    def _forget_steps(self, run: GuidedRun | None) -> None:
        """Forgets a step of ``run`` that never came to its end, and what was nested in it."""
        if run is not None and run in self._steps:
            del self._steps[self._steps.index(run) :]

    def on_cfg_denoised(self, params: Any) -> None:
        """After a step's U-Net calls, before CFG."""
        for run in self._running:
            if run.steps_with(params.inner_model):
                while self._steps[-1] is not run:  # the steps of nested generations that failed
                    self._steps.pop()
                run.failing_visibly(run.end_calls)

    def on_cfg_after_cfg(self, params: Any) -> None:
        """After CFG. Tells nobody whose step it is: the one that began last."""
        run = self._steps.pop() if self._steps else None
        if run is not None:
            guided = run.failing_visibly(partial(run.guide, params.x))
            if guided is not None:
                params.x = guided
