"""The WebUIs that the tests can run in: which variable names each, and how each is started on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMON = (
    "--api", "--skip-torch-cuda-test", "--skip-prepare-environment", "--skip-version-check",
    "--disable-console-progressbars",
)  # fmt: skip
NO_DOWNLOADS = ("--do-not-download-clip", "--no-download-sd-model")
SERVES_ITSELF = ("--gradio-allowed-path", "{folder}")
"""With gradio 4 a WebUI whose data are elsewhere gives its own scripts to no page."""
A1111 = "a1111"


class NoWebUIError(Exception):
    """No WebUI was named; tests that need one are to be skipped."""


@dataclass(frozen=True)
class Host:
    """One kind of WebUI. ``options`` go into its first ``config.json``, ``arguments`` onto its command line, with the
    WebUI's own folder in place of ``{folder}``.
    """

    variable: str
    arguments: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    loads_at_start: bool = False

    @property
    def named(self) -> str | None:
        """The folder that its variable names."""
        return os.environ.get(self.variable) or None


HOSTS: Mapping[str, Host] = {
    A1111: Host(
        "WEBUI_DIR", ("--no-half", "--use-cpu", "all", *NO_DOWNLOADS), loads_at_start=True,
    ),
    "forge": Host("FORGE_DIR", ("--always-cpu", "--all-in-fp32", *NO_DOWNLOADS, *SERVES_ITSELF)),
    "reforge": Host("REFORGE_DIR", ("--always-cpu", "--all-in-fp32", *NO_DOWNLOADS)),
    # at its default, 0, the first step has no negative prompt
    "classic": Host(
        "CLASSIC_DIR", ("--always-cpu", "--all-in-fp32", "--no-download-sd-model"), {"skip_early_cond": -1.0},
    ),
    # it waits for a key where its config.json does not hold this
    "neo": Host("NEO_DIR", ("--cpu", "--force-fp32", *SERVES_ITSELF), {"VERSION_UID": "PY313"}),
}
"""A fork must be a copy whose own tables and configurations say that models are as small as the tests' checkpoints."""


def named_hosts() -> list[str]:
    """Those that a variable names; the first of all where none does, to be skipped for it."""
    return [name for name, host in HOSTS.items() if host.named] or [A1111]


@dataclass(frozen=True)
class Installation:
    """A WebUI that works, and the interpreter to run it with."""

    name: str
    folder: Path
    python: Path

    @property
    def host(self) -> Host:
        """What kind it is."""
        return HOSTS[self.name]

    @property
    def arguments(self) -> list[str]:
        """What its command line needs."""
        return [argument.format(folder=self.folder) for argument in self.host.arguments]

    @classmethod
    def find(cls, name: str = A1111) -> Installation:
        """Reads the host's variable; for A1111's WebUI ``WEBUI_PYTHON`` too.

        Raises `NoWebUIError` where the variable is not set, and FileNotFoundError where it is set but wrong: who asks
        for these tests must not see them skipped.
        """
        variable, named = HOSTS[name].variable, HOSTS[name].named
        if named is None:
            raise NoWebUIError(f"{variable} is not set: the tests against a real WebUI did not run")
        folder = Path(named).resolve()
        if not (folder / "launch.py").is_file():
            raise FileNotFoundError(f"{variable} has no launch.py: {folder}")
        python = os.environ.get("WEBUI_PYTHON") if name == A1111 else None
        candidates = [Path(python)] if python else [root / "venv/bin/python" for root in (folder, folder.parent)]
        for candidate in candidates:
            if candidate.is_file():
                # not resolved: a virtual environment is known by the path it was called with
                return cls(name, folder, candidate.absolute())
        raise FileNotFoundError(f"no interpreter for the WebUI (set WEBUI_PYTHON): {', '.join(map(str, candidates))}")
