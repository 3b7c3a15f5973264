"""The page in a real browser, and what it serves.

Needs the packages of requirements-demo.txt, Playwright and Chromium. ``BROWSER_TESTS=1`` says that they are there: then
the lack of one is a failure; without it, a skip that says what was not tried.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PANEL = "#script_txt2img_selfattention__perturbedattention_guidance"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]


@pytest.fixture(scope="module", autouse=True)
def _everything_is_there() -> None:
    if MISSING:
        reason = f"no {', '.join(MISSING)}: the demo's page was not tried in a browser"
        if os.environ.get("BROWSER_TESTS"):
            pytest.fail(reason)
        pytest.skip(f"{reason} (BROWSER_TESTS is not set)")


@pytest.fixture(scope="module")
def address(_everything_is_there: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, served by the command that the README names."""
    log = tmp_path_factory.mktemp("page") / "log"
    command = [sys.executable, "-m", "sag_pag.demo", "page", "--port", "0", "--threads", "1"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield wait_for_address(process, log)
        finally:
            process.terminate()
            process.wait(20)


def wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What the command printed once it served."""
    for _ in range(600):
        found = re.search(r"http://\S+", log.read_text())
        if found:
            return found[0]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"the page did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """The page in Chromium; anything asked of another machine is noted in ``elsewhere``, and so are script errors."""
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1600})
        tab.elsewhere, tab.script_errors = [], []
        tab.on("request", lambda request: note_elsewhere(tab.elsewhere, request.url, address))
        tab.on("pageerror", lambda error: tab.script_errors.append(str(error)))
        tab.goto(address, wait_until="domcontentloaded")
        tab.wait_for_selector("#demo_generate", timeout=60_000)
        tab.wait_for_selector(".sag-pag-ready", timeout=20_000)
        tab.locator(f"{PANEL}_pag_more > .label-wrap").click()
        yield tab
        browser.close()


def note_elsewhere(noted: list[str], url: str, address: str) -> None:
    own = (address, address.replace("http", "ws", 1), "data:", "blob:")
    if not url.startswith(own):
        noted.append(url)


def fill(page: Any, selector: str, text: str) -> None:
    page.locator(f"{selector} :is(textarea, input)").first.fill(text)


def generate(page: Any, *, seconds: int = 60) -> str:
    """Press the button; the message that then appears."""
    page.evaluate("document.querySelector('#demo_message p')?.remove()")
    page.locator("#demo_generate").click()
    page.wait_for_selector("#demo_message p", timeout=1000 * seconds)
    page.wait_for_timeout(700)
    return str(page.locator("#demo_message p").inner_text())


def sources(page: Any) -> list[str]:
    """The two pictures of the comparison: without, with."""
    return [page.locator(f".demo-{which}").get_attribute("src") for which in ("before", "after")]


def screenshot(page: Any, name: str) -> None:
    """Saves what is seen, for a person to look at, in the folder that SCREENSHOTS names."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_it_begins_where_guidance_helps(page: Any) -> None:
    """At the CFG scale of the README's grid, not where PAG harms this model; nothing is called changed."""
    assert page.locator("#demo_cfg input[type=number]").input_value() == "1.5"
    assert page.locator("#demo_caption :is(textarea, input)").input_value() == "green disc and orange square on blue"
    assert page.locator("#demo_seeds :is(textarea, input)").input_value().startswith("5")
    page.wait_for_timeout(1500)
    assert not page.locator(f"{PANEL}_preset_changed").first.is_visible()


def test_the_map_is_there(page: Any) -> None:
    """The panel's own: the model's four blocks, of which the middle is chosen."""
    page.wait_for_selector(f"{PANEL}_pag_blocks_map .sag-pag-u button", timeout=20_000)
    cells = page.locator(f"{PANEL}_pag_blocks_map .sag-pag-u button")
    pressed = {cell.get_attribute("data-name"): cell.get_attribute("aria-pressed") for cell in cells.all()}
    assert pressed == {"input.1": "false", "middle": "true", "output.0": "false", "output.1": "false"}
    screenshot(page, "page-map")


@pytest.fixture(scope="module")
def generated(page: Any) -> tuple[tuple[str, list[str]], ...]:
    """What the page says, and the pictures it shows, first without guidance, then with PAG."""
    assert page.locator(f"{PANEL}_pag_scale").is_visible()
    fill(page, "#demo_caption", "yellow moon on black")
    fill(page, "#demo_seeds", "3, 5")
    page.locator("#demo_steps input[type=number]").fill("3")
    unguided = generate(page), sources(page)
    page.locator(f"{PANEL}_pag_enabled input").check()
    return unguided, (generate(page), sources(page))


def test_a_caption_becomes_two_different_pictures(page: Any, generated: tuple[tuple[str, list[str]], ...]) -> None:
    (unguided, (before, after)), (said, guided) = generated
    assert "tick PAG or SAG" in unguided
    assert before == after
    assert "with PAG 0.5" in said
    screenshot(page, "demo-page")
    assert guided[0] == before
    assert guided[1] != before
    assert page.locator(".demo-after").get_attribute("alt") == "yellow moon on black; seed 3, with PAG 0.5"
    gallery = page.locator("#demo_gallery .caption-label").all_inner_texts()
    assert gallery == [f"seed {seed}, {name}" for seed in (3, 5) for name in ("without guidance", "with PAG 0.5")]


@pytest.mark.usefixtures("generated")
def test_the_slider_is_moved_by_keyboard(page: Any) -> None:
    slider = page.locator(".demo-compare input[type=range]")
    assert "without guidance" in slider.get_attribute("aria-label")
    slider.focus()
    shares, clips = [], []
    for key in ("Home", "ArrowRight", "End"):
        page.keyboard.press(key)
        shares.append(page.locator(".demo-compare").evaluate("figure => figure.style.getPropertyValue('--share')"))
        clips.append(page.locator(".demo-before").evaluate("image => getComputedStyle(image).clipPath"))
    assert shares == ["0%", "1%", "100%"]
    assert len(set(clips)) == 3
    screenshot(page, "demo-page-slider")


@pytest.mark.usefixtures("generated")
def test_a_picture_of_the_gallery_is_compared(page: Any) -> None:
    first = sources(page)
    page.locator("#demo_gallery .thumbnail-item").nth(3).click()
    page.wait_for_selector(".demo-after[alt*='seed 5']", timeout=20_000)
    assert sources(page) != first


@pytest.mark.parametrize(
    ("selector", "wrong", "message", "right"),
    [
        (f"{PANEL}_pag_blocks", "input.9", "input.1, middle, output.0, output.1", "middle"),
        ("#demo_caption", "red dog", "unknown word 'dog'; known are", "red star"),
        ("#demo_seeds", "one", "'one' are no seeds; write them like 1-4,9", "1"),
        ("#demo_seeds", "1-99999999999", "1 to 8 can be shown", "1"),
    ],
)
def test_what_can_not_be_used_is_said_and_nothing_is_lost(
    page: Any, selector: str, wrong: str, message: str, right: str
) -> None:
    shown, pictures = sources(page), page.locator("#demo_gallery img").count()
    fill(page, selector, wrong)
    assert message in generate(page)
    assert page.locator("#demo_message [role=alert]").is_visible()
    screenshot(page, "demo-page-error")
    assert sources(page) == shown
    assert page.locator("#demo_gallery img").count() == pictures == 4
    assert page.locator(f"{selector} :is(textarea, input)").first.input_value() == wrong
    fill(page, selector, right)


def test_it_goes_on_after_errors(page: Any) -> None:
    assert "with PAG 0.5" in generate(page)
    assert page.locator("#demo_message [role=alert]").count() == 0


def test_nothing_is_asked_of_other_machines_and_no_script_fails(page: Any) -> None:
    assert page.elsewhere == []
    assert page.script_errors == []


def test_the_scripts_of_the_extension_are_served(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        body = answer.read().decode()
    expected = ["page.js", *sorted(path.name for path in (REPOSITORY / "javascript").glob("*.js"))]
    assert re.findall(r'<script src="demo-scripts/([^"]+)" defer>', body) == expected
    for name in expected:
        with urllib.request.urlopen(f"{address}demo-scripts/{name}") as answer:
            assert answer.headers["content-type"].startswith("text/javascript")


def test_a_taken_port_gets_one_line(address: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "sag_pag.demo", "page", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "can't serve at 127.0.0.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("kind", "again"), [("sag-pag-waiting", True), ("", False)])
def test_a_panel_without_a_model_goes_on_asking(page: Any, address: str, kind: str, again: bool) -> None:
    """Only while a model may still come: what can't be guided is not asked about again."""
    asked: list[str] = []
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_selector(f"{PANEL}_pag_blocks_map .sag-pag-u button", state="attached", timeout=20_000)
    page.wait_for_timeout(1500)
    page.evaluate(
        """kind => {
            for (const map of document.querySelectorAll(".sag-pag-mapping .sag-pag-map")) {
                map.outerHTML = `<p class="sag-pag-hint ${kind}">none</p>`;
            }
        }""",
        kind,
    )
    page.route("**/run/predict*", lambda route: (asked.append(route.request.url), route.abort()))
    for _ in range(2):  # closed, and opened again: a closed panel asks for nothing
        page.locator(f"{PANEL}_panel > .label-wrap").click()
        page.wait_for_timeout(300)
    asked.clear()
    page.wait_for_timeout(8000)
    page.unroute("**/run/predict*")
    assert (len(asked) >= 3) is again, asked
