"""Mask, blur and degraded picture against numpy and scipy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from sag_pag import guidance

SIZES = st.integers(2, 24)
SIGMAS = st.floats(0.01, 10.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blurred_by_scipy(x: Tensor, sigma: float) -> np.ndarray:
    """Two passes of a truncated, renormalised Gaussian; scipy's ``mirror`` is torch's ``reflect``."""
    result = x.numpy()
    for axis in (2, 3):
        radius = min(max(4, math.ceil(3 * sigma)), x.shape[axis] - 1)
        offsets = np.arange(-radius, radius + 1)
        weights = np.exp(-(offsets**2) / (2 * sigma**2))
        result = ndimage.correlate1d(result, weights / weights.sum(), axis=axis, mode="mirror")
    return result


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.34])
def test_blur_is_scipys_gaussian_filter(sigma: float) -> None:
    x = noise(2, 4, 17, 24)
    radius = max(4, math.ceil(3 * sigma))
    expected = ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="mirror", radius=radius)
    np.testing.assert_allclose(guidance.blur(x, sigma=sigma).numpy(), expected, rtol=0, atol=1e-12)


@given(height=SIZES, width=SIZES, sigma=SIGMAS)
def test_blur_of_any_size(height: int, width: int, sigma: float) -> None:
    x = noise(1, 3, height, width)
    blurred = guidance.blur(x, sigma=sigma)
    np.testing.assert_allclose(blurred.numpy(), blurred_by_scipy(x, sigma), rtol=0, atol=1e-12)


@given(height=st.integers(1, 24), width=st.integers(1, 24), sigma=SIGMAS, value=st.floats(-1e3, 1e3, width=32))
def test_blur_keeps_constants(height: int, width: int, sigma: float, value: float) -> None:
    x = torch.full((1, 4, height, width), value)
    torch.testing.assert_close(guidance.blur(x, sigma=sigma), x, rtol=1e-5, atol=1e-6)


@given(height=SIZES, width=SIZES, sigma=SIGMAS)
def test_blur_never_goes_beyond_the_values_there_are(height: int, width: int, sigma: float) -> None:
    x = noise(1, 2, height, width)
    blurred = guidance.blur(x, sigma=sigma)
    assert blurred.amax() <= x.amax() + 1e-12
    assert blurred.amin() >= x.amin() - 1e-12


def test_blur_of_sigma_zero_changes_nothing() -> None:
    x = noise(1, 4, 8, 8)
    assert torch.equal(guidance.blur(x, sigma=0.0), x)


@pytest.mark.parametrize("sigma", [1e-3, 1e-20, 1e-44, 1e-60, 5e-324])
def test_blur_of_next_to_nothing_changes_nothing(sigma: float) -> None:
    x = noise(1, 4, 8, 8).float()
    assert torch.equal(guidance.blur(x, sigma=sigma), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blur_in_half_precision(dtype: torch.dtype) -> None:
    x = (noise(2, 4, 13, 9) * 1000).to(dtype)
    x[0, 0, 0, 0] = torch.finfo(dtype).max
    blurred = guidance.blur(x, sigma=1.0)
    assert blurred.dtype == dtype
    assert blurred.isfinite().all()
    expected = torch.from_numpy(blurred_by_scipy(x.double(), 1.0))
    torch.testing.assert_close(blurred.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_makes_no_difference(dtype: torch.dtype) -> None:
    x = noise(1, 4, 12, 10).to(dtype)
    received = torch.rand(1, 30, generator=torch.Generator().manual_seed(1)) * 2

    def results() -> tuple[Tensor, Tensor, Tensor]:
        mask = guidance.attention_mask(received, size=(6, 5), threshold=1.0, latent_size=(12, 10))
        return mask, guidance.blur(x, sigma=1.0), guidance.degrade(x, mask, sigma=1.0)

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = results()
    for expected, actual in zip(plain, under_autocast, strict=True):
        assert expected.dtype == actual.dtype
        assert torch.equal(expected, actual)


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), scale=st.integers(1, 8), cut=st.integers(0, 7),
    threshold=st.floats(0, 3), seed=st.integers(0, 99),
)
def test_mask(height: int, width: int, scale: int, cut: int, threshold: float, seed: int) -> None:
    """Latents need not be a multiple of the feature map: each latent pixel takes the token at its place."""
    cut = min(cut, scale - 1)
    latent = (height * scale - cut, width * scale - cut)
    received = torch.rand(2, height * width, generator=torch.Generator().manual_seed(seed)) * 2
    mask = guidance.attention_mask(received, size=(height, width), threshold=threshold, latent_size=latent)
    assert mask.shape == (2, 1, *latent)
    tokens = received.numpy().reshape(2, height, width)
    for image, row, column in np.ndindex(2, *latent):
        token = tokens[image, row * height // latent[0], column * width // latent[1]]
        assert mask[image, 0, row, column] == float(token > np.float32(threshold))


def test_what_gets_as_much_as_the_threshold_is_not_in_the_mask() -> None:
    mask = guidance.attention_mask(torch.ones(1, 6), size=(2, 3), threshold=1.0, latent_size=(4, 6))
    assert not mask.any()


def test_mask_wants_the_tokens_to_fill_the_map() -> None:
    with pytest.raises(ValueError, match="11 tokens do not fill a feature map of 3 x 4"):
        guidance.attention_mask(torch.ones(1, 11), size=(3, 4), threshold=1.0, latent_size=(12, 16))


def test_a_wide_map_is_not_taken_for_a_tall_one() -> None:
    received = torch.zeros(1, 8)
    received[0, 7] = 2  # the last token: bottom right
    mask = guidance.attention_mask(received, size=(2, 4), threshold=1.0, latent_size=(4, 8))
    assert mask[0, 0].nonzero().tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]


def test_degrading_blurs_where_the_mask_is() -> None:
    x = noise(2, 4, 10, 14)
    mask = (noise(2, 1, 10, 14, seed=1) > 0).double()
    degraded = guidance.degrade(x, mask, sigma=1.0).numpy()
    inside = np.broadcast_to(mask.numpy() > 0, x.shape)
    np.testing.assert_allclose(degraded[inside], blurred_by_scipy(x, 1.0)[inside], rtol=0, atol=1e-12)
    assert np.array_equal(degraded[~inside], x.numpy()[~inside])


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu", "meta"])
def test_full_precision_on_any_device(kind: str) -> None:
    """Also where torch knows no autocast of the device, and says so with an exception."""
    with guidance.without_autocast(torch.device(kind)):
        pass


def test_full_precision() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), guidance.without_autocast(x.device):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("size", [(8, 6), (3, 12), (1, 5)])
def test_circular_blur_has_no_edge(size: tuple[int, int], sigma: float) -> None:
    """Rolled before or after is the same, and it is the blur of a picture that is laid out again and again."""
    x = torch.randn(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = guidance.blur(x, sigma=sigma, circular=True)
    rolled = guidance.blur(x.roll((2, 3), (2, 3)), sigma=sigma, circular=True)
    torch.testing.assert_close(rolled, made.roll((2, 3), (2, 3)))
    assert made.mean() == pytest.approx(x.mean())
    if min(size) > max(4, math.ceil(3 * sigma)):
        whole = guidance.blur(x.repeat(1, 1, 3, 3), sigma=sigma)
        torch.testing.assert_close(made, whole[..., size[0] : 2 * size[0], size[1] : 2 * size[1]])


@pytest.mark.parametrize("device", ["privateuseone", "meta", "cpu"])
def test_devices_without_autocast(device: str) -> None:
    """DirectML calls itself available from torch 2.4 on and then refuses to be asked."""
    with guidance.without_autocast(torch.device(device)):
        assert not torch.is_autocast_enabled("cpu")
