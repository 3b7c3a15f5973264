"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write instead; what is there at the end is moved to ``path`` in one go."""
    partial = path.with_suffix(".partial")
    yield partial
    partial.replace(path)
