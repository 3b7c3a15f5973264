"""The cost line in a fork's page, where a CFG scale of 1 saves the unconditional row: it says what is counted."""

from __future__ import annotations

from typing import Any

import pytest
from browser import answered, element, load, open_panel
from client import Client
from test_forks_webui import counted
from test_generation import guided, hires
from test_map_browser import WAIT

SIZE = 128
pytestmark = pytest.mark.only_on("forge", "reforge", "neo")


def said(page: Any) -> float:
    """How many times the cost of the picture without guidance, as the closed panel says it."""
    answered(page, 2 * WAIT)
    line = page.locator(f"{element('txt2img', 'panel')} .sag-pag-head").inner_text()
    return float(line.split("≈")[1].split("×")[0])


def measured(client: Client, **request: Any) -> float:
    """The same, counted in the U-Net's calls."""
    return counted(client, **request, **guided(pag_scale=3.0)) / counted(client, **request)


def set_number(page: Any, control: str, value: float) -> None:
    field = page.locator(f"#txt2img_{control} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def opened(page: Any, client: Client) -> None:
    """A small picture's page with PAG on."""
    client.load_checkpoint("sd1")
    load(page, page.url)
    for control in ("width", "height"):
        set_number(page, control, SIZE)
    open_panel(page, "txt2img", "pag")


def test_no_cfg(page: Any, client: Client) -> None:
    opened(page, client)
    before = said(page)
    assert before == pytest.approx(measured(client), abs=0.006)
    set_number(page, "cfg_scale", 1)
    without = said(page)
    assert without > before + 0.2
    assert without == pytest.approx(measured(client, cfg_scale=1.0), abs=0.006)
    set_number(page, "cfg_scale", 7)
    assert said(page) == before


def test_no_cfg_in_the_hires_pass(page: Any, client: Client, host: str) -> None:
    """Two passes of one size and as many steps."""
    request = {**hires(host, 1), "denoising_strength": 1.0}
    opened(page, client)
    page.locator("#txt2img_hr > .label-wrap").click()
    answered(page, WAIT)
    for control, value in {"hr_scale": 1, "denoising_strength": 1, "hr_cfg": 5}.items():
        set_number(page, control, value)
    before = said(page)
    assert before == pytest.approx(measured(client, **request), abs=0.006)
    set_number(page, "hr_cfg", 1)
    without = said(page)
    assert without > before + 0.05
    assert without == pytest.approx(measured(client, **{**request, "hr_cfg": 1.0}), abs=0.006)
