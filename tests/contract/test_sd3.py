"""SD3, the host's transformer: PAG in its joint blocks like PAG in the U-Net, and what there is not said so."""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import pytest
import torch
from double import TITLE, Host
from mmdit import PATCH, joined, literal_mask
from naive import Naive, Wanted
from test_panel import AROUND
from test_routes import client, get
from test_rows import LONG, PROMPTS
from test_xyz import label, plot, refused
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

NOTE = "SAG/PAG note"
PAG = {"pag_scale": 3, "pag_blocks": "joint.1"}
BOTH = {**PAG, "sag_scale": 1}


@pytest.fixture(autouse=True)
def _sd3(host: Host) -> None:
    host.use("sd3")


class NaiveJoint(Naive):
    """With the literal mask over the whole map."""

    def pag(self, row: int) -> Tensor:
        x = self.params.x[row : row + 1]
        clean = self.predict(row, x)
        network = self.host.shared.sd_model.model.diffusion_model
        perturbed = [network.get_submodule(block) for block in self.wanted.blocks]

        def forward(block: Any, context: Tensor, x: Tensor, c: Tensor) -> Any:
            return joined(block, context, x, c, allowed=literal_mask(context.shape[1], x.shape[1]))

        try:
            for block in perturbed:
                block.forward = MethodType(forward, block)
            return (clean - self.predict(row, x))[0]
        finally:
            for block in perturbed:
                del block.forward


def compare(host: Host, settings: dict[str, Any], blocks: tuple[str, ...] = ("joint_blocks.1",), **fields: Any) -> None:
    """What the extension makes is what the naive one makes, and another picture than the host alone makes."""
    made = host.generate(settings, **fields)
    with host.without_extension(), NaiveJoint(host, Wanted(pag=3.0, blocks=blocks)).registered():
        expected = host.processing.process_images(host.processing.Processing(**fields)).latents
    for actual, other in zip(made, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[0], host.plain(**fields)[0], atol=1e-3)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(host: Host, name: str) -> None:
    """Batches, AND and its weights, and lengths that make several calls of a step."""
    compare(host, PAG, prompt=PROMPTS[name], batch_size=2)


def test_a_long_negative_prompt(host: Host) -> None:
    compare(host, PAG, negative_prompt=LONG, batch_size=2)


@pytest.mark.parametrize(("text", "blocks"), [
    ("joint.0", (0,)), ("joint.3", (3,)), ("blocks.1-2", (1, 2)), ("joint.0, transformer_blocks.3", (0, 3)),
    ("middle", (2,)),
])
def test_blocks(host: Host, text: str, blocks: tuple[int, ...]) -> None:
    """The last one, which has no text to give, and the one that stands in for the default."""
    compare(host, {"pag_scale": 3, "pag_blocks": text}, tuple(f"joint_blocks.{n}" for n in blocks), batch_size=2)


@pytest.mark.parametrize("scale", [1.0, 0.0, 15.0])
def test_cfg_scales(host: Host, scale: float) -> None:
    compare(host, PAG, cfg_scale=scale)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_masks(host: Host, kind: str) -> None:
    nmask = torch.rand(4, 8, 6, generator=torch.Generator().manual_seed(1))
    nmask = nmask.round() if kind == "hard" else nmask
    init = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    fields = {"nmask": nmask, "init_latent": init, "batch_size": 2}
    compare(host, PAG, **fields)
    if kind == "hard":
        for guided, original in zip(host.generate(PAG, **fields), init, strict=True):
            assert torch.equal(guided[nmask == 0], original[nmask == 0])


def test_without_unconditional_rows(host: Host) -> None:
    host.shared.opts.s_min_uncond_all = True
    compare(host, PAG, batch_size=2, s_min_uncond=100.0)


