"""How a generation is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException

from sag_pag.hosts.interface import Host
from sag_pag.neighbours.scene import BesideError
from sag_pag.settings import SettingError


class RefusedError(ValueError, HTTPException):  # type: ignore[misc]
    """A generation refused for what was asked for: as text for the page, and for the API a status code, detail and
    body. To the API's server an ``HTTPException`` is an answer and not a failure, whose traceback it would print.
    """

    def __init__(self, error: SettingError) -> None:
        HTTPException.__init__(self, status_code=422, detail=str(error))
        self.args = (error.for_people,)
        self.body: dict[str, Any] = {
            "field": error.field, "value": repr(error.value), "allowed": error.allowed, "meant": list(error.meant),
        }

    def __str__(self) -> str:
        return str(self.args[0])

    @classmethod
    def beside(cls, error: BesideError) -> RefusedError:
        """Refused because of another extension."""
        made = cls(SettingError(f"{error.feature}_enabled", True, error.way_out))
        made.args, made.detail = (str(error),), str(error)
        made.body |= {"neighbour": error.neighbour}
        return made


RefusedError.__name__ = "Guidance"  # the WebUI puts the name before the text on the page


@contextmanager
def told_to_the_page(host: Host) -> Iterator[None]:
    """While open, what is raised is said on the page in every host."""
    try:
        yield
    except Exception as failure:
        host.tell_page(failure)
        raise
