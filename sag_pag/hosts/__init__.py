"""What each host says of its model, sampler, rows and options. One file a host."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from sag_pag.hosts.interface import Host


@cache
def current() -> Host:
    """The WebUI that this runs in."""
    if find_spec("modules_forge") is None:
        from sag_pag.hosts.a1111 import A1111  # a host's file imports the host

        return A1111()
    from sag_pag.hosts.forge import BACKEND, LDM_PATCHED, Forge

    return Forge(BACKEND if find_spec("ldm_patched") is None else LDM_PATCHED)
