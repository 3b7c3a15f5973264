"""How the panel looks and speaks, in a real browser: folds, keyboard, sizes, messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from browser import answered, element, eventually, load, open_fold, open_panel, opened_page, screenshot, text_field
from client import Client
from server import Server

from sag_pag.webui import texts

TAB = "txt2img"
WAIT = 1200  # milliseconds in which the server has answered
SEEN = """(part) => {
    const part_box = part.getBoundingClientRect(), line = part.closest(".sag-pag-prices").getBoundingClientRect();
    if (part_box.top >= line.bottom - 1) return false;
    const ends = [part_box.left + 2, part_box.right - 2].map((x) => document.elementFromPoint(x, part_box.top + 8));
    if (ends.some((at) => !part.contains(at))) throw new Error(`cut: ${part.textContent}`);
    return true;
}"""
"""Whether a part of the costs is there; an error where it is so only by half."""
WIDTHS = (400, 700, 1000, 1400, 1920)


def set_number(page: Any, name: str, value: str) -> None:
    """Types into a slider's number."""
    page.locator(f"{element(TAB, name)} input[type=number]").fill(value)
    page.keyboard.press("Tab")


def plain(text: str) -> str:
    return " ".join(text.split())


def head(page: Any, name: str = "panel") -> Any:
    return page.locator(f"{element(TAB, name)} > .label-wrap")


def test_simple_first(page: Any, client: Client) -> None:
    """What is on shows what it does, its scale and one fold, whose head says what is not as by default."""
    client.load_checkpoint("sd1")
    panel = open_panel(page)
    page.locator(f"{element(TAB, 'pag_enabled')} > .label-wrap").click()
    answered(page, WAIT)
    assert page.locator(element(TAB, "pag_scale")).is_visible()
    for name in ("pag_blocks", "pag_start", "pag_end", "pag_fade", "pag_perturbation", "pag_every"):
        assert not page.locator(element(TAB, name)).is_visible(), name
    assert panel.bounding_box()["height"] < 500
    assert plain(head(page, "pag_more").inner_text()) == "More ▼"
    open_fold(page, TAB, "pag")
    text_field(page, TAB, "pag_blocks").fill("input.4, middle")
    set_number(page, "pag_start", "0.2")
    page.locator(f"{element(TAB, 'pag_fade')} input").check()
    answered(page, WAIT)
    open_fold(page, TAB, "pag")
    said = plain(head(page, "pag_more").inner_text())
    assert said == "More Blocks to perturb input.4, middle · PAG start 0.2 · Fade to the end ✓ ▼"
    screenshot(panel, "fold-closed")


def test_what_belongs_to_one_perturbation_is_there_for_it_alone(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    open_panel(page, TAB, "pag")
    own = {"attention off (PAG)": None, "blurred attention (SEG)": "pag_query_blur", "swapped places (SSG)": "pag_swap"}
    for label, name in own.items():
        page.locator(f"{element(TAB, 'pag_perturbation')} label", has_text=label).click()
        answered(page, WAIT)
        for other in ("pag_query_blur", "pag_swap"):
            assert page.locator(element(TAB, other)).is_visible() is (other == name), (label, other)


def test_the_fields_own_terms_are_in_tooltips(page: Any, client: Client) -> None:
    """A beginner's words on the page; the word that pictures and programs know where one points."""
    client.load_checkpoint("sd1")
    open_panel(page, TAB, "pag", "sag")
    open_fold(page, TAB, "both")
    words = {"at each place the stronger of both": "snf", "blurred attention (SEG)": "blurred queries"}
    for label, term in words.items():
        assert page.locator(f"{element(TAB, 'panel')} label", has_text=label).first.get_attribute("title") == term
    page.locator(element(TAB, "sag_blur_sigma")).hover()
    assert page.locator(element(TAB, "sag_blur_sigma")).get_attribute("title") == texts.TERMS["sag_blur_sigma"]


def test_everything_by_keyboard(page: Any, client: Client) -> None:
    """The panel, its folds and a feature; what is open is told to a screen reader."""
    client.load_checkpoint("sd1")
    label = head(page)
    assert label.evaluate("e => e.tagName === 'BUTTON' || e.getAttribute('role') === 'button'")
    assert label.get_attribute("aria-expanded") == "false"
    label.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert label.get_attribute("aria-expanded") == "true"
    page.locator(f"{element(TAB, 'pag_enabled')}-visible-checkbox").focus()
    page.keyboard.press(" ")
    assert page.locator(f"{element(TAB, 'pag_enabled')}-visible-checkbox").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert page.locator(element(TAB, "pag_scale")).is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().split(/\\s/)[0]"))
        if reached[-1] == "More":
            break
    assert reached[-1] == "More", reached
    page.keyboard.press(" ")
    page.wait_for_timeout(500)
    assert page.locator(element(TAB, "pag_blocks")).is_visible()
    assert head(page, "pag_more").get_attribute("aria-expanded") == "true"
    label.focus()
    page.keyboard.press(" ")
    page.wait_for_timeout(500)
    assert label.get_attribute("aria-expanded") == "false"


def test_a_range_is_told_beside_its_sliders(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    open_panel(page, TAB, "pag")
    set_number(page, "pag_start", "0.8")
    set_number(page, "pag_end", "0.2")
    answered(page, WAIT)
    message = page.locator(f"{element(TAB, 'pag_range')} .sag-pag-error")
    assert message.inner_text() == "This ends before it starts: move Start down or End up."
    above, below = page.locator(element(TAB, "pag_end")).bounding_box(), message.bounding_box()
    assert 0 <= below["y"] - (above["y"] + above["height"]) < 20
    assert "a setting can't be used" in head(page).inner_text()
    page.locator("#txt2img_generate").click()
    refused = 'Guidance: PAG start: "0.8" can\'t be used; possible: a number up to PAG end, here 0.2.'
    page.wait_for_function("words => document.body.innerText.includes(words)", arg=refused, timeout=30_000)
    assert "RefusedError" not in page.locator("body").inner_text()
    set_number(page, "pag_end", "0.9")
    answered(page, WAIT)
    assert message.count() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("middel", "did you mean middle?"), ("input4", "did you mean input.4?"), ("input 4", "did you mean input.4?"),
        ("4", "did you mean input.4 or output.4?"), ("", "choose a block"),
    ],
)
def test_what_was_meant(page: Any, client: Client, text: str, said: str) -> None:
    client.load_checkpoint("sd1")
    open_panel(page, TAB, "pag")
    text_field(page, TAB, "pag_blocks").fill(text)
    answered(page, WAIT)
    words = page.locator(f"{element(TAB, 'pag_blocks_state')} .sag-pag-error").inner_text()
    assert words.startswith("Blocks to perturb")
    assert said in words


