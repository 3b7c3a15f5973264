"""Pages of the docs of which a part, between two marks, is written by a program."""

from __future__ import annotations

from pathlib import Path


def around(page: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before and after the part, marks included. Raises ``ValueError`` if there are no marks."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} has no marks {begin} and {end}")
    return before + begin, end + after


def write_part(page: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between the marks. Raises as :func:`around` does."""
    before, after = around(page, begin, end)
    page.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
