"""The README's table of parameters: ``python -m sag_pag.readme`` writes it anew."""

from __future__ import annotations

from pathlib import Path

from sag_pag.pages import write_part
from sag_pag.settings import PARAMETERS

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


def main() -> None:
    """Replaces the table between the two marks in README.md."""
    write_part(Path(__file__).parents[1] / "README.md", BEGIN, END, parameter_table())


if __name__ == "__main__":
    main()
