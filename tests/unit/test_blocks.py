"""Block names on the topologies of Stable Diffusion 1.5, 2, XL and the XL refiner, at full size without weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sag_pag.demo.unet import BasicTransformerBlock, UNetKwargs, UNetModel, sd2_config, sd15_config, sdxl_config
from sag_pag.engine.blocks import BlockNameError, similar_names
from sag_pag.engine.topology import UNetTopology, check_names

REFINER = UNetKwargs(
    in_channels=4, out_channels=4, model_channels=384, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
    attention_resolutions=(4, 2), context_dim=1280, num_head_channels=64, transformer_depth=4,
    use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2560,
)
CONFIGS = {"sd1": sd15_config(), "sd2": sd2_config(), "sdxl": sdxl_config(), "refiner": REFINER}

SD1_NAMES = [*(f"input.{n}" for n in (1, 2, 4, 5, 7, 8)), "middle", *(f"output.{n}" for n in range(3, 12))]
SDXL_NAMES = [*(f"input.{n}" for n in (4, 5, 7, 8)), "middle", *(f"output.{n}" for n in range(6))]
REFINER_NAMES = [*(f"input.{n}" for n in (4, 5, 7, 8)), "middle", *(f"output.{n}" for n in range(3, 9))]


@cache
def unet(model: str) -> UNetModel:
    with torch.device("meta"):
        return UNetModel(**CONFIGS[model])


@cache
def topology(model: str) -> UNetTopology:
    return UNetTopology(unet(model))


def resolved(model: str, text: str) -> list[str]:
    """The selected transformer blocks; a block that is selected whole goes by its own name."""
    names = [site.name for site in topology(model).resolve(text)]
    for block in topology(model).block_names():
        own = [site.name for site in topology(model).sites if site.block_name == block]
        if set(own) <= set(names):
            names = [block if name == own[0] else name for name in names if name not in own[1:]]
    return names


def tens(*blocks: str, first: int = 0, last: int = 9) -> list[str]:
    return [f"{block}.{k}" for block in blocks for k in range(first, last + 1)]


@pytest.mark.parametrize(
    ("model", "names", "depths"),
    [
        ("sd1", SD1_NAMES, [1] * 16),
        ("sd2", SD1_NAMES, [1] * 16),
        ("sdxl", SDXL_NAMES, [2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2]),
        ("refiner", REFINER_NAMES, [4] * 11),
    ],
)
def test_names(model: str, names: list[str], depths: list[int]) -> None:
    found = topology(model)
    assert found.block_names() == names
    assert [sum(site.block_name == name for site in found.sites) for name in names] == depths
    assert [site.attention for site in found.sites] == [
        module.attn1 for module in unet(model).modules() if isinstance(module, BasicTransformerBlock)
    ]


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("sd1", "middle", ["middle"]),
        ("sd1", "middle.0", ["middle"]),
        ("sd1", "MIDDLE , Input.4", ["input.4", "middle"]),
        ("sd1", "output.11,input.1,output.11", ["input.1", "output.11"]),
        ("sd1", "output.3-5", ["output.3", "output.4", "output.5"]),
        ("sd1", "output.3 - output.5", ["output.3", "output.4", "output.5"]),
        ("sd1", "input.2-7", ["input.2", "input.4", "input.5", "input.7"]),
        ("sd1", "input_blocks.8", ["input.8"]),
        ("sd1", "middle_block", ["middle"]),
        ("sd1", ", middle,", ["middle"]),
        ("sdxl", "middle.9", ["middle.9"]),
        ("sdxl", "middle.2-4", ["middle.2", "middle.3", "middle.4"]),
        ("sdxl", "input.7.0, input.7.9", ["input.7.0", "input.7.9"]),
        ("sdxl", "output.2-3.1", ["output.2.1", "output.3.1"]),
        ("sdxl", "output.3-5", ["output.3", "output.4", "output.5"]),
        ("refiner", "output.3", ["output.3"]),
    ],
)
def test_own_names(model: str, text: str, expected: list[str]) -> None:
    assert resolved(model, text) == expected


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("sd1", "mid", ["middle"]),
        ("sd1", "mid_block.attentions.0", ["middle"]),
        ("sd1", "mid.block_0", ["middle"]),
        ("sd1", "down.block_0", ["input.1", "input.2"]),
        ("sd1", "down_blocks.2", ["input.7", "input.8"]),
        ("sd1", "down.block_1.attentions_1", ["input.5"]),
        ("sd1", "up.block_1", ["output.3", "output.4", "output.5"]),
        ("sd1", "up.block_1.attentions_0", ["output.3"]),
        ("sd1", "up_blocks.3.attentions.2", ["output.11"]),
        ("sd1", "up_blocks.3.attentions.2.transformer_blocks.0", ["output.11"]),
        ("sd2", "up_blocks.2.attentions.1", ["output.7"]),
        ("sdxl", "mid_block.attentions.0.transformer_blocks.3", ["middle.3"]),
        ("sdxl", "down.block_1", ["input.4", "input.5"]),
        ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.4", ["input.8.4"]),
        ("sdxl", "up.block_0", ["output.0", "output.1", "output.2"]),
        ("sdxl", "up.block_0.attentions_2", ["output.2"]),
        ("sdxl", "up.block_1", ["output.3", "output.4", "output.5"]),
        ("refiner", "up_blocks.1", ["output.3", "output.4", "output.5"]),
        ("refiner", "down_blocks.2.attentions.0", ["input.7"]),
    ],
)
def test_names_of_diffusers(model: str, text: str, expected: list[str]) -> None:
    assert resolved(model, text) == expected


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("sd1", "m0", ["middle"]),
        ("sd1", "d0", ["input.1"]),
        ("sd1", "d5", ["input.8"]),
        ("sd1", "u0-1", ["output.3", "output.4"]),
        ("sd1", "u8", ["output.11"]),
        ("sdxl", "d2.2-9", tens("input.7", first=2)),
        ("sdxl", "u0.4", ["output.0.4"]),
        ("sdxl", "d3, m0, u0-1", ["input.8", "middle", "output.0", "output.1"]),
        ("sdxl", "m0.5", ["middle.5"]),
    ],
)
def test_names_of_comfy_and_forge(model: str, text: str, expected: list[str]) -> None:
    assert resolved(model, text) == expected


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("sd1", "input.3"), ("sd1", "input.0"), ("sd1", "output.0"), ("sd1", "output.12"), ("sd1", "middle.1"),
        ("sd1", "input.1-3"), ("sd1", "output.5-3"), ("sd1", "m1"), ("sd1", "d6"), ("sd1", "u9"),
        ("sd1", "down.block_3"), ("sd1", "up.block_0"), ("sd1", "up.block_1.attentions_3"), ("sd1", "u-1"),
        ("sd1", "middle,,mid dle"), ("sd1", "in"), ("sd1", "input"), ("sd1", "input."), ("sd1", "input.4."),
        ("sd1", "transformer"), ("sd1", "attn1"), ("sd1", "all"), ("sd1", "*"), ("sd1", "input.4;output.5"),
        ("sdxl", "output.6"), ("sdxl", "input.1"), ("sdxl", "middle.10"), ("sdxl", "middle.8-10"),
        ("sdxl", "output.3-5.2"), ("sdxl", "d2.9-2"), ("sdxl", "down.block_0"), ("refiner", "output.0"),
        ("sd1", "input.4-output.5"), ("sd1", "input.5-middle"), ("sd1", "d1-u2"), ("sd1", "input.4-x5"),
        ("sd1", "input." + "9" * 5000), ("sd1", "m" + "0" * 5000 + "1"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(model: str, text: str) -> None:
    with pytest.raises(BlockNameError) as raised:
        topology(model).resolve(text)
    assert raised.value.unknown in text
    for name in topology(model).block_names():
        assert name in raised.value.allowed
    if model == "sdxl":
        assert "middle (.0 to .9)" in raised.value.allowed


def test_valid_names_in_one_line() -> None:
    assert topology("sd1").describe() == ", ".join(SD1_NAMES)
    assert topology("refiner").describe().startswith("input.4 (.0 to .3), input.5 (.0 to .3)")


def test_what_another_model_lacks_is_left_out() -> None:
    """A refiner that takes over in mid-run has fewer blocks."""
    refiner = topology("refiner")
    both = refiner.resolve_known("output.0-2, middle, input.1, output.3")
    assert [site.name for site in both] == [*tens("middle", last=3), *tens("output.3", last=3)]
    assert refiner.unknown("output.0-2, middle, input.1, output.3,") == ["output.0-2", "input.1"]
    assert refiner.resolve_known("output.0-5") == refiner.resolve("output.3-5"), "of a range what there is"
    assert refiner.resolve_known("middle.2-9") == refiner.resolve("middle.2-3")
    assert refiner.unknown("output.0-5, middle.2-9") == []
    assert refiner.unknown("middle.4-9") == ["middle.4-9"]
    assert topology("refiner").resolve_known("input.1") == ()
    assert topology("refiner").resolve_known("") == ()


@given(st.lists(st.sampled_from(SD1_NAMES), max_size=6))
def test_order_and_repetition_do_not_matter(names: list[str]) -> None:
    sites = topology("sd1").resolve(", ".join(names))
    assert [site.block_name for site in sites] == [name for name in SD1_NAMES if name in names]


@given(st.text(max_size=20) | st.text("dmuinputoutput_blocks.-0123456789, ", max_size=20))
def test_any_text_is_resolved_or_refused(text: str) -> None:
    for model in ("sd1", "sdxl"):
        try:
            topology(model).resolve(text)
        except BlockNameError:
            continue
        check_names(text)  # what a model has is a name


@pytest.mark.parametrize("text", ["", "middle", "input.99", "output.0-40", "d9.99", "up.block_7", "MIDDLE, mid"])
def test_form_alone(text: str) -> None:
    check_names(text)


@pytest.mark.parametrize("text", ["centre", "input", "middle, oops", "input.x", "4"])
def test_bad_form(text: str) -> None:
    with pytest.raises(BlockNameError, match="allowed: middle, input"):
        check_names(text)


def test_blocks_without_self_attention_do_not_count() -> None:
    """Some checkpoints attend to the prompt twice instead."""
    with torch.device("meta"):
        model = UNetModel(**sd15_config())
    block = model.get_submodule("input_blocks.4.1.transformer_blocks.0")
    block.disable_self_attn = True  # type: ignore[assignment]
    with pytest.raises(BlockNameError):
        UNetTopology(model).resolve("input.4")
    assert UNetTopology(model).block_names() == [name for name in SD1_NAMES if name != "input.4"]


@pytest.mark.parametrize("module", [nn.Linear(1, 1), nn.Sequential(), nn.ModuleDict({"input_blocks": nn.ModuleList()})])
def test_no_unet(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=type(module).__name__):
        UNetTopology(module)


@pytest.mark.parametrize(("text", "meant"), [
    ("middel", ["middle"]), ("input4", ["input.4"]), ("input 4", ["input.4"]), ("INPUT_4", ["input.4"]),
    ("4", ["input.4", "output.4"]), ("11", ["output.11"]), ("outptu.3", ["output.3"]), ("cat", []),
    ("999999999999", []), ("", []), ("output.0", ["output.3"]), ("output.99", ["output.11"]), ("input.0", ["input.1"]),
    ("output.2-99", ["output.3-11"]), ("output.0-2", ["output.3"]), ("output.5-3", ["output.3-5"]),
    ("Input.9", ["input.5"]), ("middle.7", ["middle"]), ("joint.3", []),
])
def test_what_may_have_been_meant(text: str, meant: list[str]) -> None:
    names = ["input.1", "input.2", "input.4", "input.5", "middle", *(f"output.{number}" for number in range(3, 12))]
    assert similar_names(text, names)[: len(meant)] == meant
    assert bool(similar_names(text, names)) is bool(meant)
