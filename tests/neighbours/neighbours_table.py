"""The compatibility table of ``docs/neighbours.md``, from ``docs/neighbours.csv``: ``python neighbours_table.py``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
FILE, PAGE = DOCS / "neighbours.csv", DOCS / "neighbours.md"
COLUMNS = {
    "neighbour": "Beside", "commit": "commit", "off": "rows a step", "pag": "with PAG", "pag_cost": "PAG cost",
    "pag_null": "PAG null", "pag_tiny": "PAG tiny", "sag": "with SAG", "sag_cost": "SAG cost", "sag_null": "SAG null",
    "sag_tiny": "SAG tiny", "together": "together",
}
"""The fields of the CSV and the table's heads."""
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row.get(name) or "" for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_table(made: Sequence[dict[str, str]], order: Sequence[str] = ()) -> None:
    """Puts what is new in rows into the CSV, and the table into the page. Neighbours in ``order`` come first, in it."""
    rows: dict[str, dict[str, str]] = {}
    if FILE.exists():
        with FILE.open(encoding="utf-8", newline="") as file:
            rows = {row["neighbour"]: row for row in csv.DictReader(file)}
    rows |= {row["neighbour"]: rows.get(row["neighbour"], {}) | row for row in made}
    rows = {name: rows[name] for name in dict.fromkeys((*order, *rows)) if name in rows}
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + table(list(rows.values())) + END + after, encoding="utf-8")


if __name__ == "__main__":
    write_table([])
