"""Where the guidance meets the host's generations: their ``sample``, and the three CFG callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from sag_pag.hosts.interface import Host
from sag_pag.settings import SettingError, Settings
from sag_pag.webui.record import Record
from sag_pag.webui.refused import RefusedError, told_to_the_page
from sag_pag.webui.runs import GuidedRun

VIEWS = "sag_pag_views"
"""Attribute of a processing object: what SAG saw while the batch was sampled, if that is to be shown."""
_PREPARED = "sag_pag_prepared"
"""Attribute of a processing object, and so of its copies: what is to be done when it is sampled."""


@dataclass
class Prepared:
    """What the next batch asks for, or what is wrong with that; ``sampled`` once it has been done, which has given so
    many ``pictures``.
    """

    settings: Settings | SettingError
    record: Record
    sampled: bool = False
    pictures: int | None = None


class Sampling:
    """Guides the generations that were prepared for it. Between them it holds nothing of theirs.

    The classes' ``sample`` is replaced, and looks for what was prepared on the very object that it is called on: that
    may be a copy, it may be called twice, and others may have replaced its ``sample`` before or after us.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._running: list[GuidedRun] = []
        self._steps: list[GuidedRun | None] = []  # steps under way, a nested generation's inside its outer one's
        self._replaced: dict[type, Callable[..., Any]] = {}

    def prepare(self, p: Any, settings: Settings | SettingError) -> None:
        """Makes ``p.sample`` guided by ``settings``, or refused for them, until the batch is over."""
        self.replace_in(type(p))
        before: Prepared | None = vars(p).get(_PREPARED)
        record = Record(
            settings if isinstance(settings, Settings) else None, before=None if before is None else before.record
        )
        record.write(p)
        setattr(p, _PREPARED, Prepared(settings, record))

    def write_record(self, p: Any) -> None:
        """Makes the metadata say once more what is true of the batch: others may have written it anew."""
        if (prepared := vars(p).get(_PREPARED)) is not None:
            prepared.record.write(p)

    def pictures(self, p: Any) -> int | None:
        """How many pictures of the batch were sampled here, if that is known; others may add pictures to it."""
        prepared: Prepared | None = vars(p).get(_PREPARED)
        return None if prepared is None else prepared.pictures

    def end_batch(self, p: Any) -> None:
        """After a batch was sampled: if that went another way than through ``sample``, its pictures say so."""
        prepared = vars(p).get(_PREPARED)
        if prepared is not None and not prepared.sampled:
            refused = isinstance(prepared.settings, SettingError)
            prepared.record.withdraw(
                str(prepared.settings) if refused else "another extension sampled in its own way", p
            )

    def forget(self, p: Any) -> None:
        """Takes off what was prepared."""
        vars(p).pop(_PREPARED, None)

    def give_back(self) -> None:
        """Gives every class its own ``sample`` back."""
        for kind, own in self._replaced.items():
            kind.sample = own  # type: ignore[attr-defined]
        self._replaced.clear()

    def replace_in(self, kind: type) -> None:
        """Replaces ``sample`` of the class that defines it for generations of this class."""
        owner = next(base for base in kind.__mro__ if "sample" in vars(base))
        if owner in self._replaced:
            return
        own = self._replaced[owner] = vars(owner)["sample"]

        @wraps(own)
        def sample(p: Any, *args: Any, **kwargs: Any) -> Any:
            return self._sample(p, partial(own, p, *args, **kwargs))

        owner.sample = sample  # type: ignore[attr-defined]

    def _sample(self, p: Any, sample: Callable[[], Any]) -> Any:
        """Guides ``sample`` if that was prepared for ``p`` itself, and is not under way."""
        prepared: Prepared | None = vars(p).get(_PREPARED)
        if prepared is None or any(run.p is p for run in self._running):
            return sample()
        with told_to_the_page(self.host):
            return self._guided(p, sample, prepared)

    def _guided(self, p: Any, sample: Callable[[], Any], prepared: Prepared) -> Any:
        """Raises whatever ``sample`` raises, ``RefusedError`` for settings, and what a callback failed with."""
        prepared.sampled = True
        if isinstance(prepared.settings, SettingError):
            raise RefusedError(prepared.settings)
        run = GuidedRun(self.host, p, prepared.settings, prepared.record)
        if not run.check():
            return _counted(sample(), prepared)
        self._running.append(run)
        try:
            result = _counted(sample(), prepared)
        finally:
            self._running.remove(run)
            self._forget_steps(run)
            run.close()
        run.raise_if_failed()
        run.report()
        if prepared.settings.sag_show:
            setattr(p, VIEWS, run.views)
        return result

    def on_cfg_denoiser(self, params: Any) -> None:
        """Before a step's calls of the model."""
        try:
            run = next((run for run in self._running if run.p is params.denoiser.p), None)
        except AttributeError as error:  # another host than we think: nobody knows whose step it is
            for run in self._running:
                run.fail(error)
            return
        self._forget_steps(run)
        self._steps.append(run)
        if run is not None:
            run.failing_visibly(lambda: run.begin_step(self.host.step(params)))

    def _forget_steps(self, run: GuidedRun | None) -> None:
        """Forgets a step of ``run`` that never came to its end, and what was nested in it."""
        if run is not None and run in self._steps:
            del self._steps[self._steps.index(run) :]

    def on_cfg_denoised(self, params: Any) -> None:
        """After a step's calls of the model, before CFG."""
        for run in self._running:
            if run.is_under_way(params.inner_model):
                while self._steps[-1] is not run:  # the steps of nested generations that failed
                    self._steps.pop()
                run.failing_visibly(partial(run.end_calls, params.x))

    def on_mask_blend(self, p: Any, told: Any) -> None:
        """When a picture that is inpainted was put together with what is protected."""
        run = next((run for run in self._running if run.p is p), None)
        if run is not None:
            run.failing_visibly(partial(run.was_blended, told))

    def on_cfg_after_cfg(self, params: Any) -> None:
        """After CFG. Tells nobody whose step it is: the one that began last."""
        run = self._steps.pop() if self._steps else None
        if run is not None:
            guided = run.failing_visibly(partial(run.guide, params.x))
            if guided is not None:
                params.x = guided


def _counted(latents: Any, prepared: Prepared) -> Any:
    prepared.pictures = len(latents)
    return latents