@pytest.mark.parametrize("low_memory", ["lowvram", "batch off"])
def test_short_of_memory(host: Host, low_memory: str) -> None:
    """An own call, in which only the perturbed block and those behind it run."""
    model = host.shared.sd_model
    model.lowvram = low_memory == "lowvram"
    host.shared.opts.batch_cond_uncond = low_memory == "lowvram"
    compare(host, PAG, batch_size=2)
    rows = host.rows(lambda: host.generate(PAG, batch_size=2, steps=1))
    assert rows == ([4, 2] if model.lowvram else [2, 2, 2])
    ran: list[int] = []
    numbers = {block.x_block.mlp: number for number, block in enumerate(model.model.diffusion_model.joint_blocks)}

    def note(module: Any, _: Any) -> None:
        if module in numbers:
            ran.append(numbers[module])

    note.__module__ = "torch"  # another's hook would be somebody
    counting = register_module_forward_pre_hook(note)
    try:
        host.generate({**PAG, "pag_blocks": "joint.2"}, steps=1)
    finally:
        counting.remove()
    assert ran == [0, 1, 2, 3, 2, 3] if model.lowvram else sorted(ran) == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_extra_rows_ride_along(host: Host) -> None:
    assert host.rows(lambda: host.generate(PAG, steps=3)) == [3, 3, 3]
    assert host.rows(lambda: host.generate(PAG, steps=2, batch_size=2)) == [6, 6]


def test_off_on_off(host: Host) -> None:
    expected = host.plain()[0]
    assert torch.equal(host.generate({})[0], expected)
    assert not torch.equal(host.generate(PAG)[0], expected)
    for nothing in ({}, {"pag_scale": 0}, {"pag_scale": 3, "pag_start": 1.0}, {"sag_scale": 1}):
        assert torch.equal(host.generate(nothing)[0], expected)
    assert host.rows(lambda: host.generate({"sag_scale": 1}, steps=2)) == [2, 2]


def test_another_extension_in_a_block(host: Host) -> None:
    """It gets the host's rows and no others; at first such a call is tried."""
    block = host.shared.sd_model.model.diffusion_model.joint_blocks[2]
    own = block.forward
    block.forward = lambda context, x, c: own(context, x, c=c)
    try:
        assert host.rows(lambda: host.generate(PAG, steps=2)) == [2, 2, 2, 2, 2]
        compare(host, PAG, batch_size=2)
    finally:
        del block.forward


@pytest.mark.parametrize("batched", [True, False])
def test_an_error_on_the_way(host: Host, batched: bool) -> None:
    """Nothing is left behind: the double looks, and the next picture is the plain one."""
    host.shared.opts.batch_cond_uncond = batched
    expected = host.plain()[0]
    model = host.shared.sd_model

    def fail() -> None:
        if len(model.calls) > 2:
            raise RuntimeError("out of memory")

    model.before_call = fail
    model.calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        host.generate(PAG)
    model.before_call = lambda: None
    host.assert_clean()
    assert torch.equal(host.generate({})[0], expected)


def generated(host: Host, settings: Any, **fields: Any) -> tuple[str, Any]:
    p = host.processing_for(settings, **fields)
    result = host.processing.process_images(p)
    return result.infotexts[0], p.extra_generation_params


def test_the_default_block(host: Host) -> None:
    """Nobody has typed it: the block where diffusers' example is stands in, and the picture says which."""
    infotext, fields = generated(host, {"pag_scale": 3})
    assert fields[NOTE] == "PAG at joint.2, this model has no middle"
    assert "PAG: True" in infotext


def test_infotext(host: Host) -> None:
    _, fields = generated(host, PAG)
    assert fields == {"PAG": "True", "PAG scale": "3", "PAG blocks": "joint.1"}


