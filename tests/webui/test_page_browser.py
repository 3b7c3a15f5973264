"""The page as a whole: reloading the UI, load time, translations, the gallery."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser import (
    PICTURES,
    READY,
    answered,
    element,
    generate,
    keep,
    load,
    open_panel,
    opened_page,
    screenshot,
    text_field,
)
from client import Client
from installations import Installation
from server import REPOSITORY, Server, environment
from test_generation import state


def test_reloading_the_ui(page: Any, client: Client, webui: Server) -> None:
    """Axes and callbacks are there once, the panel works, and guidance is not applied twice."""
    client.load_checkpoint("sd1")
    before = state(client)["callbacks"]
    page.locator("#tabs button", has_text="Settings").first.click()
    mark = webui.log_mark()
    page.locator("#settings_restart_gradio").click()
    for _ in range(60):  # seconds, on a busy machine
        page.wait_for_timeout(1000)
        if "Running on local URL" in webui.log(mark):
            break
    page.wait_for_timeout(3000)
    load(page, webui.url)
    assert state(client)["callbacks"] == before
    open_panel(page, "txt2img", "pag")
    text_field(page, "txt2img", "pag_blocks").fill("output.3")
    answered(page, 900)
    generate(page)
    assert "PAG blocks: output.3" in page.locator("#html_info_txt2img").first.inner_text()
    assert set(state(client)["calls"]) == {3}
    axes = page.locator("#script_list input").first
    axes.click()
    page.locator("#script_list ul li", has_text="X/Y/Z plot").first.click()
    page.locator("#script_txt2img_xyz_plot_x_type input").first.click()
    labels = page.locator("#script_txt2img_xyz_plot_x_type ul li").all_inner_texts()
    ours = [label.strip(" ✓\n") for label in labels if "AG]" in label]
    assert len(ours) == len(set(ours)) > 15


def test_what_sag_sees_is_in_the_gallery(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    open_panel(page, "txt2img", "sag")
    page.locator(f"{element('txt2img', 'sag_show')} input").check()
    generate(page, steps=4)
    assert page.locator("#txt2img_gallery .thumbnails button, #txt2img_gallery .grid-container button").count() >= 2
    screenshot(page, "what-sag-sees")


PRINTED = """
import sys
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sag_pag.webui.texts import PASSES
sheet = np.asarray(Image.open(sys.argv[1]).convert("L"))
for hires, words in PASSES.items():
    if not hires:
        continue
    drawn = Image.new("L", (256, 24), 255)
    ImageDraw.Draw(drawn).text((0, 8), words.strip(), fill=0, font=ImageFont.load_default())
    ink = np.asarray(drawn)
    rows, columns = (np.flatnonzero((ink < 255).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:48], ink.shape)
    for left in np.flatnonzero((windows == ink).all((2, 3)).any(0)):
        print(left, hires)
"""
"""Run by the host's Python, which draws letters as it does on the sheet: where each pass's name stands."""


def test_a_sheet_says_which_pass_its_columns_are_of(
    page: Any, client: Client, webui: Server, host: str, installation: Installation, tmp_path: Path
) -> None:
    """With hires. fix: two steps of the first pass, then two of the hires pass."""
    client.load_checkpoint("sd1")
    open_panel(page, "txt2img", "sag")
    page.locator(f"{element('txt2img', 'sag_show')} input").check()
    page.locator("#txt2img_hr > .label-wrap").click()
    answered(page, 1000)
    if host == "neo":  # it has no other without a download
        page.locator("#txt2img_hr_upscaler input").click()
        page.locator("#txt2img_hr_upscaler ul li", has_text="None").first.click()
    for control, value in {"hr_scale": "1.5", "denoising_strength": "1", "hires_steps": "2"}.items():
        page.locator(f"#txt2img_{control} input[type=number]").fill(value)
        page.keyboard.press("Tab")
    generate(page, steps=2)
    pictures = page.locator(PICTURES).evaluate_all("found => found.map((picture) => picture.src)")
    with urllib.request.urlopen(pictures[-1]) as answer:
        sheet = tmp_path / "sheet.png"
        sheet.write_bytes(answer.read())
    keep(sheet, "hires-sheet")
    printed = subprocess.run(
        [installation.python, "-c", PRINTED, sheet], env=environment(installation) | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    columns = sorted((int(left), name) for left, _, name in (line.partition(" ") for line in printed.splitlines()))
    assert [name for _, name in columns] == ["first pass", "first pass", "hires pass", "hires pass"]
    text = " ".join(page.locator("#html_info_txt2img").first.inner_text().split())
    assert "Hires upscale: 1.5" in text


def test_load_time(
    browser: Any, webui: Server, plain_webui: Server, record_property: Callable[[str, object], None]
) -> None:
    """With and without the extension, in turn."""
    def seconds(server: Server) -> float:
        window = browser.new_context()
        page = window.new_page()
        began = time.perf_counter()
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_selector(READY, timeout=120_000)
        page.wait_for_function("typeof opts === 'object' && Object.keys(opts).length > 0", timeout=60_000)
        taken = time.perf_counter() - began
        window.close()
        return taken

    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(6):
        pair = {"with": seconds(webui), "without": seconds(plain_webui)}
        if number:  # the first warms up
            for name, taken in pair.items():
                times[name].append(taken)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    record_property("page load in seconds", medians)
    print(f"page load in seconds: {medians}")  # noqa: T201 - the number is the point
    assert medians["with"] < 1.25 * medians["without"] + 0.1


def test_a_translation(browser: Any, start_server: Callable[..., Server], tmp_path: Path) -> None:
    """The WebUI's own localisation files translate labels, the cost line, the map's texts and messages."""
    words = {
        "PAG scale": "PAG-Stärke", "How strongly to steer. 2 to 4 is usual with a prompt, 5 without CFG.": "Wie stark.",
        "per guided step": "je Schritt", "for this picture": "für dieses Bild", "off": "aus",
        "Click to choose, shift-click for a range. From left to right as the model runs, lower is coarser.": "Klicken.",
        "Preset": "Vorlage", "For both: softer contrast, hires. fix": "Für beide", "attention off (PAG)": "ohne",
    }
    folder = tmp_path / "data"
    (folder / "localizations").mkdir(parents=True)
    (folder / "localizations" / "test.json").write_text(json.dumps(words), encoding="utf-8")
    extension = {"sag-pag": Path(__file__).parents[2]}
    arguments = ("--localizations-dir", str(folder / "localizations"))
    server = start_server(
        "translated", data_folder=folder, extensions=extension, options={"localization": "test"}, arguments=arguments,
    )  # fmt: skip
    server.client.load_checkpoint("sd1")
    with opened_page(browser, server.url) as page:
        panel = open_panel(page, "txt2img")
        head = panel.locator(".sag-pag-head")
        assert head.inner_text() == "aus"
        open_panel(page, "txt2img", "pag")
        page.locator(f"{element('txt2img', 'pag_every')} input[type=number]").fill("2")  # so that both costs are shown
        answered(page, 1500)
        text = panel.inner_text()
        screenshot(panel, "panel-translated")
    for original, translated in words.items():
        if original != "off":
            assert translated in text, original
            assert original not in text, original
    server.stop()
