"""What the panel reckons with, and where the sheets of what SAG saw go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from double import Host
from PIL import Image

from lab.benchmark.steps import step_config
from sag_pag.demo.unet import UNetModel
from sag_pag.engine.topology import UNetTopology

AROUND = {"width": 512, "height": 768, "steps": 20}
HIRES = {
    "hires": True, "hires_scale": 2, "hires_width": 0, "hires_height": 0, "hires_steps": 0, "hires_denoising": 0.7,
}  # fmt: skip


@pytest.fixture
def topology() -> UNetTopology:
    with torch.device("meta"):
        return UNetTopology(UNetModel(**step_config("sd1", small=True)[0]))


def passes(topology: UNetTopology, **around: Any) -> list[tuple[int, float, str | None, tuple[int, int]]]:
    """Steps, begin, pass and the first attention's size of each pass."""
    from sag_pag.webui import saying

    found = saying.passes_of(topology, {**AROUND, **around})
    return [(one.steps, round(one.begin, 6), one.hires, one.cost.map_sizes[topology.sites[0]]) for one in found]


def test_one_pass(host: Host, topology: UNetTopology) -> None:
    assert passes(topology) == [(20, 0, None, (96, 64))]
    assert passes(topology, **{**HIRES, "hires": False}) == [(20, 0, None, (96, 64))]
    assert passes(topology, steps=0) == [(1, 0, None, (96, 64))]


@pytest.mark.parametrize(("denoising", "steps"), [(1, 20), (0.75, 16), (0.3, 7), (0, 1)])
def test_img2img_takes_a_part_of_the_steps(host: Host, topology: UNetTopology, denoising: float, steps: int) -> None:
    """As ``setup_img2img_steps`` of the WebUI reckons."""
    assert passes(topology, denoising=denoising) == [(steps, 1 - denoising, None, (96, 64))]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((0, 0), (192, 128)), ((1024, 0), (192, 128)), ((0, 1152), (144, 96)), ((640, 1024), (128, 80))],
)
def test_both_passes_of_hires_fix(
    host: Host, topology: UNetTopology, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    around = {**HIRES, "hires_width": size[0], "hires_height": size[1]}
    first = (20, 0, "first pass", (96, 64))
    assert passes(topology, **around) == [first, (20, 0.3, "hires pass", expected)]
    assert passes(topology, **{**around, "hires_steps": 8})[1] == (8, 0.3, "hires pass", expected)


@pytest.mark.parametrize("field", [*AROUND, *HIRES])
def test_a_field_that_is_empty_for_a_moment(host: Host, topology: UNetTopology, field: str) -> None:
    """Costs nothing but the figures: what is on is shown, nothing is raised."""
    from sag_pag.settings import PARAMETERS
    from sag_pag.webui import saying

    around = {**AROUND, **HIRES, field: None}
    assert saying.passes_of(topology, around) == []
    own = {name: parameter.default for name, parameter in PARAMETERS.items()} | {"pag_enabled": True}
    line = saying.cost_line_of(own, around, topology)
    assert "PAG" in line
    assert "×" not in line


@pytest.mark.parametrize(("around", "cost"), [({}, "1.3"), ({"cfg_scale": 7}, "1.3"), ({"cfg_scale": 1}, "1.6")])
def test_only_a_host_that_saves_the_unconditional_rows_tells_its_cfg_scale(
    host: Host, topology: UNetTopology, around: dict[str, Any], cost: str
) -> None:
    """The WebUI computes them at a CFG scale of 1 too, so that a guided step costs no larger share there."""
    from sag_pag.settings import PARAMETERS
    from sag_pag.webui import saying, script

    own = {name: parameter.default for name, parameter in PARAMETERS.items()} | {"pag_enabled": True}
    line = saying.cost_line_of(own, {**AROUND, **around}, topology)
    assert f"≈ {cost}" in line
    assert all("cfg_scale" not in script._controls_around(tab).values() for tab in ("txt2img", "img2img"))


@pytest.mark.parametrize(("text", "chosen", "stands_in"), [
    ("middle", "middle", False), ("output.0.0-5", "output.3", True), ("output.3", "output.3", False),
    ("joint.13", "middle", True),
])
def test_a_preset_for_another_model_is_told(
    topology: UNetTopology, text: str, chosen: str, stands_in: bool
) -> None:
    """The map shows the block that stands in; what was never typed is not refused."""
    from sag_pag.webui import saying, texts

    state = saying.block_state("pag_blocks", text, topology)
    assert f'data-chosen="{chosen}.0"' in state
    assert (texts.STANDS_IN in state) is stands_in
    assert texts.STANDS_IN not in saying.block_state("pag_blocks", text, texts.NO_MODEL)


@pytest.mark.parametrize("loaded", [False, True])
def test_the_page_asks_again_only_while_no_model_is_loaded(host: Host, loaded: bool) -> None:
    """The script goes on asking while it sees this class."""
    from sag_pag.settings import PARAMETERS
    from sag_pag.webui import panel, texts

    reason = "StableDiffusion3 has no U-Net" if loaded else texts.NO_MODEL
    made = panel.Panel(lambda name: name, switch=None, model=lambda: reason)
    made.around = tuple(AROUND)
    cost, *shown = made._redraw(*(parameter.default for parameter in PARAMETERS.values()), *AROUND.values(), None)
    assert "×" not in cost
    hints = [part for part in shown if reason in str(part)]
    assert len(hints) == len(made.maps) == 2
    assert all(("sag-pag-waiting" in hint) is not loaded for hint in hints)


@pytest.mark.parametrize(("grid", "masks"), [(False, 0), (True, 0), (False, 2)])
def test_sheets_come_last_with_the_infotexts_of_their_pictures(host: Host, grid: bool, masks: int) -> None:
    from sag_pag.webui.sampling import VIEWS

    view = SimpleNamespace(attention=torch.ones(2, 2, 2), mask=torch.ones(2, 4, 4))
    p = SimpleNamespace(script_args=(0,), batch_size=2, iteration=0, batch_index=0)
    setattr(p, VIEWS, [("50% of the way", view)])
    for p.batch_index in (0, 1):
        host.script.postprocess_image(p, SimpleNamespace(image=Image.new("RGB", (8, 8))))
    texts = ["grid"] * grid + ["first", "second"]
    processed = SimpleNamespace(
        images=[*texts, *["mask"] * masks], infotexts=list(texts), index_of_first_image=int(grid)
    )
    host.script.postprocess(p, processed)
    assert len(processed.images) == len(processed.infotexts) == len(texts) + masks + 2
    assert [text.split(",")[0] for text in processed.infotexts[-2:]] == ["first", "second"]
    assert all(isinstance(image, Image.Image) for image in processed.images[-2:])
    host.script.postprocess(p, processed)
    assert len(processed.images) == len(texts) + masks + 2


def test_no_sheets_for_scripts_that_put_pictures_together(host: Host) -> None:
    from sag_pag.webui.sampling import VIEWS

    view = SimpleNamespace(attention=torch.ones(1, 2, 2), mask=torch.ones(1, 4, 4))
    p = SimpleNamespace(script_args=(3,), batch_size=1, iteration=0, batch_index=0)
    setattr(p, VIEWS, [("50% of the way", view)])
    host.script.postprocess_image(p, SimpleNamespace(image=Image.new("RGB", (8, 8))))
    processed = SimpleNamespace(images=["tile"], infotexts=["tile"], index_of_first_image=0)
    host.script.postprocess(p, processed)
    assert processed.images == ["tile"]
