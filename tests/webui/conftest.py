"""Fixtures for the tests against real WebUIs, which ``WEBUI_DIR``, ``FORGE_DIR``, ``REFORGE_DIR``, ``NEO_DIR`` and
``CLASSIC_DIR`` name.

Each test runs in each that is named; without any they are skipped, and say so. The forks need ``WEBUI_DIR`` too, with
which the tiny checkpoints are made. ``only_on`` says where a test runs that is of some of them only.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import opened_page
from client import Client
from installations import Installation, NoWebUIError, named_hosts
from server import REPOSITORY, Server, ensure_checkpoints, running_server

EXTENSIONS = {"sag-pag": REPOSITORY, "probe": REPOSITORY / "tests" / "webui" / "probe"}

ServerFactory = Callable[..., Server]


@pytest.fixture(scope="session", params=named_hosts())
def installation(request: pytest.FixtureRequest) -> Installation:
    """The WebUI to test against."""
    try:
        return Installation.find(request.param)
    except NoWebUIError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def host(installation: Installation) -> str:
    """Which WebUI it is."""
    return installation.name


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder with the tiny checkpoints."""
    try:
        return ensure_checkpoints(Installation.find())
    except NoWebUIError as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def _only_where_it_belongs(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("only_on")
    if marker is not None and "installation" in request.fixturenames:
        name = request.getfixturevalue("installation").name
        if name not in marker.args:
            pytest.skip(f"only on {', '.join(marker.args)}")


@pytest.fixture(scope="session")
def start_server(
    installation: Installation, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerFactory]:
    """Start further servers, with `running_server`'s own keywords; all are stopped at the end of the session."""
    with contextlib.ExitStack() as stack:

        def start(name: str, **keywords: Any) -> Server:
            keywords.setdefault("data_folder", tmp_path_factory.mktemp(name))
            return stack.enter_context(running_server(installation, checkpoints=checkpoints, **keywords))

        yield start


@pytest.fixture(scope="session")
def webui(start_server: ServerFactory) -> Server:
    """A WebUI with this extension installed."""
    return start_server("webui", extensions=EXTENSIONS)


@pytest.fixture(scope="session")
def plain_webui(start_server: ServerFactory) -> Server:
    """A WebUI without any extension but its own: what pictures must be equal to."""
    return start_server("plain-webui", extensions={})


@pytest.fixture
def client(webui: Server) -> Client:
    """The API of the WebUI with this extension."""
    return webui.client


@pytest.fixture
def plain_client(plain_webui: Server) -> Client:
    """The API of the WebUI without it."""
    return plain_webui.client


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: not tried in a browser")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: not tried in a browser")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, webui: Server) -> Iterator[Any]:
    """The WebUI's page."""
    with opened_page(browser, webui.url) as opened:
        yield opened


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Say with every failure where the logs of the servers are."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for name, value in item.funcargs.items():
            if isinstance(value, Server):
                report.sections.append((f"log of {name}", f"{value.log_file}\n...\n{value.log()[-2000:]}"))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Make the skip visible without ``-rs``: these tests are the only ones that see the real host."""
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())
               if isinstance(report.longrepr, tuple)}  # fmt: skip
    for reason in sorted(reason for reason in reasons if "WEBUI_DIR" in reason or "browser" in reason):
        terminalreporter.write_line(reason, yellow=True, bold=True)
