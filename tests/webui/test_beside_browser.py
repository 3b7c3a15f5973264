"""What the panel's head says while others are on. Needs Chromium; for A1111's ControlNet ``NEIGHBOURS_DIR``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import answered, element, open_panel, opened_page, screenshot
from installations import A1111
from server import REPOSITORY, Server

TAB = "txt2img"
SCRIPTS = f"#{TAB}_script_container"
EXTENSION = {"sag-pag": REPOSITORY}

OTHERS = '''
import gradio as gr
from modules import scripts
from modules.ui_components import InputAccordion


class Inside(scripts.Script):
    """Switched on by a box among others, in a unit of its own, as ControlNet's."""

    def title(self):
        return "Box inside"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with gr.Accordion("Box inside", open=True):
            with gr.Accordion("Unit", open=True):
                box = gr.Checkbox(label="Enable", value=False, elem_id=f"inside_{is_img2img}")
            other = gr.Checkbox(label="Tidy up", value=True)
        return [box, other]


class Head(scripts.Script):
    """Switched on by its head, as Tiled Diffusion's; what is ticked inside is none of it."""

    def title(self):
        return "Box in the head"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        with InputAccordion(False, label="Box in the head", elem_id=f"head_{is_img2img}") as box:
            tab = gr.Checkbox(label="Enable this tab", value=True)
        return [box, tab]
'''


def said(page: Any, tab: str = TAB) -> str | None:
    """What the head says of others, if it does."""
    answered(page, 1200)
    words = page.locator(f"{element(tab, 'panel')} > .label-wrap .sag-pag-beside")
    return " ".join(words.inner_text().split()) if words.is_visible() else None


def test_others_that_are_on_are_named(browser: Any, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """While guidance has a price: by the box in their head or one inside; also in img2img, by its own boxes."""
    (tmp_path / "others" / "scripts").mkdir(parents=True)
    (tmp_path / "others" / "scripts" / "others.py").write_text(OTHERS, encoding="utf-8")
    server = start_server("others", extensions=EXTENSION | {"others": tmp_path / "others"})
    server.client.load_checkpoint("sd1")
    with opened_page(browser, server.url) as page:
        inside, head = page.locator("#inside_False input"), page.locator("#head_False-visible-checkbox")
        inside.check()
        assert said(page) is None  # nothing is on, so there is no number that could be wrong
        panel = open_panel(page, TAB, "pag")
        assert said(page) == "not counting Box inside"
        head.check()
        assert said(page) == "not counting Box inside, Box in the head"
        screenshot(panel, "beside-others")
        page.set_viewport_size({"width": 400, "height": 1600})
        assert said(page) == "not counting Box inside, Box in the head"
        screenshot(panel, "beside-others-400")
        page.set_viewport_size({"width": 1400, "height": 1600})
        inside.uncheck()
        assert said(page) == "not counting Box in the head"
        head.uncheck()
        assert said(page) is None
        inside.check()
        page.locator("#tabs button", has_text="img2img").first.click()
        open_panel(page, "img2img", "pag")
        assert said(page, "img2img") is None
        page.locator("#inside_True input").check()
        assert said(page, "img2img") == "not counting Box inside"
    server.stop()


def test_controlnet_itself(browser: Any, start_server: Callable[..., Server], host: str) -> None:
    """Its version is part of its name, how many units are on is not. Forks bring it along."""
    extensions, title = dict(EXTENSION), "ControlNet Integrated"
    if host == A1111:
        folder = os.environ.get("NEIGHBOURS_DIR")
        if not folder:
            pytest.skip("NEIGHBOURS_DIR does not name a folder of checkouts: ControlNet was not tried in a browser")
        extensions["sd-webui-controlnet"], title = Path(folder) / "sd-webui-controlnet", "ControlNet v1."
    server = start_server("controlnet", extensions=extensions)
    server.client.load_checkpoint("sd1")
    with opened_page(browser, server.url) as page:
        panel = open_panel(page, TAB, "pag")
        assert said(page) is None
        page.locator(f"{SCRIPTS} .label-wrap", has_text=title).first.click()
        unit = page.locator(f"{SCRIPTS} .cnet-unit-enabled-accordion > .label-wrap")
        if unit.count():
            unit.first.click()
        box = page.locator("#txt2img_controlnet_ControlNet-0_controlnet_enable_checkbox input")
        box.check()
        words = said(page)
        assert words is not None
        assert words.startswith(f"not counting {title}")
        assert "unit" not in words.lower()
        screenshot(panel, "beside-controlnet")
        box.uncheck()
        assert said(page) is None
    server.stop()
