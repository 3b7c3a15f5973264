"""The progress bar."""

from __future__ import annotations

import io

from sag_pag.demo.progress import Progress


def test_progress_in_a_log_and_on_a_terminal() -> None:
    log = io.StringIO()
    with Progress("work", 200, stream=log) as bar:
        for done in range(1, 201):
            bar.update(done)
    assert len(log.getvalue().splitlines()) == 2
    assert "200/200" in log.getvalue()

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Progress("work", 5, stream=screen) as bar:
        bar.update(5, "done")
    assert screen.getvalue().startswith("\r")
    assert screen.getvalue().endswith("done\n")
