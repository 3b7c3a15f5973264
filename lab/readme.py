"""The README's table of parameters."""

from __future__ import annotations

from pathlib import Path

from lab.pages import write_part
from sag_pag.settings import PARAMETERS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- parameters -->", "<!-- end of parameters -->"


def parameter_table() -> str:
    """All parameters as a Markdown table, in positional order."""
    rows = ["| # | API name | Label | Default | Allowed | What it does |", "|---|---|---|---|---|---|"]
    for position, parameter in enumerate(PARAMETERS.values()):
        default = parameter.format(parameter.default)
        rows.append(
            f"| {position} | `{parameter.name}` | {parameter.label} | {default} | {parameter.allowed} "
            f"| {parameter.help} |"
        )
    return "\n".join(rows)


def write_table() -> None:
    """Replaces the table between the two marks in README.md."""
    write_part(README, BEGIN, END, parameter_table())
