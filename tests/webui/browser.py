"""The panel's elements on the WebUI's page, and screenshots for a person to look at."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = "selfattention__perturbedattention_guidance"
READY = "#txt2img_generate"
PICTURES = "#txt2img_gallery img:not(.livePreview *)"
"""The gallery's, without the one that is in the making."""


QUESTIONS = re.compile("/run/predict|/queue/(join|data)")
"""What gradio 3 and 4 ask the server with."""


@contextmanager
def opened_page(browser: Any, url: str, **context: Any) -> Iterator[Any]:
    """The WebUI's page in a context of its own, loaded and set up."""
    window = browser.new_context(viewport={"width": 1400, "height": 1600}, **context)
    page = window.new_page()
    page.set_default_timeout(60_000)  # on a busy machine the host's page alone takes many seconds
    _count_questions(page)
    load(page, url)
    yield page
    window.close()


def _count_questions(page: Any) -> None:
    """Keeps with the page what it has asked the server and has no answer to yet."""
    # functions of Python's own: playwright asks how many arguments they take
    page.open_questions = waiting = set()
    page.on("request", lambda request: waiting.add(request) if QUESTIONS.search(request.url) else None)
    for kind in ("requestfinished", "requestfailed"):
        page.on(kind, lambda request: waiting.discard(request))


def answered(page: Any, wait: int = 1200) -> None:
    """Waits so many milliseconds, and then until the server has answered all: a busy machine answers late."""
    page.wait_for_timeout(wait)
    quiet = 0
    for _ in range(200):
        quiet = 0 if getattr(page, "open_questions", ()) else quiet + 1
        if quiet == 3:
            return
        page.wait_for_timeout(100)
    getattr(page, "open_questions", set()).clear()  # these get no answer any more


def load(page: Any, url: str) -> None:
    """Loads the page and waits until its scripts have run."""
    page.goto(url, wait_until="domcontentloaded")
    page.open_questions.clear()  # those of the page before get no answer
    page.wait_for_selector(READY, timeout=120_000)
    page.wait_for_selector(".sag-pag-ready", state="attached", timeout=60_000)
    answered(page, 1500)


def screenshot(target: Any, name: str) -> None:
    """Saves what is seen of a page or element in the folder that SCREENSHOTS names."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        target.screenshot(path=Path(folder) / f"{name}.png")


def keep(picture: Path, name: str) -> None:
    """Copies a picture into that folder."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        shutil.copy(picture, Path(folder) / f"{name}.png")


def element(tab: str, name: str) -> str:
    """The selector of a control."""
    return f"#script_{tab}_{SCRIPT}_{name}"


def open_panel(page: Any, tab: str = "txt2img", *features: str) -> Any:
    """Opens the panel, switches features on and opens all that they have; gives the panel."""
    panel = page.locator(element(tab, "panel"))
    if not panel.locator("> .label-wrap.open").count():
        panel.locator("> .label-wrap").click()
    for feature in features:
        page.locator(f"{element(tab, feature + '_enabled')} > .label-wrap").click()
        open_fold(page, tab, feature)
    answered(page, 800)
    return panel


def open_fold(page: Any, tab: str, name: str) -> None:
    """Opens the fold of a feature, or the one for both."""
    page.locator(f"{element(tab, name + '_more')} > .label-wrap").click()


def number(page: Any, tab: str, name: str) -> float:
    """The value of a slider."""
    return float(page.locator(f"{element(tab, name)} input[type=number]").input_value())


def text_field(page: Any, tab: str, name: str) -> Any:
    """A text field."""
    return page.locator(f"{element(tab, name)} :is(textarea, input)")


def ticked(page: Any, tab: str, feature: str) -> bool:
    """Whether a feature's checkbox is on."""
    return bool(page.locator(f"{element(tab, feature + '_enabled')}-visible-checkbox").is_checked())


def eventually(page: Any, condition: Callable[[], bool], *, seconds: int = 20) -> bool:
    """Whether a condition comes to hold; a busy machine answers late."""
    for _ in range(10 * seconds):
        if condition():
            return True
        page.wait_for_timeout(100)
    return condition()


def generate(page: Any, *, steps: int = 2) -> None:
    """A small picture from the page's button."""
    for name, value in (("steps", steps), ("width", 128), ("height", 128)):
        field = page.locator(f"#txt2img_{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")
    page.locator("#txt2img_generate").click()
    page.wait_for_selector(PICTURES, timeout=60_000)
    page.wait_for_timeout(1500)


def choose_checkpoint(page: Any, name: str) -> None:
    """Loads a checkpoint as a person does; forks with a list of their own do so when they make a picture."""
    own = page.locator(".model_selection")
    box = own if own.count() else page.locator("#setting_sd_model_checkpoint")
    box.locator("input").first.click()
    box.locator("ul li", has_text=re.compile(rf"^[^a-z]*{re.escape(name)}")).first.click()
    if own.count():
        generate(page)
