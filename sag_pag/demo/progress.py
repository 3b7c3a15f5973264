"""A progress bar on stderr: on a terminal one line that is rewritten, otherwise a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """``with Progress("training", total) as bar: bar.update(done, "loss 0.1")``."""

    def __init__(self, label: str, total: int, *, start: int = 0, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.start = start
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.began = time.monotonic()
        self.shown = -float("inf")

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` of the total are done, at most every tenth of a second (every minute in a log)."""
        now = time.monotonic()
        if done < self.total and now - self.shown < (0.1 if self.live else 60):
            return
        self.shown = now
        elapsed = now - self.began
        left = elapsed / max(done - self.start, 1) * (self.total - done)
        share = done / max(self.total, 1)
        bar = "#" * round(24 * share)
        line = f"{self.label} [{bar:<24}] {done}/{self.total} {_clock(elapsed)}, {_clock(left)} left  {note}"
        if self.live:
            line = f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}"
        self.stream.write(line if self.live else f"{line}\n")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.stream.write("\n")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
