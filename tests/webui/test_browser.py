"""The panel in a real browser: ticking, generating, reading parameters back, sending on. Needs Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Client
from server import Server
from test_generation import guided

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the panel was not tried in a browser")

SCRIPT = "selfattention__perturbedattention_guidance"


@pytest.fixture(scope="module")
def page(webui: Server) -> Iterator[Any]:
    """The WebUI's page; screenshots go to the folder that SCREENSHOTS names."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1600})
        tab.goto(webui.url, wait_until="domcontentloaded")
        tab.wait_for_selector("#txt2img_generate", timeout=120_000)
        tab.wait_for_timeout(3000)
        yield tab
        browser.close()


def screenshot(page: Any, name: str) -> None:
    """Saves what is seen, for a person to look at."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def element(tab: str, name: str) -> str:
    """The id of a control."""
    return f"#script_{tab}_{SCRIPT}_{name}"


def number(page: Any, tab: str, name: str) -> float:
    """The value of a slider."""
    return float(page.locator(f"{element(tab, name)} input[type=number]").input_value())


def ticked(page: Any, tab: str, feature: str) -> bool:
    """Whether a feature's checkbox is on."""
    return bool(page.locator(f"{element(tab, feature + '_enabled')}-visible-checkbox").is_checked())


def test_paste_and_send(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    text = client.txt2img(**guided(pag_scale=2.35, pag_blocks="middle, output.3", pag_fade=True, rescale=0.4)).infotext
    page.locator(f"{element('txt2img', 'panel')} > .label-wrap").click()
    screenshot(page, "panel-off")
    page.locator("#txt2img_prompt textarea").fill(text)
    page.locator("#txt2img_tools #paste").click()
    page.wait_for_timeout(3000)
    screenshot(page, "panel-pasted")
    assert ticked(page, "txt2img", "pag")
    assert not ticked(page, "txt2img", "sag")
    assert number(page, "txt2img", "pag_scale") == 2.35
    assert number(page, "txt2img", "rescale") == 0.4
    assert page.locator(f"{element('txt2img', 'pag_blocks')} :is(textarea, input)").input_value() == "middle, output.3"
    assert page.locator(f"{element('txt2img', 'pag_fade')} input").is_checked()
    page.locator("#txt2img_generate").click()
    page.wait_for_selector("#txt2img_gallery img", timeout=60_000)
    page.wait_for_timeout(2000)
    assert "PAG scale: 2.35" in page.locator("#html_info_txt2img").first.inner_text()
    screenshot(page, "panel-generated")
    page.locator("#txt2img_send_to_img2img").click()
    page.wait_for_timeout(3000)
    assert ticked(page, "img2img", "pag")
    assert number(page, "img2img", "pag_scale") == 2.35
    page.locator("#tabs button", has_text="txt2img").first.click()
    page.locator("#txt2img_prompt textarea").fill(client.txt2img().infotext)
    page.locator("#txt2img_tools #paste").click()
    page.wait_for_timeout(3000)
    assert not ticked(page, "txt2img", "pag")
