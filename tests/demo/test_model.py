"""Schedule, latents, denoiser and weights file of the demo model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sag_pag.demo import schedule
from sag_pag.demo.autoencoder import Autoencoder
from sag_pag.demo.model import WEIGHTS, DemoModel, load, read_metadata, save, unet_config
from sag_pag.demo.unet import redraw_


def test_schedule_ends_in_noise_and_is_inverted_exactly() -> None:
    alphas = schedule.alphas_cumprod()
    assert alphas.shape == (1000,)
    assert (alphas.diff() < 0).all()
    assert alphas[0] > 0.999
    assert alphas[-1] < 2e-4
    steps = torch.linspace(0, 999, 2001, dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_of(schedule.sigma_of(steps)), steps, rtol=0, atol=1e-6)
    torch.testing.assert_close(((1 - alphas) / alphas).sqrt(), schedule.sigma_of(torch.arange(1000)))
    assert schedule.timestep_of(torch.tensor([0.0, 1e6])).tolist() == [0, 999]


@torch.no_grad()
def test_autoencoder_takes_other_sizes() -> None:
    autoencoder = Autoencoder()
    latent = autoencoder.encode(torch.rand(1, 3, 24, 40))
    assert latent.shape == (1, 8, 6, 10)
    assert autoencoder.decode(latent).shape == (1, 3, 24, 40)


@torch.no_grad()
def test_denoiser_is_the_one_of_v_prediction() -> None:
    """The denoiser's x0, noise and v are one and the same prediction."""
    model = redraw_(DemoModel().double(), seed=1)
    assert isinstance(model, DemoModel)
    latent, noise = torch.randn(2, 8, 16, 16).double(), torch.randn(2, 8, 16, 16).double()
    timesteps = torch.tensor([40.0, 930.0])
    sigma = schedule.sigma_of(timesteps)
    context = model.context(["red star", ""])
    x = latent + sigma[:, None, None, None] * noise
    x0 = model.denoise(x, sigma, cond=context)
    angle = schedule.angle_of(timesteps)[:, None, None, None]
    z = angle.cos() * latent + angle.sin() * noise
    v = model.unet(z, timesteps.double(), context)
    torch.testing.assert_close(x0, angle.cos() * z - angle.sin() * v, rtol=1e-5, atol=1e-5)


def test_weights_file_round_trip(tmp_path: Path) -> None:
    model = redraw_(DemoModel(), seed=2)
    assert isinstance(model, DemoModel)
    save(model, tmp_path / "weights.safetensors", metadata={"note": "x"})
    again = load(tmp_path / "weights.safetensors")
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=name)
    assert read_metadata(tmp_path / "weights.safetensors")["note"] == "x"
    assert not any(parameter.requires_grad for parameter in again.parameters())


@torch.no_grad()
def test_shipped_weights_run_in_the_real_ldm_class() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        openaimodel = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    model = load()
    theirs = openaimodel.UNetModel(
        image_size=32, use_spatial_transformer=True, legacy=False, use_checkpoint=False, **unet_config()
    ).eval()
    theirs.load_state_dict(model.unet.state_dict(), strict=True)
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    timesteps, context = torch.tensor([10.0, 990.0]), model.context(["red star on green", ""])
    expected = theirs(x, timesteps, context=context)
    actual = model.unet(x, timesteps, context)
    assert torch.linalg.vector_norm(actual - expected) < 2e-6 * torch.linalg.vector_norm(expected)


def test_shipped_weights_are_small_and_say_how_they_were_made() -> None:
    assert WEIGHTS.stat().st_size <= 8_000_000
    assert {value.dtype for value in load_file(WEIGHTS).values()} == {torch.float16}
    metadata = read_metadata()
    assert '"seed"' in metadata["training"]
    assert float(metadata["held_out_loss"]) < 0.5
