"""The panel in a real browser: ticking, generating, reading parameters back, sending on. Needs Chromium."""

from __future__ import annotations

from typing import Any

from browser import PICTURES, answered, element, number, screenshot, ticked
from client import Client
from test_generation import guided


def test_paste_and_send(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    text = client.txt2img(**guided(pag_scale=2.35, pag_blocks="middle, output.3", pag_fade=True, rescale=0.4)).infotext
    page.locator(f"{element('txt2img', 'panel')} > .label-wrap").click()
    screenshot(page, "panel-off")
    page.locator("#txt2img_prompt textarea").fill(text)
    page.locator("#txt2img_tools #paste").click()
    answered(page, 3000)
    screenshot(page, "panel-pasted")
    assert ticked(page, "txt2img", "pag")
    assert not ticked(page, "txt2img", "sag")
    assert number(page, "txt2img", "pag_scale") == 2.35
    assert number(page, "txt2img", "rescale") == 0.4
    assert page.locator(f"{element('txt2img', 'pag_blocks')} :is(textarea, input)").input_value() == "middle, output.3"
    assert page.locator(f"{element('txt2img', 'pag_fade')} input").is_checked()
    page.locator("#txt2img_generate").click()
    page.wait_for_selector(PICTURES, timeout=60_000)
    answered(page, 2000)
    assert "PAG scale: 2.35" in page.locator("#html_info_txt2img").first.inner_text()
    screenshot(page, "panel-generated")
    page.locator("#txt2img_send_to_img2img").click()
    answered(page, 3000)
    assert ticked(page, "img2img", "pag")
    assert number(page, "img2img", "pag_scale") == 2.35
    page.locator("#tabs button", has_text="txt2img").first.click()
    page.locator("#txt2img_prompt textarea").fill(client.txt2img().infotext)
    page.locator("#txt2img_tools #paste").click()
    answered(page, 3000)
    assert not ticked(page, "txt2img", "pag")
