"""The compatibility table of ``docs/neighbours.md``, from ``docs/neighbours.csv``: ``python neighbours_table.py``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
FILE, PAGE = DOCS / "neighbours.csv", DOCS / "neighbours.md"
FIELDS = ("neighbour", "commit", "off", "pag", "pag_null", "pag_tiny", "sag", "sag_null", "sag_tiny")
HEADS = (
    "Beside", "commit", "rows a step", "with PAG", "PAG null", "PAG tiny", "with SAG", "SAG null", "SAG tiny",
)
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    lines += ["| " + " | ".join(row[name] for name in FIELDS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_table(made: Sequence[dict[str, str]]) -> None:
    """Puts new rows into the CSV in place of older ones of the same neighbours, and the table into the page."""
    rows: dict[str, dict[str, str]] = {}
    if FILE.exists():
        with FILE.open(encoding="utf-8", newline="") as file:
            rows = {row["neighbour"]: row for row in csv.DictReader(file)}
    rows |= {row["neighbour"]: dict(row) for row in made}
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + table(list(rows.values())) + END + after, encoding="utf-8")


if __name__ == "__main__":
    write_table([])
