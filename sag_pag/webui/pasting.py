"""Reading a picture's metadata back: ours, and other extensions'."""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr

from sag_pag import hosts
from sag_pag.settings import PARAMETERS, SettingError, complete_infotext
from sag_pag.webui.migration import migrate

logger = logging.getLogger(__name__)


def on_infotext_pasted(_infotext: str, params: dict[str, Any]) -> None:
    """Adds to a pasted text what it says in other extensions' fields, and what it says without naming it.

    Fields that the WebUI's options say to disregard stay as they are. What could not be taken over is shown on the
    page, and logged: the API has no page.
    """
    for parameter in PARAMETERS.values():
        if parameter.infotext in params:
            try:
                parameter.parse(params[parameter.infotext])
            except SettingError as error:
                del params[parameter.infotext]
                _warn(f"{parameter.label}: {error.value} is left out; allowed: {error.allowed}")
    migration = migrate(params)
    params.update(migration.fields)
    params.update(complete_infotext(params))
    for disregarded in hosts.current().disregarded_fields() & {parameter.infotext for parameter in PARAMETERS.values()}:
        params.pop(disregarded, None)
    if migration.notes:
        _warn(migration.message)
    elif migration.message:
        logger.info("%s", migration.message)
        gr.Info(migration.message)


def _warn(message: str) -> None:
    logger.warning("%s", message)
    gr.Warning(message)
