"""A test extension: FreeU knows blocks by their widths, which are a tenth in the tests' checkpoints."""

from __future__ import annotations

import sys
from typing import Any

from modules import script_callbacks

WIDTHS, TINY = (1280, 640, 320), (128, 64, 32)


def _make_smaller(_demo: Any, _app: Any) -> None:
    function = sys.modules["lib_free_u.unet"].free_u_cat_hijack
    code = function.__code__
    constants = tuple(TINY if constant == WIDTHS else constant for constant in code.co_consts)
    if constants == code.co_consts:
        raise RuntimeError(f"FreeU has no {WIDTHS}")
    function.__code__ = code.replace(co_consts=constants)


script_callbacks.on_app_started(_make_smaller)