def test_sag_is_noted_while_pag_works(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        p = host.processing_for(BOTH, n_iter=2)
        result = host.processing.process_images(p)
    assert torch.equal(result.latents[0], host.generate(PAG)[0])
    assert p.extra_generation_params[NOTE].startswith("SAG not applied, SAG is defined for the U-Net's attention")
    for infotext in result.infotexts:
        assert "PAG: True" in infotext
        assert "SAG: True" not in infotext
        assert "SAG scale" not in infotext
    assert len(caplog.records) == 1


def test_sag_alone_is_not_applied(host: Host) -> None:
    _, fields = generated(host, {"sag_scale": 1, "rescale": 0.5, "sag_block": "input.1"})
    assert list(fields) == [NOTE]
    assert fields[NOTE].startswith("not applied, SAG is defined")


BAD: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "no such block": ({"pag_blocks": "joint.4"}, "pag_blocks", ["joint.4", "joint.0 to joint.3"]),
    "a range beyond the end": ({"pag_blocks": "joint.2-4"}, "pag_blocks", ["joint.0 to joint.3"]),
    "a U-Net's block": ({"pag_blocks": "input.1"}, "pag_blocks", ["input.1", "joint.0 to joint.3"]),
    "no block": ({"pag_blocks": "centre"}, "pag_blocks", ["centre", "joint.0 to joint.3"]),
    "SEG": ({"pag_perturbation": "blurred queries"}, "pag_perturbation", ["'identity' on this model", "U-Net"]),
    "SSG": ({"pag_perturbation": "swapped tokens"}, "pag_perturbation", ["'identity' on this model", "U-Net"]),
    "SSG and SAG": ({"pag_swap": 0.2, "sag_scale": 1}, "pag_perturbation", ["swapped tokens"]),
    "no name for SAG's block": ({"sag_block": "centre"}, "sag_block", ["centre"]),
}


@pytest.mark.parametrize(("settings", "field", "says"), BAD.values(), ids=BAD)
def test_refused(host: Host, settings: dict[str, Any], field: str, says: list[str]) -> None:
    before = len(host.calls)
    status, body = host.processing.answer(host.txt2img, host.processing.Processing(), {TITLE: [settings]})
    assert status == 422
    assert len(host.calls) == before
    assert body["body"]["field"] == field
    for part in (field, *says):
        assert part in body["detail"]


def test_joint_blocks_of_a_u_net(host: Host) -> None:
    host.use("sd1")
    status, body = host.processing.answer(
        host.txt2img, host.processing.Processing(), {TITLE: [{"pag_blocks": "joint.1"}]}
    )
    assert (status, body["body"]["field"]) == (422, "pag_blocks")
    assert "input.1, input.3, middle" in body["detail"]


def test_built_in_presets(host: Host) -> None:
    """Each is used, or refused in words; the one for SD3 needs no note where there is its block."""
    from sag_pag.webui.presets import BUILT_IN

    for preset in BUILT_IN:
        p = host.processing_for(dict(preset.values))
        if preset.values.get("pag_perturbation"):
            with pytest.raises(ValueError, match="can't be used"):
                host.processing.process_images(p)
        else:
            host.processing.process_images(p)
    sd3 = next(preset for preset in BUILT_IN if preset.name == "SD3")
    assert sd3.values == {"pag_enabled": True, "pag_scale": 0.7, "pag_blocks": "joint.13"}
    assert generated(host, dict(sd3.values))[1][NOTE] == "PAG at joint.2, this model has no joint.13"


def test_the_plot(host: Host) -> None:
    p = host.processing_for({"pag_scale": 3})
    first, second = plot(host, p, {label(host, "pag_blocks"): ["joint.1", "blocks.3"]})
    for cell, block in ((first, "joint.1"), (second, "joint.3")):
        assert cell is not None
        assert torch.equal(cell, host.generate({"pag_scale": 3, "pag_blocks": block})[0])
    with refused("pag_blocks"):
        plot(host, p, {label(host, "pag_blocks"): ["joint.1", "input.1"]})
    with refused("pag_perturbation"):
        plot(host, p, {label(host, "pag_perturbation"): ["identity", "swapped tokens"]})


