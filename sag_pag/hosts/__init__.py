"""What each host says of its model, sampler, rows and options. One file a host."""

from __future__ import annotations

from functools import cache

from sag_pag.hosts.interface import Host


@cache
def current() -> Host:
    """The WebUI that this runs in."""
    from sag_pag.hosts.a1111 import A1111  # a host's file imports the host

    return A1111()
