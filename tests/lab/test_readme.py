"""README and reference pages: what they show is what there is, and a person can find and read it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lab import cli
from lab.readme import PAGE, parameter_table
from sag_pag.settings import PARAMETERS, RESCALE_MODES, Settings
from sag_pag.webui import texts
from sag_pag.webui.presets import BUILT_IN

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
PAGES = (README, *sorted((REPOSITORY / "docs").glob("*.md")))
LONGEST = 4 * 110
"""Characters of a paragraph as it is read: four lines."""
LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*)\]\(([^)]*)\)")
NOT_PROSE = re.compile(r"```.*?```|<!--.*?-->|<img[^>]*>", re.DOTALL)


def written(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", written(page), re.MULTILINE)}


def paragraphs(page: Path) -> list[str]:
    """The page's paragraphs and points of lists as a reader sees them: links are their texts."""
    found = []
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", NOT_PROSE.sub("", written(page))):
        if part.strip() and not part.lstrip().startswith(("|", "#")):
            found.append(" ".join(LINK.sub(r"\1", part).split()))
    return found


def payloads(page: Path) -> list[dict[str, object]]:
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", written(page), re.DOTALL)]


def test_the_table_is_up_to_date() -> None:
    """``python -m lab readme`` writes it anew."""
    assert parameter_table() in written(PAGE)


def test_the_table_has_the_values_of_choices_and_what_the_panel_calls_them() -> None:
    for mode in RESCALE_MODES:
        assert f"`{mode}`: {texts.CHOICES[mode]}" in parameter_table()
    assert len(parameter_table().splitlines()) == len(PARAMETERS) + 2


@pytest.mark.parametrize("page", [README, REPOSITORY / "docs" / "api.md"], ids=lambda page: page.name)
def test_the_payloads_are_accepted(page: Path) -> None:
    assert payloads(page)
    for payload in payloads(page):
        for name, script in payload["alwayson_scripts"].items():  # type: ignore[attr-defined]
            assert name == texts.PANEL.lower()
            assert Settings.from_list(script["args"]).enabled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = NOT_PROSE.sub(lambda part: part[0] if part[0].startswith("<img") else "", written(page))
    pictures = re.findall(r'src="([^"]*)"', text) + re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    for target in [*(target for _, target in LINK.findall(text)), *pictures]:
        if target.startswith("https://"):
            continue
        path, _, part = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), target
        assert not part or part in anchors(other), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, ahead = set(), {README}
    while ahead:
        page = ahead.pop()
        seen.add(page)
        linked = {(page.parent / target.partition("#")[0]).resolve() for _, target in LINK.findall(written(page))}
        ahead |= {other for other in linked if other.suffix == ".md" and other.exists()} - seen
    assert set(PAGES) <= seen


def test_the_contents_name_every_section() -> None:
    contents = next(text for text in written(README).split("\n\n") if text.startswith("**Contents:**"))
    headings = re.findall(r"^## (.*)$", written(README), re.MULTILINE)
    assert [" ".join(name.split()) for name, _ in LINK.findall(contents)] == [h for h in headings if h != "Licence"]


def test_no_paragraph_is_long() -> None:
    assert [text for text in paragraphs(README) if len(text) > LONGEST] == []


def test_presets_that_are_named_exist() -> None:
    named = re.search(r"choose a preset, such as (.*?):", " ".join(written(README).split()))
    assert named
    for name in re.findall(r"\*(.*?)\*", named[1]):
        assert any(preset.name.startswith(name) for preset in BUILT_IN), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_lab_exist(page: Path) -> None:
    assert set(re.findall(r"-m lab ([a-z][\w-]*)", " ".join(written(page).split()))) <= set(cli.COMMANDS)
