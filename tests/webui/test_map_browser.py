"""The block map, the cost line and the messages, in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from browser import (
    answered,
    choose_checkpoint,
    element,
    eventually,
    generate,
    load,
    number,
    open_fold,
    open_panel,
    screenshot,
    text_field,
    ticked,
)
from client import Client
from server import Server

from sag_pag.settings import PARAMETERS

WAIT = 900  # milliseconds in which the server has answered
ASKS = re.compile("/run/predict|/queue/join")  # of gradio 3 and 4


def block(page: Any, name: str, tab: str = "txt2img", field: str = "pag_blocks") -> Any:
    return page.locator(f"{element(tab, field + '_map')} button[data-name='{name}']")


def chosen(page: Any, tab: str = "txt2img", field: str = "pag_blocks") -> str:
    return str(text_field(page, tab, field).input_value())


def pressed(page: Any, tab: str = "txt2img", field: str = "pag_blocks") -> list[str]:
    cells = page.locator(f"{element(tab, field + '_map')} .sag-pag-u button[aria-pressed='true']")
    names: list[str] = cells.evaluate_all("found => found.map((cell) => cell.dataset.name)")
    return names


def head(page: Any, tab: str = "txt2img") -> str:
    return " ".join(page.locator(f"{element(tab, 'panel')} .sag-pag-head").inner_text().split())


def prices(page: Any) -> tuple[str, str]:
    """Of a guided step and of the picture, as the head says them."""
    picture, step = re.findall(r"≈ (\d\.\d\d)×", head(page))
    return step, picture


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_clicking_and_typing_follow_each_other(page: Any, client: Client, tab: str) -> None:
    client.load_checkpoint("sd1")
    page.locator("#tabs button", has_text=tab).first.click()
    panel = open_panel(page, tab, "pag", "sag")
    assert pressed(page, tab) == ["middle"]
    block(page, "output.3", tab).click()
    assert chosen(page, tab) == "middle, output.3"
    block(page, "output.6", tab).click(modifiers=["Shift"])
    assert chosen(page, tab) == "middle, output.3, output.4, output.5, output.6"
    block(page, "middle", tab).click()
    assert chosen(page, tab) == "output.3, output.4, output.5, output.6"
    text_field(page, tab, "pag_blocks").fill("d1, output.9-10")
    for _ in range(10):  # a busy machine answers late
        answered(page, WAIT)
        if pressed(page, tab) != ["output.3", "output.4", "output.5", "output.6"]:
            break
    assert pressed(page, tab) == ["input.2", "output.9", "output.10"]
    block(page, "input.4", tab, "sag_block").click()
    block(page, "input.5", tab, "sag_block").click()
    assert chosen(page, tab, "sag_block") == "input.5"
    assert chosen(page, tab) == "d1, output.9-10"
    block(page, "input.7", tab).hover()
    about = panel.locator(".sag-pag-block:visible").first.inner_text()
    assert re.search(r"input\.7\s+resolution \d\d×\d\d\s+heads 4\s+cost alone ≈ 1\.\d\d× per guided step", about), about
    screenshot(panel, f"map-{tab}")


def test_keyboard(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    open_panel(page, "txt2img", "pag")
    assert page.locator(f"{element('txt2img', 'pag_blocks_map')} button[tabindex='0']").count() == 1
    block(page, "middle").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert chosen(page) == "input.8, middle"
    page.keyboard.press("Home")
    page.keyboard.press("Shift+Enter")
    assert chosen(page).startswith("input.1, input.2, input.4")
    answered(page, WAIT)
    assert page.evaluate("document.activeElement.dataset.name") == "input.1"
    page.keyboard.press("End")
    page.keyboard.press(" ")
    assert chosen(page).endswith("middle, output.11")


def test_it_follows_the_checkpoint(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    load(page, page.url)
    panel = open_panel(page, "txt2img", "pag")
    assert block(page, "output.11").count() == 1
    choose_checkpoint(page, "sdxl.safetensors")
    page.wait_for_function(
        "id => !document.querySelector(id + ' button[data-name=\"output.11\"]')",
        arg=element("txt2img", "pag_blocks_map"), timeout=60_000,
    )  # fmt: skip
    block(page, "input.7").click()
    block(page, "input.7.1").click()
    assert chosen(page) == "input.7.0, input.7.2, middle"
    assert block(page, "input.7").get_attribute("aria-pressed") == "mixed"
    answered(page, WAIT)
    screenshot(panel, "map-sdxl")
    client.load_checkpoint("sd1")


def test_cost_and_whether_anything_is_on(page: Any, client: Client) -> None:
    client.load_checkpoint("sd1")
    load(page, page.url)
    assert head(page) == "off"
    open_panel(page, "txt2img", "pag")
    answered(page, WAIT)
    page.locator(f"{element('txt2img', 'panel')} > .label-wrap").click()
    whole = re.search(r"PAG\s*≈ (\d\.\d\d)× for this picture$", " ".join(head(page).split()))
    assert whole is not None, head(page)
    assert page.locator(f"{element('txt2img', 'panel')} .sag-pag-head").is_visible()
    open_panel(page)
    page.locator(f"{element('txt2img', 'pag_end')} input[type=number]").fill("0.5")
    page.keyboard.press("Tab")
    answered(page, WAIT)
    step, picture = prices(page)
    assert step == whole[1]
    assert float(picture) - 1 == pytest.approx((float(whole[1]) - 1) / 2, abs=0.011)


def test_hires_fix_is_counted(page: Any, client: Client) -> None:
    """Two passes of one size and as many steps: guidance in the first alone costs half as much more."""
    client.load_checkpoint("sd1")
    load(page, page.url)
    open_panel(page, "txt2img", "pag")
    page.locator("#txt2img_hr > .label-wrap").click()
    page.locator("#txt2img_hr_scale input[type=number]").fill("1")
    page.locator("#txt2img_denoising_strength input[type=number]").fill("1")
    page.keyboard.press("Tab")
    answered(page, WAIT)
    both = re.search(r"≈ (\d\.\d\d)× for this picture", head(page))
    assert both is not None, head(page)
    open_fold(page, "txt2img", "both")
    page.locator(f"{element('txt2img', 'hires_pass')} label", has_text="first pass").click()
    answered(page, WAIT)
    step, picture = prices(page)
    assert step == both[1]
    assert float(picture) - 1 == pytest.approx((float(both[1]) - 1) / 2, abs=0.011)


def test_img2img_has_no_hires_controls(page: Any) -> None:
    for tab, there in (("txt2img", True), ("img2img", False)):
        page.locator("#tabs button", has_text=tab).first.click()
        panel = open_panel(page, tab)
        open_fold(page, tab, "both")
        answered(page, WAIT)
        assert page.locator(element(tab, "rescale")).is_visible()
        assert page.locator(element(tab, "hires_pass")).is_visible() is there
        assert ("hires" in panel.inner_text()) is there


def test_a_wrong_name(page: Any, client: Client) -> None:
    """Shown at once in red, with what was meant, and a generation refuses in the same words; nothing stays chosen."""
    client.load_checkpoint("sd1")
    panel = open_panel(page, "txt2img", "pag")
    text_field(page, "txt2img", "pag_blocks").fill("middle, outptu.3")
    answered(page, WAIT)
    message = panel.locator(".sag-pag-state .sag-pag-error")
    words = message.inner_text()
    assert words.startswith("Blocks to perturb: \"outptu.3\" can't be used; did you mean output.3?"), words
    assert pressed(page) == []
    red, green, blue = map(int, re.findall(r"\d+", message.evaluate("e => getComputedStyle(e).color"))[:3])
    assert red > green + 60
    assert red > blue + 60
    assert text_field(page, "txt2img", "pag_blocks").get_attribute("aria-invalid") == "true"
    screenshot(panel, "map-wrong-name")
    page.locator("#txt2img_generate").click()
    page.wait_for_function("words => document.body.innerText.split(words).length > 2", arg=words, timeout=30_000)
    text_field(page, "txt2img", "pag_blocks").fill("middle, output.3")
    assert eventually(page, lambda: message.count() == 0)
    assert pressed(page) == ["middle", "output.3"]


def test_without_our_javascript(browser: Any, webui: Server) -> None:
    """Everything can still be set: names are typed, and a wrong one is reported."""
    window = browser.new_context(viewport={"width": 1400, "height": 1600})
    window.route(re.compile(r"sag_pag\.js"), lambda route: route.abort())
    page = window.new_page()
    page.goto(webui.url, wait_until="domcontentloaded")
    page.wait_for_selector("#txt2img_generate", timeout=120_000)
    page.wait_for_timeout(3000)
    assert page.locator(".sag-pag-ready").count() == 0
    panel = open_panel(page, "txt2img", "pag")
    text_field(page, "txt2img", "pag_blocks").fill("outptu.3")
    page.wait_for_timeout(WAIT)
    assert "can't be used" in panel.inner_text()
    text_field(page, "txt2img", "pag_blocks").fill("output.3")
    page.wait_for_timeout(WAIT)
    assert "can't be used" not in panel.inner_text()
    generate(page)
    assert "PAG blocks: output.3" in page.locator("#html_info_txt2img").first.inner_text()
    window.close()


def test_the_controls_are_made_as_the_parameters_say(client: Client) -> None:
    """Also after the host has read its own file of people's defaults, which knows controls by their labels."""
    title = "self-attention & perturbed-attention guidance"
    for script in client.call("/sdapi/v1/script-info"):
        if script["name"] != title:
            continue
        for control, parameter in zip(script["args"], PARAMETERS.values(), strict=True):
            assert (control["label"], control["value"]) == (parameter.label, parameter.default)
            if parameter.kind == "float":
                sizes = (control["minimum"], control["maximum"], control["step"])
                assert sizes == (parameter.minimum, parameter.maximum, parameter.step)


