"""Reading a picture's metadata back: ours, and other extensions'.

The paste button and the API's ``infotext`` field both ask the readers in ``FIELDS``, one for each parameter, so that
both understand the same texts. The fields of the text itself stay as they are: others read them too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from sag_pag import hosts
from sag_pag.settings import FEATURES, PARAMETERS, SettingError, Value, completed
from sag_pag.webui.migration import migrate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """What a text says: values by parameter; what to tell the user of it, and whether something was left out."""

    values: Mapping[str, Value]
    message: str
    incomplete: bool


def read_infotext(fields: Mapping[str, Any]) -> Reading:
    """What the fields of a text say, ours and other extensions'.

    Fields that the WebUI's options say to disregard are not in it.
    """
    migration = migrate(fields)
    values, left_out = _own_values({**fields, **migration.fields})
    disregarded = {name for name, p in PARAMETERS.items() if p.infotext in hosts.current().disregarded_fields()}
    heard = [feature for feature in FEATURES if f"{feature}_enabled" not in disregarded]
    kept = {name: value for name, value in completed(values, features=heard).items() if name not in disregarded}
    message = " ".join((*left_out, migration.message)).strip()
    return Reading(kept, message, bool(left_out or migration.notes))


def _own_values(fields: Mapping[str, Any]) -> tuple[dict[str, Value], list[str]]:
    """The values that a text has in our own fields, and what of them can't be used."""
    values: dict[str, Value] = {}
    left_out = []
    for parameter in PARAMETERS.values():
        if parameter.infotext in fields:
            try:
                values[parameter.name] = parameter.parse(str(fields[parameter.infotext]))
            except SettingError as error:
                left_out.append(f"{parameter.label}: {error.value} is left out; allowed: {error.allowed}")
    return values, left_out


def _value(name: str, fields: Mapping[str, Any]) -> Value | None:
    return read_infotext(fields).values.get(name)


Field = Callable[[Mapping[str, Any]], Value | None]
FIELDS: dict[str, Field] = {name: partial(_value, name) for name in PARAMETERS}
"""For each parameter the function from a text's fields to its value, ``None`` to leave the control as it is.

One object each for txt2img and img2img: the WebUI compares them to send settings from one to the other.
"""


def on_infotext_pasted(_infotext: str, fields: dict[str, Any]) -> None:
    """Says what was read and what could not be taken over: on the page and in the log, for the API has no page."""
    reading = read_infotext(fields)
    if reading.incomplete:
        logger.warning("%s", reading.message)
        gr.Warning(reading.message)
    elif reading.message:
        logger.info("%s", reading.message)
        gr.Info(reading.message)
