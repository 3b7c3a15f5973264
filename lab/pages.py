"""Pages of which a part, between two marks, is written by a program."""

from __future__ import annotations

from pathlib import Path


def write_part(page: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between the marks. Raises ``ValueError`` if there are none."""
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} has no marks {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
