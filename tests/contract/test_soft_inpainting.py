"""Where a script blends in its own way what is protected, guidance goes through that as the model's prediction goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import Host
from forks import forked
from naive import Naive, Wanted
from torch import Tensor

BOTH = {"sag_scale": 1, "pag_scale": 3}
NMASK = torch.rand(4, 8, 6, generator=torch.Generator().manual_seed(1))
NMASK[:, :, :2] = 0
INIT = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(2))
FIELDS = {"nmask": NMASK, "init_latent": INIT, "batch_size": 2}


class Soft:
    """As the WebUI's own soft inpainting: a mask by the noise level, lengths blended as well as directions."""

    args_from = args_to = 0

    def __init__(self) -> None:
        self.blends = 0

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    process = process_batch = postprocess_batch = postprocess_image = postprocess = nothing

    def on_mask_blend(self, p: Any, mba: Any) -> None:
        self.blends += 1
        t = mba.nmask ** mba.sigma[0].clamp_max(8).sqrt()
        a, b = mba.init_latent, mba.current_latent
        mixed = a * (1 - t) + b * t
        length = (a.norm(dim=1, keepdim=True) ** 2 * (1 - t[:1]) + b.norm(dim=1, keepdim=True) ** 2 * t[:1]).sqrt()
        mba.blended_latent = mixed * length / (mixed.norm(dim=1, keepdim=True) + 1e-5)


class BeforeTheBlend(Naive):
    """Adds guidance to what goes into the blend."""

    def __init__(self, host: Host, wanted: Wanted, soft: Soft) -> None:
        super().__init__(host, wanted)
        self.soft = soft

    def on_mask_blend(self, p: Any, mba: Any) -> None:
        if not mba.denoiser.mask_before_denoising:
            mba.current_latent = mba.current_latent + self.change(mba.current_latent)
        self.soft.on_mask_blend(p, mba)

    def _guide(self, after: Any) -> None:
        if self.params.denoiser.mask_before_denoising:
            after.x = after.x + self.change(after.x)

    def run_all(self, *_: Any, **__: Any) -> None:
        pass


def expected(host: Host, **fields: Any) -> list[Tensor]:
    guidance = BeforeTheBlend(host, Wanted(sag=1.0, pag=3.0), Soft())
    p = host.processing.Processing(**FIELDS, **fields)
    p.scripts = guidance
    with host.without_extension(), guidance.registered():
        latents: list[Tensor] = host.processing.process_images(p).latents
        host.script_callbacks.clear()
    return latents


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_guidance_is_blended_as_the_prediction_is(host: Host, sampler: str, first: bool) -> None:
    fields = {"sampler_name": sampler, "steps": 4}
    host.txt2img.alwayson_scripts.insert(0 if first else len(host.txt2img.alwayson_scripts), Soft())  # type: ignore[arg-type]
    made = host.generate(BOTH, **FIELDS, **fields)
    for actual, wanted in zip(made, expected(host, **fields), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    for actual, plain in zip(made, host.generate({}, **FIELDS, **fields), strict=True):
        assert not torch.allclose(actual, plain, rtol=1e-2)
        if sampler == "Euler":
            assert torch.equal(actual[:, :, :2], plain[:, :, :2])


@pytest.mark.parametrize("mode", ["full", "partial", "snf"])
def test_what_tames_guidance_is_there_too(host: Host, mode: str) -> None:
    """Little of it changes little."""
    host.txt2img.alwayson_scripts.append(Soft())  # type: ignore[arg-type]
    guided = host.generate({"pag_scale": 3}, **FIELDS)[0]
    tamed = host.generate({"pag_scale": 3, "rescale": 1, "rescale_mode": mode}, **FIELDS)[0]
    slightly = host.generate({"pag_scale": 3, "rescale": 1e-6, "rescale_mode": mode}, **FIELDS)[0]
    assert tamed.isfinite().all()
    assert not torch.allclose(tamed, guided, atol=1e-3)
    torch.testing.assert_close(slightly, guided, rtol=1e-3, atol=1e-3)


def test_scripts_hear_of_no_blend_more_that_is_the_masks_own(host: Host) -> None:
    """They are asked once more where one of them has blended in its own way, and in guided steps only."""
    soft = Soft()
    host.txt2img.alwayson_scripts.append(soft)  # type: ignore[arg-type]
    host.generate({}, **FIELDS)
    host.generate({"pag_scale": 3, "pag_end": 0.3}, **FIELDS)
    assert soft.blends == 3 + 3 + 1
    soft.blends = 0

    def counts(p: Any, mba: Any) -> None:
        soft.blends += 1

    soft.on_mask_blend = counts  # type: ignore[method-assign]
    host.generate(BOTH, **FIELDS)
    assert soft.blends == 3


@pytest.mark.parametrize("kind", ["backend", "ldm_patched"])
def test_in_forks(kind: str, host: Host) -> None:
    wanted = expected(host)
    with forked(kind) as fork:
        fork.txt2img.alwayson_scripts.append(Soft())  # type: ignore[arg-type]
        for actual, w in zip(fork.generate(BOTH, **FIELDS), wanted, strict=True):
            torch.testing.assert_close(actual, w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))
