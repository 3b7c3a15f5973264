"""One guided call of a generation's ``sample``, the same in every host.

Each step goes: CFG-denoiser callback (the host's calls of its model are taken over) → calls → CFG-denoised callback
(they are given back, SAG makes its own call) → CFG → after-CFG callback (the guidance is added). A host that has no
CFG-denoised callback gives them back at the last one. Hosts print and swallow exceptions from callbacks: they are kept
here and raised where hosts do not.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from sag_pag.engine.blocks import Topology
from sag_pag.engine.plan import (
    ChosenBlocks,
    HiresPass,
    StepPlan,
    asks_for,
    check_blocks_of,
    choose_blocks,
    plan_step,
    scales_at,
)
from sag_pag.engine.rows import StepRows
from sag_pag.engine.step import GuidedStep, SagView
from sag_pag.guidance import MergedTokensError
from sag_pag.hosts.interface import DenoiserCall, Host, Step, UnguidableModelError
from sag_pag.neighbours import Neighbours
from sag_pag.neighbours.scene import BesideError
from sag_pag.settings import BLOCKS_OF, FEATURES, SettingError, Settings, Switchable
from sag_pag.webui.record import Record
from sag_pag.webui.refused import RefusedError
from sag_pag.webui.seen import where


class _Model:
    """The model that steps run on, and what is worked out once for it."""

    def __init__(self, topology: Topology, settings: Settings) -> None:
        self.topology = topology
        self.chosen: ChosenBlocks = choose_blocks(settings, topology)
        self.neighbours = Neighbours(topology)


class GuidedRun:
    """Guides the steps of one call of ``sample``, and counts them."""

    def __init__(self, host: Host, p: Any, settings: Settings, record: Record) -> None:
        self.host = host
        self.p = p
        self.settings = settings
        self.record = record
        self.views: list[tuple[str, SagView]] = []
        """What SAG saw, with where in the run that was, if it is to be shown."""
        self._model: _Model | None = None
        self._checked: set[Switchable] = set()
        """The features whose blocks the first model that runs them is known to have."""
        self._passes: set[HiresPass | None] = set()
        self._due: set[Switchable] = set()
        """The passes that ran, and the features in whose range a step of theirs lay."""
        self._unguidable = ""
        self._acted: set[Switchable] = set()
        self._refused: dict[Switchable, str] = {}
        """Which features a model could do, and which ones one could not, with the reason."""
        self._step: Step | None = None
        self._guided: GuidedStep | None = None
        self._predictions: Tensor | None = None
        self._decided = self._ended = False
        self._progress = 0.0
        self._taken = ExitStack()
        self._error: Exception | None = None
        self.steps_announced = self.steps_decided = self.steps_planned = self.steps_guided = 0
        self._unguided_because = ""

    def check(self) -> bool:
        """Before sampling: whether the loaded model can be guided; if not, the record says why.

        Raises ``RefusedError`` for blocks that the first model to be guided does not have. Where that is not the
        loaded one, its first guided step does.
        """
        try:
            topology = self._known_model().topology
        except UnguidableModelError as error:
            for feature in self._features_on():
                self._check_blocks(feature, None)
            self.record.withdraw(str(error), self.p)
            return False
        hires = self.host.hires_pass(self.p)
        first = "hires pass" if hires and self.settings.hires_pass == "hires pass" else hires
        for feature in self._features_on():
            start: float = getattr(self.settings, f"{feature}_start")
            known = not self.host.has_other_model(self.p, first, start=start)
            self._check_blocks(feature, topology if known else None)
            if known:
                self._checked.add(feature)
        return True

    def _features_on(self) -> list[Switchable]:
        return [feature for feature in FEATURES if getattr(self.settings, f"{feature}_enabled")]

    def _check_blocks(self, feature: Switchable, topology: Topology | None) -> None:
        try:
            check_blocks_of(feature, self.settings, topology)
        except SettingError as error:
            raise RefusedError(error) from error

    def _known_model(self) -> _Model:
        """The model that runs now. Raises ``UnguidableModelError``."""
        topology = self.host.topology(self._model.topology if self._model else None)
        if self._model is None or self._model.topology is not topology:
            self._model = _Model(topology, self.settings)
        return self._model

    def is_under_way(self, inner_model: Any) -> bool:
        """Whether the step under way is of the denoiser with this model."""
        return self._step is not None and self._step.is_of(inner_model)

    def begin_step(self, step: Step) -> None:
        """CFG-denoiser callback: takes the step's calls over until they are done."""
        self.steps_announced += 1
        self._taken.close()
        self._step, self._guided, self._decided, self._ended = step, None, False, False
        self._taken.enter_context(step.taken_by(self._take))

    def _take(self, call: DenoiserCall) -> Tensor:
        self.raise_if_failed()
        if not self._decided:
            self._decided = True
            self._guided = self._decide(call)
        if self._guided is None:
            return call.denoise(call.x, call.sigma, cond=call.cond)
        with self._merged_tokens_refused("pag"):
            return self._guided(call.denoise, call.x, call.sigma, cond=call.cond, rows=call.rows)

    def _decide(self, call: DenoiserCall) -> GuidedStep | None:
        """This step's guidance, on the live model: a refiner may have taken over."""
        assert self._step is not None
        self.steps_decided += 1
        self._progress = self._step.progress(call.sigma)
        hires = self.host.hires_pass(self.p)
        scales = scales_at(self.settings, progress=self._progress, number=self._step.number, hires=hires)
        acting = [feature for feature in FEATURES if scales[feature]]
        self._passes.add(hires)
        self._due.update(acting)
        if not acting:
            return None
        try:
            model, rows = self._known_model(), self._step.rows
        except UnguidableModelError as error:
            self._unguidable = str(error)
            return None
        for feature in acting:
            self._note_blocks(feature, model)
        plan = plan_step(self.settings, model.chosen, scales)
        return None if plan is None else self._guided_step(plan, model, self._step, rows, call=call)

    def _guided_step(
        self, plan: StepPlan, model: _Model, step: Step, rows: StepRows, *, call: DenoiserCall,
    ) -> GuidedStep:
        self.steps_planned += 1
        acting = [feature for feature in FEATURES if getattr(plan, f"{feature}_scale")]
        try:
            manner = model.neighbours.manner(
                short_of_memory=step.wants_own_call(len(rows.conds)), moves=self.host.moves, denoise=call.denoise,
                path=step.path, size=(int(call.x.shape[-2]), int(call.x.shape[-1])), acting=acting,
            )
        except BesideError as error:
            raise RefusedError.beside(error) from error
        return GuidedStep(
            plan, topology=model.topology, rows=rows, space=step.space, manner=manner,
            key_value_inputs=self.host.key_value_inputs(), circular=self.host.is_tiling(),
        )

    def _note_blocks(self, feature: Switchable, model: _Model) -> None:
        """The first model that runs a feature must have its blocks; a later one may have fewer, which is said."""
        if feature not in self._checked:
            self._check_blocks(feature, model.topology)
            self._checked.add(feature)
        if reason := model.chosen.refused.get(feature):
            self._refused[feature] = reason
            return
        self._acted.add(feature)
        if standing_in := model.chosen.standing_in.get(feature):
            text = getattr(self.settings, BLOCKS_OF[feature])
            self.record.note(f"{feature.upper()} at {standing_in}, this model has no {text}", self.p)
        if unknown := model.chosen.unknown[feature]:
            self.record.note(
                f"not applied to the end in {', '.join(unknown)}: a model that took over has no such block", self.p
            )

    def was_blended(self, told: Any) -> None:
        """The host has blended with what is protected: that is of the step under way, if there is one."""
        if self._step is not None:
            self._step.was_blended(told)

    def end_calls(self, predictions: Tensor | None = None) -> None:
        """CFG-denoised callback: all of the step's calls are done. Others may still change the ``predictions``."""
        self._taken.close()
        if predictions is not None:
            self._predictions = predictions
        if self._guided is None or self._ended:
            return
        self._ended = True
        with self._merged_tokens_refused("sag"):
            self._guided.finish()
        if self.settings.sag_show and self._guided.seen_by_sag is not None:
            place = where(self._progress, self.host.hires_pass(self.p))
            self.views.append((place, self._guided.seen_by_sag))

    @contextmanager
    def _merged_tokens_refused(self, feature: Switchable) -> Iterator[None]:
        """Token merging is the WebUI's own option: a block that it works in is a setting that can't be used."""
        try:
            yield
        except MergedTokensError as error:
            name = BLOCKS_OF[feature]
            allowed = "a block whose tokens are not merged: choose a coarser one, or a token merging ratio of 0"
            raise RefusedError(SettingError(name, getattr(self.settings, name), allowed)) from error

    def guide(self, combined: Tensor) -> Tensor:
        """After-CFG callback: the host's result with the guidance added."""
        self.end_calls()
        guided, self._guided = self._guided, None
        step, self._step = self._step, None
        predictions, self._predictions = self._predictions, None
        if guided is None or step is None or self._error is not None:
            return combined
        if guided.failure:
            assert self._model is not None
            self._unguided_because = self._model.neighbours.blame(guided.failure)
            return combined
        if predictions is not None:
            guided.see_mixed(predictions)
        result = guided.apply(combined, factor=step.factor, weight=step.weight, blend=step.blend)
        self.steps_guided += 1
        return result

    def failing_visibly(self, work: Callable[[], Any]) -> Any:
        """Runs a callback's work; an exception is kept for the next call of the model, or the end, to raise."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the host would print and forget it
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Keeps an exception to be raised, the first one if there are several.

        What the failed calls hold is let go at once: after an out-of-memory there must be room again.
        """
        for failed in _came_of(error):
            traceback.clear_frames(failed.__traceback__)
        self._guided = None
        self._error = self._error or error

    def close(self) -> None:
        """Gives back whatever is still taken over."""
        self._taken.close()
        self._step = self._guided = self._model = None

    def raise_if_failed(self) -> None:
        """Raises what a callback failed with, if any did. It is not kept: its traceback leads back here."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def report(self) -> None:
        """After sampling: if not every step was guided that was to be, the record says so."""
        for feature, reason in self._refused.items():
            if feature in self._acted:
                self.record.note(f"{feature.upper()} not applied throughout, {reason}", self.p)
            else:
                self.record.give_up(feature, reason, self.p)
        if not self.steps_announced:
            self.record.withdraw("the sampler did not announce its steps", self.p)
        elif not self.steps_decided:
            self.record.withdraw("the sampler did not call the model in the WebUI's way", self.p)
        elif self.steps_planned and not self.steps_guided:
            self.record.withdraw(self._unguided_because or "no step came to its end", self.p)
        elif self._unguidable and not self.steps_planned:
            self.record.withdraw(self._unguidable, self.p)
        else:
            self._report_what_is_missing()

    def _report_what_is_missing(self) -> None:
        """Of a run that was guided in some steps at least, or was to be in none."""
        for feature in self._features_on():
            if feature not in self._due and (reason := self._never_due(feature)):
                self.record.give_up(feature, reason, self.p)
        if self._unguidable:
            self.record.note(f"not applied to the end, {self._unguidable}", self.p)
        if self.steps_guided < self.steps_planned:
            why = f", {self._unguided_because}" if self._unguided_because else ""
            self.record.note(f"applied in {self.steps_guided} of {self.steps_planned} steps{why}", self.p)
        if 0 < self.steps_decided < self.steps_announced:
            missed = f"{self.steps_announced - self.steps_decided} of {self.steps_announced} steps"
            self.record.note(f"not applied in {missed}: another extension called the model in its own way", self.p)

    def _never_due(self, feature: Switchable) -> str | None:
        """Why a feature that was to do something in this run did nothing; ``None`` if it was not to."""
        if asks_for(feature, self.settings, self._passes):
            start, end, every = (getattr(self.settings, f"{feature}_{name}") for name in ("start", "end", "every"))
            steps = f"{start:g} to {end:g}" + (f", one step in {every}" if every > 1 else "")
            return f"no step of this run lies in its range ({steps})"
        if "first pass" in self._passes and asks_for(feature, self.settings, ["hires pass"]):
            return "the hires pass did not run"
        return None


def _came_of(error: BaseException) -> list[BaseException]:
    """An exception and those that it came of, each once: an exception may be its own cause."""
    seen: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        at = waiting.pop()
        if at is not None and id(at) not in seen:
            seen[id(at)] = at
            waiting += [at.__cause__, at.__context__]
    return list(seen.values())
