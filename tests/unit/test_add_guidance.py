"""Adding guidance and taming it, against numpy in float64."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage, special
from torch import Tensor

from sag_pag.guidance import add_guidance, fuse_by_saliency, image_std

MODES = ("full", "partial", "snf")
Mode = Literal["full", "partial", "snf"]


def case(*, shape: tuple[int, ...] = (2, 4, 9, 7), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, scale in (("combined", 1.3), ("delta", 0.8), ("cond", 1.0), ("uncond", 0.9))
    }


def spread(image: np.ndarray, weight: np.ndarray) -> float:
    """Standard deviation of one image, its pixels counted by their weight."""
    mean = np.average(image, weights=weight)
    return float(np.sqrt(np.average((image - mean) ** 2, weights=weight)))


def saliency(image: np.ndarray) -> np.ndarray:
    """arXiv 2311.10329 with a 3 x 3 kernel of sigma 1."""
    blurred = ndimage.gaussian_filter(np.abs(image), 1.0, axes=(1, 2), mode="mirror", radius=1)
    return special.softmax(blurred.reshape(len(image), -1), axis=-1).reshape(image.shape)


def expected_result(values: dict[str, Tensor], *, rescale: float, mode: Mode, weight: Tensor | None) -> np.ndarray:
    combined, delta, cond, uncond = (values[name].numpy() for name in ("combined", "delta", "cond", "uncond"))
    weights = np.broadcast_to(np.ones(()) if weight is None else weight.double().numpy(), combined.shape)
    result = np.empty_like(combined)
    for i, w in enumerate(weights):
        if mode == "snf":
            own = combined[i] - uncond[i]
            stronger = np.where(saliency(own) >= saliency(delta[i]), own, delta[i])
            change = (1 - rescale) * delta[i] + rescale * (uncond[i] + stronger - combined[i])
        else:
            guided = (combined if mode == "full" else cond)[i] + delta[i]
            factor = spread(cond[i], w) / spread(guided, w)
            change = delta[i] * (1 - rescale + rescale * factor)
        result[i] = combined[i] + w * change
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_reference(mode: Mode, rescale: float) -> None:
    values = case()
    result = add_guidance(**values, rescale=rescale, mode=mode)
    expected = expected_result(values, rescale=rescale, mode=mode, weight=None)
    if rescale == 0:
        np.testing.assert_allclose(result, values["combined"] + values["delta"], rtol=0, atol=1e-12)
    else:
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_reference_with_an_inpainting_weight(mode: Mode, kind: str) -> None:
    """What is protected neither changes nor counts; the host's mask has no batch dimension."""
    values = case()
    generator = torch.Generator().manual_seed(5)
    weight = torch.rand(4, 9, 7, generator=generator, dtype=torch.float64)
    weight = weight.round() if kind == "hard" else torch.where(weight < 0.3, 0, weight)
    result = add_guidance(**values, rescale=0.7, mode=mode, weight=weight)
    expected = expected_result(values, rescale=0.7, mode=mode, weight=weight)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)
    protected = weight.expand_as(result) == 0
    assert torch.equal(result[protected], values["combined"][protected])


def test_fusion_sees_only_what_may_change() -> None:
    """In an inpainted picture the host's result differs from the prediction by the blend, where it is protected.

    That difference is no guidance; it may not decide which guidance wins elsewhere.
    """
    values = case()
    weight = torch.zeros(4, 9, 7, dtype=torch.float64)
    weight[:, :, 3:] = 1
    blended = {**values, "combined": torch.where(weight > 0, values["combined"], values["combined"] + 40)}
    open_area = weight.expand_as(values["combined"]) > 0
    plain = add_guidance(**values, rescale=1.0, mode="snf", weight=weight)
    fused = add_guidance(**blended, rescale=1.0, mode="snf", weight=weight)
    assert torch.equal(plain[open_area], fused[open_area])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", [16, 128, 192])
