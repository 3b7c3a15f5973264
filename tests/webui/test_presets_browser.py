"""Presets and other extensions' infotext in a real browser. Needs Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import PICTURES, answered, element, number, open_fold, open_panel, opened_page, screenshot, ticked
from browser import load as load_page
from client import Client
from server import Server

from sag_pag.webui.presets import BUILT_IN

TAB = "txt2img"
FOREIGN = (
    "a cat\nSteps: 4, Sampler: Euler, CFG scale: 5, Seed: 1, Size: 128x128, PAG Active: True, PAG SANF: True, "
    "PAG Scale: 1.5, PAG Start Step: 0, PAG End Step: 150, sag_enabled: True, sag_scale: 0.6, sag_blur_sigma: 1"
)


def load(page: Any, url: str) -> None:
    """Opens the page anew, with the panel unfolded."""
    load_page(page, url)
    open_panel(page, TAB)


@pytest.fixture
def page(browser: Any, webui: Server) -> Iterator[Any]:
    with opened_page(browser, webui.url) as opened:
        open_panel(opened, TAB)
        yield opened


@pytest.fixture
def file(webui: Server) -> Iterator[Path]:
    """The file of the user's own presets, which is not there at first."""
    path = webui.data_folder / "extensions/sag-pag/presets.json"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


def offered(page: Any, tab: str = TAB) -> list[str]:
    """What the dropdown offers."""
    box = page.locator(f"{element(tab, 'preset')} input")
    box.click()
    page.wait_for_timeout(800)
    names: list[str] = [text.strip() for text in page.locator(f"{element(tab, 'preset')} li").all_inner_texts()]
    page.keyboard.press("Escape")
    box.blur()
    page.wait_for_timeout(300)
    return [name.removeprefix("✓").strip() for name in names]


def choose(page: Any, name: str) -> None:
    page.locator(f"{element(TAB, 'preset')} input").click()
    page.wait_for_timeout(800)
    page.locator(f"{element(TAB, 'preset')} li", has_text=name).first.click()
    answered(page, 1200)


def chosen(page: Any) -> str:
    value: str = page.locator(f"{element(TAB, 'preset')} input").input_value()
    return value


def status(page: Any) -> str:
    text: str = page.locator(element(TAB, "preset_status")).first.inner_text()  # gradio gives the id twice
    return text


def press(page: Any, name: str) -> None:
    page.locator(element(TAB, f"preset_{name}")).click()
    answered(page, 1000)


def write_name(page: Any, name: str) -> None:
    page.locator(f"{element(TAB, 'preset_name')} :is(textarea, input)").fill(name)


def blocks(page: Any) -> str:
    value: str = page.locator(f"{element(TAB, 'pag_blocks')} :is(textarea, input)").input_value()
    return value


def test_choosing_sets_every_control(page: Any, file: Path) -> None:
    assert offered(page) == [preset.name for preset in BUILT_IN]
    assert status(page).strip() == ""
    choose(page, "Structure and detail (both)")
    assert ticked(page, TAB, "pag")
    assert ticked(page, TAB, "sag")
    assert (number(page, TAB, "pag_scale"), number(page, TAB, "sag_scale")) == (2.0, 0.5)
    assert "nearly twice the time" in status(page)
    screenshot(page, "preset-chosen")
    open_fold(page, TAB, "pag")
    page.locator(f"{element(TAB, 'pag_blocks')} :is(textarea, input)").fill("output.3")
    choose(page, "No prompt, or repair")
    assert ticked(page, TAB, "pag")
    assert not ticked(page, TAB, "sag")
    assert (number(page, TAB, "pag_scale"), number(page, TAB, "sag_scale"), blocks(page)) == (5.0, 0.75, "middle")
    assert "set the CFG scale to 1" in status(page)
    page.locator(f"{element(TAB, 'pag_blocks')} :is(textarea, input)").fill("output.3")
    page.locator(f"{element(TAB, 'preset')} input").blur()
    choose(page, "No prompt, or repair")  # once more
    assert blocks(page) == "middle"
    choose(page, "Off")
    assert not ticked(page, TAB, "pag")
    assert number(page, TAB, "pag_scale") == 3.0
    assert not file.exists()


def test_values_that_were_changed_since(page: Any, file: Path) -> None:
    """Said at once, also after a paste; no longer once they are back, saved, or another preset is chosen."""
    changed = page.locator(element(TAB, "preset_changed")).first
    scale = page.locator(f"{element(TAB, 'pag_scale')} input[type=number]")

    def set_scale(value: str) -> None:
        scale.fill(value)
        page.keyboard.press("Tab")
        answered(page, 1200)

    open_panel(page, TAB, "pag")
    set_scale("2")
    assert changed.is_visible(), "Off was chosen"
    choose(page, "SD 1.5")
    assert not changed.is_visible()
    set_scale("2.5")
    assert changed.is_visible()
    screenshot(page, "preset-changed")
    set_scale("3")
    assert not changed.is_visible()
    set_scale("2.5")
    press(page, "save")
    write_name(page, "Mine")
    press(page, "yes")
    assert not changed.is_visible()
    page.locator("#txt2img_prompt textarea").fill("a cat\nSteps: 4, Size: 128x128, PAG: True, PAG scale: 1")
    page.locator("#txt2img_tools #paste").click()
    answered(page, 2500)
    assert number(page, TAB, "pag_scale") == 1
    assert changed.is_visible()
    choose(page, "Mine")
    assert number(page, TAB, "pag_scale") == 2.5
    assert not changed.is_visible()