def test_the_pages_controls_have_the_defaults(page: Any) -> None:
    for name, parameter in PARAMETERS.items():
        if parameter.kind == "float":
            assert number(page, "txt2img", name) == parameter.default, name
    assert not ticked(page, "txt2img", "pag")
    assert not ticked(page, "txt2img", "sag")


def asked(page: Any) -> list[str]:
    """Collects the requests that the page makes from now on."""
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url) if ASKS.search(request.url) else None)
    return found


def drag(page: Any, selector: str) -> None:
    """Drags a slider for a second, with a change at every step."""
    slider = page.locator(f"{selector} input[type=range]")
    box = slider.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    for step in range(40):
        page.mouse.move(box["x"] + 20 + step * (box["width"] - 60) / 40, box["y"] + box["height"] / 2)
        page.wait_for_timeout(25)
    page.mouse.up()
    answered(page, 2 * WAIT)


def test_dragging_asks_once(page: Any, client: Client) -> None:
    """Not at all while the panel is closed and off: the WebUI's own requests are all that there are."""
    client.load_checkpoint("sd1")
    requests = asked(page)
    drag(page, "#txt2img_width")
    closed = len(requests)
    page.locator("#txt2img_width input[type=number]").fill("512")
    open_panel(page, "txt2img", "pag")
    answered(page, 2 * WAIT)
    before, size = len(requests), block(page, "input.1").get_attribute("data-size")
    drag(page, "#txt2img_width")
    assert len(requests) - before <= closed + 1
    assert eventually(page, lambda: block(page, "input.1").get_attribute("data-size") != size)
    before = len(requests)
    drag(page, element("txt2img", "pag_scale"))
    assert len(requests) - before <= 1


def test_resize_by_is_counted(page: Any, client: Client, tmp_path: Path) -> None:
    """The picture's size is the source's times the scale."""
    from PIL import Image

    client.load_checkpoint("sd1")
    page.locator("#tabs button", has_text="img2img").first.click()
    open_panel(page, "img2img", "pag")
    source = tmp_path / "source.png"
    Image.new("RGB", (320, 192)).save(source)
    page.locator("#img2img_image input[type=file]").set_input_files(source)
    answered(page, WAIT)
    page.locator("#img2img_tabs_resize > .tab-nav button").last.click()
    page.locator("#img2img_scale input[type=number]").fill("2")
    page.locator("#img2img_scale input[type=number]").press("Tab")
    answered(page, 3 * WAIT)
    assert block(page, "input.1", "img2img").get_attribute("data-size") == "80×48"
    page.locator("#img2img_tabs_resize > .tab-nav button").first.click()
    answered(page, 3 * WAIT)
    width, height = (
        int(page.locator(f"#img2img_{side} input[type=number]").input_value()) // 8 for side in ("width", "height")
    )  # Neo's are not 512
    assert block(page, "input.1", "img2img").get_attribute("data-size") == f"{width}×{height}" != "80×48"