def test_weight_in_half_precision(dtype: torch.dtype, side: int) -> None:
    """The host's mask has the model's precision; a picture of 1024 pixels has 65,536 elements to sum up."""
    values = {name: value.float() for name, value in case(shape=(1, 4, side, side)).items()}
    weight = torch.ones(4, side, side, dtype=dtype)
    for mode in ("full", "partial"):
        with_mask = add_guidance(**values, rescale=0.5, mode=mode, weight=weight)
        torch.testing.assert_close(with_mask, add_guidance(**values, rescale=0.5, mode=mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weight_zero_is_bit_identical(mode: Mode, dtype: torch.dtype) -> None:
    values = {name: value.to(dtype) for name, value in case().items()}
    values["combined"][0, 0, 0, 0] = -0.0
    result = add_guidance(**values, rescale=0.5, mode=mode, weight=torch.zeros(4, 9, 7))
    assert result.dtype == dtype
    assert torch.equal(torch.signbit(result), torch.signbit(values["combined"]))
    assert torch.equal(result, values["combined"])


@given(rescale=st.floats(0, 1), mode=st.sampled_from(["full", "partial"]), seed=st.integers(0, 50))
def test_no_delta_no_change(rescale: float, mode: Mode, seed: int) -> None:
    values = case(seed=seed)
    values["delta"] = torch.zeros_like(values["delta"])
    assert torch.equal(add_guidance(**values, rescale=rescale, mode=mode), values["combined"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(mode: Mode, dtype: torch.dtype) -> None:
    values = {name: value.to(dtype) for name, value in case(shape=(2, 4, 32, 32)).items()}
    result = add_guidance(**values, rescale=0.6, mode=mode)
    exact = add_guidance(**{name: value.double() for name, value in values.items()}, rescale=0.6, mode=mode)
    assert result.dtype == dtype
    assert result.isfinite().all()
    close = (result.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs().clamp_min(1)
    assert close.double().mean() > (0.99 if mode == "snf" else 0.9999)  # a tie may fall to the other side


@pytest.mark.parametrize("mode", MODES)
def test_autocast_makes_no_difference(mode: Mode) -> None:
    values = {name: value.float() for name, value in case().items()}
    arguments: dict[str, Any] = {"rescale": 0.4, "mode": mode, "weight": torch.rand(4, 9, 7)}
    plain = add_guidance(**values, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(add_guidance(**values, **arguments), plain)


def test_images_are_tamed_one_by_one() -> None:
    values = case()
    both = add_guidance(**values, rescale=1.0, mode="full")
    values["delta"][1] *= 9
    assert torch.equal(add_guidance(**values, rescale=1.0, mode="full")[0], both[0])


def test_full_rescale_gives_back_the_spread_of_cond_to_the_scaled_result() -> None:
    values = case()
    values["combined"] = torch.zeros_like(values["combined"])
    result = add_guidance(**values, rescale=1.0, mode="full")
    torch.testing.assert_close(image_std(result), image_std(values["cond"]))


def test_flat_predictions_do_not_become_nan() -> None:
    flat = torch.ones(1, 4, 8, 8)
    for mode in MODES:
        result = add_guidance(flat, -flat, cond=flat, uncond=flat, rescale=1.0, mode=mode)
        assert result.isfinite().all()


def test_fusion_without_an_unconditional_prediction_adds_the_guidance() -> None:
    values = {**case(), "uncond": None}
    result = add_guidance(**values, rescale=1.0, mode="snf")  # type: ignore[arg-type]
    torch.testing.assert_close(result, values["combined"] + values["delta"])


def test_fusion_takes_each_place_from_one_of_the_two() -> None:
    first, second = case()["combined"], case()["delta"]
    fused = fuse_by_saliency(first, second)
    expected = [
        np.where(saliency(a) >= saliency(b), a, b) for a, b in zip(first.numpy(), second.numpy(), strict=True)
    ]
    assert np.array_equal(fused.numpy(), np.stack(expected))
    assert (fused == first).any()
    assert (fused == second).any()


def test_image_std_with_weight_one_is_the_plain_one_but_for_bessel() -> None:
    x = case()["combined"]
    count = x[0].numel()
    weighted = image_std(x, weight=torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(weighted, image_std(x) * ((count - 1) / count) ** 0.5)