def test_the_map_says_what_it_shows(page: Any, client: Client) -> None:
    """Captions; one size of cells; why a cell can't be chosen; a block that is chosen in part looks like it."""
    client.load_checkpoint("sdxl")
    load(page, page.url)
    open_panel(page, TAB, "pag")
    answered(page, WAIT)
    drawn = page.locator(element(TAB, "pag_blocks_map")).first
    assert drawn.locator(".sag-pag-half").all_inner_texts() == ["input", "output"]
    boxes = [cell.bounding_box() for cell in drawn.locator(".sag-pag-u .sag-pag-cell").all()]
    assert len({(round(box["width"], 1), round(box["height"], 1)) for box in boxes}) == 1
    about = drawn.locator(".sag-pag-about")
    drawn.locator("button[data-name='input.7']").hover()
    assert about.inner_text().startswith("input.7")
    drawn.locator(".sag-pag-empty[data-name='input.0']").hover()
    assert plain(about.inner_text()) == "input.0 has no self-attention, so it can't be chosen"
    drawn.locator("button[data-name='input.7']").click()
    drawn.locator("button[data-name='input.7.1']").click()
    partly = drawn.locator(".sag-pag-u button[data-name='input.7']")
    assert partly.get_attribute("aria-pressed") == "mixed"
    assert "linear-gradient" in partly.evaluate("e => getComputedStyle(e).backgroundImage")
    screenshot(drawn, "map-partly")
    client.load_checkpoint("sd1")


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_fits(browser: Any, webui: Server, client: Client, width: int) -> None:
    """Nothing is cut off or out of line, from a phone to a wide screen."""
    client.load_checkpoint("sd1")
    with opened_page(browser, webui.url) as page:
        page.set_viewport_size({"width": width, "height": 1600})
        panel = open_panel(page, TAB, "pag", "sag")
        open_fold(page, TAB, "both")
        answered(page, 2 * WAIT)
        inside = panel.bounding_box()
        for cell in page.locator(f"{element(TAB, 'pag_blocks_map')} .sag-pag-cell").all():
            box = cell.bounding_box()
            assert box["x"] >= inside["x"]
            assert box["x"] + box["width"] <= inside["x"] + inside["width"]
        assert panel.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        rows = [("pag_start", "pag_end"), ("sag_start", "sag_end"), ("sag_threshold", "sag_blur_sigma"),
                ("hires_sag_scale", "hires_pag_scale")]
        for pair in rows:
            first, second = (page.locator(f"{element(TAB, name)} input[type=range]").bounding_box() for name in pair)
            assert first["x"] == second["x"] if width == 400 else first["y"] == second["y"], pair
        column = ("rescale", "hires_pass", "hires_own_scales")
        lefts = [page.locator(element(TAB, name)).bounding_box()["x"] for name in column]
        assert len(set(lefts)) == 1, lefts
        row, last = (page.locator(element(TAB, name)).bounding_box() for name in ("preset_row", "preset_delete"))
        assert last["x"] + last["width"] <= row["x"] + row["width"] + 1
        for feature in ("pag_enabled", "sag_enabled"):
            box = page.locator(f"{element(TAB, feature)}-visible-checkbox").bounding_box()
            assert abs(box["y"] - head(page, feature).locator("span").first.bounding_box()["y"]) < 8, feature
        title = head(page).locator("span").first.bounding_box()
        said = page.locator(f"{element(TAB, 'panel')} .sag-pag-head").bounding_box()
        if inside["width"] > 600:  # beside the title, at its height
            assert abs((title["y"] + title["height"] / 2) - (said["y"] + said["height"] / 2)) < 3
        set_number(page, "pag_start", "0.3")  # so that a guided step and the picture cost differently
        answered(page, WAIT)
        head(page).scroll_into_view_if_needed()
        found = head(page).locator(".sag-pag-price > *").all()
        parts = [(plain(part.inner_text()), part.evaluate(SEEN)) for part in found]
        assert [re.sub(r"[\d.]+", "1", text) for text, _ in parts] == [
            "≈ 1×", "for this picture", "≈ 1×", "per guided step",
        ]
        seen = "".join("#" if whole else "-" for _, whole in parts)
        assert seen in ("#---", "##--", "####"), seen  # shortened, never wrapped or cut
        assert seen == "####" or inside["width"] < 700
        text_field(page, TAB, "pag_blocks").fill("input.4, input.5, middle, output.3-5")
        page.locator(f"{element(TAB, 'pag_fade')} input").check()
        answered(page, WAIT)
        open_fold(page, TAB, "pag")
        aside = head(page, "pag_more").locator(".sag-pag-aside")
        assert eventually(page, lambda: plain(aside.inner_text()).endswith("Fade to the end ✓"))
        assert aside.evaluate("e => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight + 1")
        screenshot(panel, f"panel-{width}")