@pytest.mark.parametrize("first", ["sd1", "sd3"])
def test_a_model_of_another_family_takes_over(host: Host, first: str) -> None:
    """For the hires pass: what one of them can't do is left out there, and said."""
    other = {"sd1": "sd3", "sd3": "sd1"}[first]
    host.use(first)
    settings = {"pag_scale": 3, "sag_scale": 1}
    fields = {"enable_hr": True, "hr_checkpoint": host.checkpoint(other)}
    infotext, params = generated(host, settings, **fields)
    assert "SAG: True" in infotext
    assert "SAG not applied throughout, SAG is defined for the U-Net" in params[NOTE]
    assert "PAG at joint.2, this model has no middle" in params[NOTE]
    host.use(first)
    if first == "sd1":
        _, params = generated(host, {"pag_perturbation": "swapped tokens"}, **fields)
        assert params[NOTE] == (
            "PAG not applied throughout, swapped tokens are defined for the U-Net's attention among the places of a "
            "picture, not for one that holds text too"
        )
    else:
        with pytest.raises(ValueError, match="swapped tokens"):
            generated(host, {"pag_perturbation": "swapped tokens"}, **fields)


def test_routes(host: Host) -> None:
    found = get(host, "blocks", width=96, height=64)
    assert found["checkpoint"] == "sd3"
    assert [block["name"] for block in found["blocks"]] == [f"joint.{n}" for n in range(4)]
    first = found["blocks"][0]
    assert first["transformer_blocks"] == ["joint.0"]
    assert (first["part"], first["downscale"], first["resolution"]) == ("joint", PATCH, [6, 4])
    assert (first["heads"], first["channels"]) == (4, 32)
    costs = [block["pag_cost"] for block in found["blocks"]]
    assert costs == sorted(costs, reverse=True)
    assert {block["sag_cost"] for block in found["blocks"]} == {None}
    assert "null" in client(host).get("/openapi.json").text


def shown(host: Host, **values: Any) -> list[str]:
    """What the panel shows for these values: the cost line first, the maps last."""
    from sag_pag.settings import PARAMETERS
    from sag_pag.webui import panel, script

    made = panel.Panel(lambda name: name, switch=None, model=script.model_in_memory)
    made.around = tuple(AROUND)
    own = {name: values.get(name, parameter.default) for name, parameter in PARAMETERS.items()}
    return [str(part) for part in made._redraw(*own.values(), *AROUND.values(), None)]


def test_the_map(host: Host) -> None:
    """One line of blocks for PAG; for SAG, in its place, why there is none."""
    every = shown(host, pag_enabled=True)
    pag_map = next(part for part in every if "data-name" in part)
    assert [f'data-name="joint.{n}"' in pag_map for n in range(5)] == [True] * 4 + [False]
    assert 'data-chosen="joint.2"' in pag_map
    assert "joint blocks" in pag_map
    assert "--level: 3" not in pag_map
    assert "sag-pag-depths" not in pag_map
    assert 'aria-label="joint.1, 32×48, ≈ 1.' in pag_map
    assert any("SAG is defined for the U-Net" in part and "data-name" not in part for part in every)
    assert any("sag-pag-on" in part and "×" in part for part in every)


@pytest.mark.parametrize(("values", "says"), [
    ({"pag_blocks": "input.1"}, "joint.0 to joint.3"), ({"pag_perturbation": "swapped tokens"}, "on this model"),
])
def test_the_panel_says_what_is_wrong(host: Host, values: dict[str, Any], says: str) -> None:
    assert any("sag-pag-error" in part and says in part for part in shown(host, pag_enabled=True, **values))


def test_a_block_of_a_u_net_for_sag(host: Host) -> None:
    """It is not in the way: a model may be chosen that has it."""
    assert not any("sag-pag-error" in part for part in shown(host, sag_enabled=True, sag_block="input.4"))
