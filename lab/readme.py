"""The reference page's table of parameters."""

from __future__ import annotations

from pathlib import Path

from lab.pages import write_part
from sag_pag.settings import PARAMETERS, Parameter
from sag_pag.webui import texts

PAGE = Path(__file__).parents[1] / "docs" / "parameters.md"
BEGIN, END = "<!-- parameters -->", "<!-- end of parameters -->"


def parameter_table() -> str:
    """All parameters as a Markdown table, in positional order."""
    rows = ["| # | API name | Label | Default | Allowed | What it does |", "|---|---|---|---|---|---|"]
    for position, parameter in enumerate(PARAMETERS.values()):
        default = parameter.format(parameter.default)
        rows.append(
            f"| {position} | `{parameter.name}` | {parameter.label} | {default} | {_allowed(parameter)} "
            f"| {parameter.help} |"
        )
    return "\n".join(rows)


def _allowed(parameter: Parameter) -> str:
    """The allowed values; of a choice the API's values, each with what the panel calls it."""
    if parameter.kind != "choice":
        return parameter.allowed
    labels = {choice: texts.CHOICES.get(choice, choice) for choice in parameter.choices}
    return "<br>".join(f"`{c}`" + (f": {label}" if label != c else "") for c, label in labels.items())


def write_table() -> None:
    """Replaces the table between the two marks in docs/parameters.md."""
    write_part(PAGE, BEGIN, END, parameter_table())