def test_a_plot_decides(page: Any, client: Client) -> None:
    """While an X/Y/Z plot has one of our axes the head says so; no longer when it is another axis or script."""
    client.load_checkpoint("sd1")
    badge = page.locator(f"{element(TAB, 'panel')} .sag-pag-plot")

    def pick(box: str, text: str) -> None:
        page.locator(f"{box} input").first.click()
        page.locator(f"{box} ul li", has_text=text).first.click()
        page.wait_for_timeout(500)

    assert not badge.is_visible()
    pick("#script_list", "X/Y/Z plot")
    pick("#script_txt2img_xyz_plot_x_type", "[PAG] Scale")
    assert badge.is_visible()
    assert badge.inner_text() == "the X/Y/Z plot decides"
    assert not head(page).locator(".sag-pag-off").is_visible()
    pick("#script_txt2img_xyz_plot_x_type", "Steps")
    assert eventually(page, lambda: not badge.is_visible())
    pick("#script_txt2img_xyz_plot_y_type", "[SAG] Scale")
    assert badge.is_visible()
    pick("#script_list", "None")
    assert eventually(page, lambda: not badge.is_visible())


def test_folding_is_told_as_such(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    open_panel(page)
    page.locator(f"{element(TAB, 'preset')} input").click()
    page.wait_for_timeout(500)
    page.locator(f"{element(TAB, 'preset')} li", has_text="SD 1.5").first.click()
    answered(page, WAIT)
    changed = page.locator(element(TAB, "preset_changed")).first
    assert not changed.is_visible()
    page.locator(f"{element(TAB, 'pag_enabled')} > .label-wrap").click()
    answered(page, WAIT)
    assert changed.inner_text() == "Switched off since: folding a part switches it off, unfolding it on."


def test_the_list_of_presets(page: Any) -> None:
    """Begins with what applies, and takes no text that is no preset."""
    open_panel(page)
    box = page.locator(f"{element(TAB, 'preset')} input")
    assert box.input_value() == "Off"
    box.focus()
    page.keyboard.type("nonsense")
    page.keyboard.press("Tab")
    assert box.input_value() == "Off"
    page.locator(element(TAB, "preset_save")).click()
    answered(page, WAIT)
    status = page.locator(element(TAB, "preset_status")).first.inner_text()
    assert status.startswith("Type a name, then ✔")


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm: axe-core did not look at the panel in a browser")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run([npm, "install", "--silent", "--prefix", folder, "axe-core@4.10.3"], check=True)
    return (Path(folder) / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("opened", [False, True])
def test_accessibility(
    browser: Any, webui: Server, client: Client, axe: str, theme: str, opened: bool
) -> None:
    client.load_checkpoint("sdxl")
    with opened_page(browser, f"{webui.url}/?__theme={theme}") as page:
        panel = page.locator(element(TAB, "panel"))
        if opened:
            open_panel(page, TAB, "pag", "sag")
            open_fold(page, TAB, "both")
            page.locator(f"{element(TAB, 'pag_blocks_map')} button[data-name='input.7']").click()
            text_field(page, TAB, "sag_block").fill("nowhere")
            answered(page, WAIT)
        screenshot(panel, f"panel-{theme}-{'open' if opened else 'closed'}")
        page.evaluate(axe)
        found = page.evaluate("id => axe.run(id)", element(TAB, "panel"))
    serious = [
        (problem["id"], node["html"][:200], node["failureSummary"][:300])
        for problem in found["violations"] if problem["impact"] in ("serious", "critical")
        for node in problem["nodes"]
    ]
    assert serious == [], json.dumps(serious, indent=1)
