"""The U-Net against the ``ldm`` package's own class, and what that class cannot do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_pag.demo.unet import (
    CrossAttention,
    UNetKwargs,
    UNetModel,
    redraw_,
    sd2_config,
    sd15_config,
    sdxl_config,
)

SD1_LAYOUT = UNetKwargs(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(4, 2, 1),
    context_dim=24,
    num_heads=4,
)
SD2_LAYOUT = UNetKwargs(
    in_channels=9,
    out_channels=4,
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2, 1),
    context_dim=40,
    num_head_channels=32,
    use_linear_in_transformer=True,
)
SDXL_LAYOUT = UNetKwargs(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(4, 2),
    context_dim=48,
    num_head_channels=32,
    transformer_depth=(1, 2, 3),
    use_linear_in_transformer=True,
    num_classes="sequential",
    adm_in_channels=56,
)


def ldm_unet(config: UNetKwargs) -> nn.Module:
    """The real class; its two switches that are always on in Stable Diffusion are set here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    kwargs: dict[str, Any] = dict(config)
    unet: nn.Module = openaimodel.UNetModel(
        image_size=32, use_spatial_transformer=True, legacy=False, use_checkpoint=False, **kwargs
    )
    return unet.eval()


def inputs(config: UNetKwargs, *, height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    values = {
        "x": torch.randn(batch, config["in_channels"], height, width, generator=generator),
        "timesteps": torch.tensor([3.0, 871.25])[:batch],
        "context": torch.randn(batch, 7, config["context_dim"], generator=generator),
    }
    if (adm := config.get("adm_in_channels")) is not None:
        values["y"] = torch.randn(batch, adm, generator=generator)
    return values


@pytest.mark.parametrize("config", [SD1_LAYOUT, SD2_LAYOUT], ids=["sd1", "sd2"])
@torch.no_grad()
def test_same_output_as_ldm_on_the_same_weights(config: UNetKwargs) -> None:
    theirs = ldm_unet(config)
    ours = redraw_(UNetModel(**config), seed=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    batch = inputs(config, height=16, width=24)
    expected, actual = theirs(**batch), ours(**batch)
    assert expected.std() > 0.1
    assert torch.linalg.vector_norm(actual - expected) < 2e-6 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("config", [SD1_LAYOUT, SD2_LAYOUT], ids=["sd1", "sd2"])
@torch.no_grad()
def test_loads_the_weights_of_ldm(config: UNetKwargs) -> None:
    theirs = redraw_(ldm_unet(config), seed=2)
    ours = UNetModel(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = inputs(config, height=8, width=8)
    torch.testing.assert_close(ours(**batch), theirs(**batch), rtol=1e-5, atol=1e-5)


def test_redraw_gives_both_classes_the_same_values() -> None:
    theirs, ours = redraw_(ldm_unet(SD1_LAYOUT), seed=3), redraw_(UNetModel(**SD1_LAYOUT), seed=3)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@torch.no_grad()
def test_redraw_leaves_no_parameter_constant() -> None:
    unet = UNetModel(**SDXL_LAYOUT)
    assert not unet(**inputs(SDXL_LAYOUT, height=8, width=8)).any()
    redraw_(unet, seed=0)
    assert all(parameter.std() > 0.05 * parameter.abs().mean() for parameter in unet.parameters())
    first = unet(**inputs(SDXL_LAYOUT, height=8, width=8))
    redraw_(unet, seed=1)
    assert not torch.allclose(first, unet(**inputs(SDXL_LAYOUT, height=8, width=8)))
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        redraw_(nn.Linear(2, 2), seed=0)


@pytest.mark.parametrize("size", [(13, 10), (9, 31), (6, 5)])
@pytest.mark.parametrize("config", [SD1_LAYOUT, SD2_LAYOUT, SDXL_LAYOUT], ids=["sd1", "sd2", "sdxl"])
@torch.no_grad()
def test_any_height_and_width(config: UNetKwargs, size: tuple[int, int]) -> None:
    unet = redraw_(UNetModel(**config), seed=4)
    out = unet(**inputs(config, height=size[0], width=size[1]))
    assert out.shape == (2, config["out_channels"], *size)
    assert out.isfinite().all()


@torch.no_grad()
def test_sizes_are_mended_as_the_webui_mends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The WebUI replaces ``torch.cat`` in ``ldm``'s U-Net by one that first resizes the features to the skip."""
    theirs = ldm_unet(SD1_LAYOUT)
    ours = redraw_(UNetModel(**SD1_LAYOUT), seed=6)
    theirs.load_state_dict(ours.state_dict())
    cat = torch.cat

    def resizing_cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
        if len(tensors) == 2 and tensors[0].shape[-2:] != tensors[1].shape[-2:]:
            resized = nn.functional.interpolate(tensors[0], tensors[1].shape[-2:], mode="nearest")
            tensors = [resized, tensors[1]]
        return cat(tensors, dim=dim)

    batch = inputs(SD1_LAYOUT, height=11, width=18)
    actual = ours(**batch)
    monkeypatch.setattr(torch, "cat", resizing_cat)
    torch.testing.assert_close(actual, theirs(**batch), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_attention_mask_is_that_of_ldm() -> None:
    attention = pytest.importorskip("ldm.modules.attention")
    ours = redraw_(CrossAttention(16, 24, heads=2, dim_head=8), seed=7)
    theirs = attention.CrossAttention(16, 24, heads=2, dim_head=8)
    theirs.load_state_dict(ours.state_dict())
    x, context = torch.randn(2, 5, 16), torch.randn(2, 6, 24)
    mask = torch.tensor([[True, False, True, True, False, False], [False] * 6])
    torch.testing.assert_close(ours(x, context=context, mask=mask), theirs(x, context=context, mask=mask))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(sd15_config(), 859_520_964), (sd2_config(), 865_910_724), (sdxl_config(), 2_567_463_684)],
    ids=["sd1.5", "sd2", "sdxl"],
)
def test_full_size_models_on_the_meta_device(config: UNetKwargs, parameters: int) -> None:
    with torch.device("meta"):
        unet = UNetModel(**config)
        out = unet(**inputs_on_meta(config))
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert out.shape == (2, 4, 64, 64)


def inputs_on_meta(config: UNetKwargs) -> dict[str, Tensor]:
    values = {"x": torch.empty(2, 4, 64, 64), "timesteps": torch.empty(2)}
    values["context"] = torch.empty(2, 77, config["context_dim"])
    if (adm := config.get("adm_in_channels")) is not None:
        values["y"] = torch.empty(2, adm)
    return values


@torch.no_grad()
def test_half_precision_weights() -> None:
    unet = redraw_(UNetModel(**SD1_LAYOUT), seed=8)
    batch = inputs(SD1_LAYOUT, height=8, width=8)
    expected = unet(**batch)
    half = unet.to(torch.bfloat16)
    actual = half(**{**batch, "context": batch["context"].bfloat16()})
    assert actual.dtype == torch.float32
    assert torch.linalg.vector_norm(actual - expected) < 0.1 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_head_channels": 8}, "either num_heads or num_head_channels"),
        ({"num_heads": -1}, "either num_heads or num_head_channels"),
        ({"transformer_depth": (1, 2)}, "2 entries for 3 levels"),
        ({"num_classes": "sequential"}, "go together"),
    ],
)
def test_contradictory_arguments(change: dict[str, Any], message: str) -> None:
    kwargs: dict[str, Any] = {**SD1_LAYOUT, **change}
    with pytest.raises(ValueError, match=message):
        UNetModel(**kwargs)


@torch.no_grad()
def test_vector_condition_is_demanded_and_used() -> None:
    unet = redraw_(UNetModel(**SDXL_LAYOUT), seed=9)
    batch = inputs(SDXL_LAYOUT, height=8, width=8)
    first = unet(**batch)
    assert not torch.allclose(first, unet(**{**batch, "y": batch["y"] + 1}))
    with pytest.raises(ValueError, match="vector condition"):
        unet(x=batch["x"], timesteps=batch["timesteps"], context=batch["context"])
    names = [f"input_blocks.{n}.1.transformer_blocks" for n in (4, 5, 7, 8)] + ["middle_block.1.transformer_blocks"]
    assert [len(list(unet.get_submodule(name).children())) for name in names] == [2, 2, 3, 3, 3]
