"""What the pictures of a batch say of guidance in their metadata: what was asked for, and what did not come of it."""

from __future__ import annotations

import logging
from typing import Any

from sag_pag.settings import PARAMETERS, Settings, Switchable
from sag_pag.webui import texts

logger = logging.getLogger(__name__)

NOTE = "SAG/PAG note"
"""Infotext field that says what guidance did not do though it was on."""
_OWN_FIELDS = (NOTE, *(parameter.infotext for parameter in PARAMETERS.values()))


def clear(p: Any) -> None:
    """Takes our fields out of a generation's metadata."""
    for key in _OWN_FIELDS:
        p.extra_generation_params.pop(key, None)


class Record:
    """The fields of one batch. It is kept, and written again, because others write the same metadata.

    ``before`` is the record of the batch before: what that one has said in the log is not said again.
    """

    def __init__(self, settings: Settings | None, *, before: Record | None = None) -> None:
        self._settings = settings
        self._claims = {} if settings is None else settings.infotext()
        self._notes: list[str] = []
        self._said: set[str] = before._said if before is not None else set()

    def write(self, p: Any) -> None:
        """Makes a generation's metadata say this and nothing else of us."""
        clear(p)
        p.extra_generation_params.update(self._claims)
        if self._notes:
            p.extra_generation_params[NOTE] = "; ".join(self._notes)

    def note(self, text: str, p: Any) -> None:
        """Says once, in the metadata and in the log, what guidance did not do."""
        if text not in self._notes:
            self._notes.append(text)
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s: %s", texts.PANEL, text)
        self.write(p)

    def give_up(self, feature: Switchable, reason: str, p: Any) -> None:
        """One feature did nothing: the pictures no longer say that it did, and say why."""
        if self._settings is None:
            return
        self._settings = self._settings.with_values({f"{feature}_enabled": False})
        if not self._settings.enabled:
            self.withdraw(reason, p)
            return
        self._claims = self._settings.infotext()
        self.note(f"{feature.upper()} not applied, {reason}", p)

    def withdraw(self, reason: str, p: Any) -> None:
        """The pictures are not guided after all: they say why, and no longer that they are."""
        self._claims = {}
        self.note(f"not applied, {reason}", p)