def test_an_own_preset_through_its_life(page: Any, webui: Server, file: Path) -> None:
    choose(page, "Structure and detail (both)")
    open_fold(page, TAB, "pag")
    page.locator(f"{element(TAB, 'pag_blocks')} :is(textarea, input)").fill("middle, output.3")
    press(page, "rename")
    assert "built in" in status(page)
    press(page, "save")
    write_name(page, "SDXL")
    press(page, "yes")
    assert "built in" in status(page)
    write_name(page, "  ")
    press(page, "yes")
    assert "needs a name" in status(page)
    screenshot(page, "preset-refused")
    assert not file.exists()
    write_name(page, " My <b>own</b> ")
    press(page, "yes")
    assert chosen(page) == "My <b>own</b>"
    assert "Saved as My <b>own</b>" in status(page)
    assert not page.locator(element(TAB, "preset_question")).is_visible()
    saved = json.loads(file.read_text(encoding="utf-8"))["presets"]
    assert [preset["name"] for preset in saved] == ["My <b>own</b>"]
    assert saved[0]["values"]["pag_blocks"] == "middle, output.3"

    load(page, webui.url)
    assert offered(page)[-1] == "My <b>own</b>"
    assert not ticked(page, TAB, "pag")
    choose(page, "My <b>own</b>")
    assert (number(page, TAB, "sag_scale"), blocks(page)) == (0.5, "middle, output.3")
    assert "Your own: " in status(page)
    screenshot(page, "preset-own")

    press(page, "rename")
    write_name(page, "Better")
    page.keyboard.press("Enter")
    answered(page, 1000)
    assert chosen(page) == "Better"
    assert offered(page)[-1] == "Better"
    page.locator("#tabs button", has_text="img2img").first.click()
    page.wait_for_timeout(500)
    page.locator(f"{element('img2img', 'panel')} > .label-wrap").click()
    assert offered(page, "img2img")[-1] == "Better"
    page.locator("#tabs button", has_text="txt2img").first.click()

    press(page, "delete")
    assert "Delete this preset? Better" in status(page)
    press(page, "no")
    assert offered(page)[-1] == "Better"
    press(page, "delete")
    press(page, "yes")
    assert offered(page) == [preset.name for preset in BUILT_IN]
    assert json.loads(file.read_text(encoding="utf-8"))["presets"] == []


def test_a_question_is_about_the_preset_that_it_was_asked_of(page: Any, file: Path) -> None:
    """Another choice takes the question back, and does nothing to either preset."""
    for name, scale in (("First", "5"), ("Second", "6")):
        choose(page, "SD 1.5")
        page.locator(f"{element(TAB, 'pag_scale')} input[type=number]").fill(scale)
        page.keyboard.press("Tab")
        answered(page, 1000)
        press(page, "save")
        write_name(page, name)
        press(page, "yes")
    before = file.read_text(encoding="utf-8")
    choose(page, "First")
    for question in ("delete", "rename", "save"):
        press(page, question)
        assert page.locator(element(TAB, "preset_question")).is_visible()
        choose(page, "Second")
        assert not page.locator(element(TAB, "preset_question")).is_visible()
        choose(page, "First")
    assert file.read_text(encoding="utf-8") == before
    press(page, "delete")
    press(page, "yes")
    assert offered(page)[-1] == "Second"


def test_a_broken_file_is_named(page: Any, webui: Server, file: Path) -> None:
    before = set(file.parent.glob("presets.broken-*"))
    file.write_text("{", encoding="utf-8")
    load(page, webui.url)
    assert offered(page) == [preset.name for preset in BUILT_IN]
    (aside,) = set(file.parent.glob("presets.broken-*")) - before
    assert aside.name in status(page)
    choose(page, "Subtle")
    assert aside.name in status(page)
    screenshot(page, "preset-broken")
    assert not file.exists()


def test_pasting_what_another_extension_wrote(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    page.locator("#txt2img_prompt textarea").fill(FOREIGN)
    page.locator("#txt2img_tools #paste").click()
    page.wait_for_selector(".toast-wrap", timeout=10_000)
    answered(page, 1500)
    said = page.locator(".toast-wrap").inner_text()
    assert "Forge's SAG and sd-webui-incantations were read" in said
    assert "saliency fusion was left out" in said
    screenshot(page, "foreign-pasted")
    assert ticked(page, TAB, "pag")
    assert ticked(page, TAB, "sag")
    assert (number(page, TAB, "pag_scale"), number(page, TAB, "sag_scale")) == (1.5, 0.6)
    assert blocks(page) == "middle.0"
    page.locator("#txt2img_generate").click()
    page.wait_for_selector(PICTURES, timeout=60_000)
    answered(page, 2000)
    assert "PAG blocks: middle.0" in page.locator("#html_info_txt2img").first.inner_text()


def test_the_controls_are_not_in_the_ui_config(webui: Server, page: Any) -> None:
    config = json.loads((webui.data_folder / "ui-config.json").read_text(encoding="utf-8"))
    ours = [key for key in config if "sag_pag_script" in key]
    assert any("PAG" in key for key in ours)
    assert not [key for key in ours if "preset" in key.lower()]
