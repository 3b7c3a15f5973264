"""The localisation files of this extension on the WebUI's page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from browser import answered, element, open_fold, open_panel, opened_page, screenshot
from server import REPOSITORY, Server

TAB = "txt2img"
EXTENSION = {"sag-pag": REPOSITORY}
TEXTS = """(panel) => {
    const found = [], walk = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) found.push(walk.currentNode.textContent.trim());
    for (const element of panel.querySelectorAll("[title]")) {
        if (!element.closest(".sag-pag-cost")) found.push(element.title);
    }
    return found;
}"""
"""Every text and every tooltip of the panel, seen or not; what the head has a copy of is never seen itself."""


@pytest.mark.parametrize("language", ["zh_CN", "zh-Hans (Stable)", "ja_JP"])
def test_the_whole_panel_is_translated(browser: Any, start_server: Callable[..., Server], language: str) -> None:
    server = start_server(language, extensions=EXTENSION, options={"localization": language})
    server.client.load_checkpoint("sdxl")
    words = json.loads((REPOSITORY / "localizations" / f"{language}.json").read_text(encoding="utf-8"))
    english = {key for key, word in words.items() if key != word}
    with opened_page(browser, server.url) as page:
        panel = open_panel(page, TAB, "pag", "sag")
        open_fold(page, TAB, "both")
        page.locator(f"{element(TAB, 'pag_perturbation')} input").nth(1).check()
        page.locator(element(TAB, "preset_save")).click()
        answered(page, 2000)
        screenshot(panel, f"panel-{language}")
        shown = panel.evaluate(TEXTS)
        assert english & set(shown) == set()
        assert len(set(words.values()) & set(shown)) > 70
        page.locator(element(TAB, "preset_no")).click()
        box = page.locator(f"{element(TAB, 'preset')} input")
        assert box.input_value() == words["Off"]
        box.click()
        page.wait_for_timeout(300)
        listed = page.locator(f"{element(TAB, 'preset')} ul li").all_inner_texts()
        assert words["Half the extra time"] in [text.strip(" ✓\n") for text in listed]
        page.locator(f"{element(TAB, 'preset')} ul li", has_text=words["Subtle"]).click()
        answered(page, 1000)
        assert box.input_value() == words["Subtle"]
        assert page.locator(element(TAB, "preset_status")).first.inner_text().startswith(
            words[next(key for key in words if key.startswith("For a picture that is nearly good"))]
        )
    server.stop()
