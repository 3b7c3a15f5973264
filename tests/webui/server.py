"""Start and stop a real WebUI on the CPU, each with a data folder of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import Client
from installations import COMMON, HOSTS, Installation

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL = 4000

OPTIONS: dict[str, Any] = {"show_progress_type": "Approx cheap"}
"""The default live preview would download a model."""

# One thread: models this small gain little from more, and threads that wait for each other actively make a server ten
# times slower as soon as something else uses the processor.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "PYTHONUNBUFFERED": "1",
}
_FOREIGN_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COMMANDLINE_ARGS")
_NOT_SHIPPED = shutil.ignore_patterns(".*", "tests", "__pycache__", "venv", "node_modules", "build", "dist")


class StartFailedError(RuntimeError):
    """The WebUI did not come up; the message holds the end of its log and where the whole is."""


def environment(installation: Installation) -> dict[str, str]:
    """Our environment without what would lead the WebUI's interpreter to our packages."""
    inherited = {key: value for key, value in os.environ.items() if key not in _FOREIGN_ENVIRONMENT}
    return inherited | ENVIRONMENT | {"WEBUI_DIR": str(installation.folder)}


def ensure_checkpoints(installation: Installation) -> Path:
    """The folder of the tiny checkpoints, made where it is missing or was made by another version of the script.

    ``SAG_PAG_CHECKPOINTS`` names another folder than the one in the system's temporary folder.
    """
    digest = hashlib.sha256()
    for source in ("layouts.py", "checkpoints.py"):
        digest.update((HERE / source).read_bytes())
    default = Path(tempfile.gettempdir()) / f"sag-pag-checkpoints-{digest.hexdigest()[:12]}"
    folder = Path(os.environ.get("SAG_PAG_CHECKPOINTS") or default).resolve()
    # the yaml files hold absolute paths, so a moved folder is a stale one
    expected = f"{digest.hexdigest()} {folder}"
    stamp = folder / "stamp"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == expected:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("making checkpoints in %s", folder)
    made = subprocess.run(
        [installation.python, HERE / "checkpoints.py", folder],
        cwd=installation.folder, env=environment(installation), text=True, capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise RuntimeError(f"making the checkpoints failed:\n{(made.stdout + made.stderr)[-LOG_TAIL:]}")
    stamp.write_text(expected, encoding="utf-8")
    return folder


def free_port() -> int:
    """A port that nobody listens on; the system gives those from 32768 on to others before a server has started."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running WebUI."""

    url: str
    client: Client
    data_folder: Path
    log_file: Path
    process: subprocess.Popen[bytes]
    host: str

    def log(self, since: int = 0) -> str:
        """What the server has printed, from character ``since`` on; see `log_mark`."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")[since:]

    def log_mark(self) -> int:
        """Where the log ends now: ``log(mark)`` later gives what came after."""
        return len(self.log())

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def _is_ready(self) -> bool:
        # The log is asked first: a request between the launch and the end of the WebUI's own setup makes that setup
        # fail ("Cannot add middleware after an application has started"). And the WebUI does not survive a second
        # checkpoint being loaded beside the first.
        log = self.log()
        if "Startup time:" not in log or (HOSTS[self.host].loads_at_start and "Model loaded in" not in log):
            return False
        try:
            return self.client.request("/sdapi/v1/memory", timeout=5).status in (200, 401)  # with --api-auth
        except OSError:
            return False

    def wait_until_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Return when requests are answered; `StartFailedError` if that never happens."""
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            if not self.alive() or time.monotonic() > deadline:
                reason = "took too long" if self.alive() else f"ended with {self.process.returncode}"
                raise StartFailedError(f"the WebUI {reason}; its log is {self.log_file}:\n{self.log()[-LOG_TAIL:]}")
            time.sleep(0.3)

    def stop(self) -> None:
        """End the process; its data folder and log stay."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _install(extensions: Mapping[str, Path], folder: Path) -> None:
    # a copy, as a user has it: a link would lead out of the folders the WebUI may serve files from
    for name, source in extensions.items():
        shutil.copytree(source, folder / name, ignore=_NOT_SHIPPED)


@contextlib.contextmanager
def running_server(
    installation: Installation,
    *,
    checkpoints: Path,
    data_folder: Path,
    extensions: Mapping[str, Path],
    options: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Run a WebUI for the length of a ``with`` block.

    ``extensions`` maps folder names in ``extensions/`` to what is copied there; ``options`` go into the first
    ``config.json``, ``arguments`` onto the command line. ``data_folder`` may exist already: config and outputs stay.
    """
    (data_folder / "extensions").mkdir(parents=True, exist_ok=True)
    (data_folder / "tmp").mkdir(exist_ok=True)  # where Neo shows pictures from that are not saved; it makes none itself
    config = data_folder / "config.json"
    if not config.exists():
        own = {"sd_model_checkpoint": "sd1.safetensors", **installation.host.options}
        config.write_text(json.dumps(OPTIONS | own | dict(options or {})), encoding="utf-8")
    _install(extensions, data_folder / "extensions")
    log_file = data_folder / "server.log"
    port = free_port()
    command: list[str | Path] = [
        installation.python, "launch.py", *COMMON, *installation.arguments, "--port", str(port),
        "--data-dir", data_folder, "--ckpt-dir", checkpoints, "--ckpt", checkpoints / "sd1.safetensors", *arguments,
    ]  # fmt: skip
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=installation.folder, env=environment(installation),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    client = Client(url, lazy=not installation.host.loads_at_start)
    server = Server(
        url=url, client=client, data_folder=data_folder, log_file=log_file, process=process, host=installation.name,
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
