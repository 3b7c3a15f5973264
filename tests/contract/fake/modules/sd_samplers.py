"""The CFG denoiser with the host's order of events, and three short samplers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from modules import prompt_parser, script_callbacks, scripts, shared
from modules.sd_models import SigmaDenoiser, TimestepDenoiser


class InterruptedException(BaseException):
    pass


def length(cond: Any) -> int:
    return int(cond.shape[1])


def cut(cond: Any, start: int, end: int) -> Any:
    return {key: value[start:end] for key, value in cond.items()} if isinstance(cond, dict) else cond[start:end]


def join(conds: list[Any]) -> Any:
    if isinstance(conds[0], dict):
        return {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
    return torch.cat(conds)


class CFGDenoiser(nn.Module):
    make_inner: Callable[[Any], nn.Module]
    knows_cfgpp = True  # versions before 1.10 do not

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.sampler = sampler
        self.p: Any = None
        self.model_wrap: nn.Module | None = None
        self.mask: Tensor | None = None
        self.nmask: Tensor | None = None
        self.init_latent: Tensor | None = None
        self.image_cfg_scale: float | None = None
        if self.knows_cfgpp:
            self.cond_scale_miltiplier = 1.0  # spelled so
        self.mask_before_denoising = False
        self.step = 0
        self.total_steps = 1

    @property
    def inner_model(self) -> nn.Module:
        if self.model_wrap is None:
            self.model_wrap = type(self).make_inner(shared.sd_model)
        return self.model_wrap

    def progress(self, sigma: Tensor) -> float:
        raise NotImplementedError

    def _switch_to_refiner(self, sigma: Tensor) -> None:
        refiner = self.p.refiner
        if refiner is None or shared.sd_model is refiner or self.progress(sigma) < self.p.refiner_switch_at:
            return
        shared.sd_model = refiner
        self.p.setup_conds()
        self.model_wrap = None
        self.sampler.sampler_extra_args.update(cond=self.p.c, uncond=self.p.uc)

    def _blend(self, latent: Tensor, sigma: Tensor) -> Tensor:
        assert self.nmask is not None
        assert self.mask is not None
        blended: Tensor = latent * self.nmask + self.init_latent * self.mask
        if self.p.scripts is not None:
            given = (latent, self.nmask, self.init_latent, self.mask, blended)
            mba = scripts.MaskBlendArgs(*given, denoiser=self, sigma=sigma)
            self.p.scripts.on_mask_blend(self.p, mba)
            blended = mba.blended_latent
        return blended

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float,
        image_cond: Tensor,
    ) -> Tensor:
        if shared.state.interrupted:
            raise InterruptedException
        self._switch_to_refiner(sigma)
        cond, uncond = self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"]
        is_edit = shared.sd_model.cond_stage_key == "edit" and self.image_cfg_scale not in (None, 1.0)
        layout, tensor = prompt_parser.reconstruct(cond)
        uncond = prompt_parser.stack(uncond)
        images = len(layout)
        if self.mask_before_denoising and self.mask is not None:
            x = self._blend(x, sigma)

        image_of_row = [image for image, parts in enumerate(layout) for _ in parts]
        again = 2 if is_edit else 1
        x_in = torch.cat([x[image_of_row], *[x] * again])
        sigma_in = torch.cat([sigma[image_of_row], *[sigma] * again])
        image_in = torch.cat([image_cond[image_of_row], image_cond, *[torch.zeros_like(image_cond)] * (again - 1)])
        params = script_callbacks.CFGDenoiserParams(
            x_in, image_in, sigma_in, shared.state.sampling_step, shared.state.sampling_steps, tensor, uncond, self
        )
        script_callbacks.run("cfg_denoiser", params)
        x_in, image_in, sigma_in = params.x, params.image_cond, params.sigma
        tensor, uncond = params.text_cond, params.text_uncond

        early = shared.opts.skip_early_cond
        skip_uncond = bool(early) and self.step / self.total_steps <= early
        if (self.step % 2 or shared.opts.s_min_uncond_all) and bool(sigma[0] < s_min_uncond) and not is_edit:
            skip_uncond = True
        if skip_uncond:
            x_in, sigma_in = x_in[:-images], sigma_in[:-images]  # but not the image conditions
        x_out = self._predict(x_in, sigma_in, image_in, tensor, uncond, skip=skip_uncond, is_edit=is_edit)
        if skip_uncond:
            x_out = torch.cat([x_out, *(x_out[parts[0][0]][None] for parts in layout)])

        denoised_params = script_callbacks.CFGDenoisedParams(
            x_out, shared.state.sampling_step, shared.state.sampling_steps, self.inner_model
        )
        script_callbacks.run("cfg_denoised", denoised_params)

        scale = cond_scale * (self.cond_scale_miltiplier if self.knows_cfgpp else 1.0)
        if is_edit:
            first, middle, last = x_out.chunk(3)
            denoised = last + scale * (first - middle) + self.image_cfg_scale * (middle - last)
        else:
            base = x_out[-images:]
            denoised = base.clone()
            for image, parts in enumerate(layout):
                for row, weight in parts:
                    denoised[image] += weight * (1.0 if skip_uncond else scale) * (x_out[row] - base[image])
        if not self.mask_before_denoising and self.mask is not None:
            denoised = self._blend(denoised, sigma)

        after = script_callbacks.AfterCFGCallbackParams(
            denoised, shared.state.sampling_step, shared.state.sampling_steps
        )
        script_callbacks.run("cfg_after_cfg", after)
        self.step += 1
        result: Tensor = after.x
        return result

    def _predict(
        self, x: Tensor, sigma: Tensor, image: Tensor, tensor: Any, uncond: Any, *, skip: bool, is_edit: bool
    ) -> Tensor:
        def call(start: int, end: int, text: Any, images: Tensor) -> Tensor:
            cond = {**text} if isinstance(text, dict) else {"c_crossattn": [text]}
            out: Tensor = self.inner_model(x[start:end], sigma[start:end], cond={**cond, "c_concat": [images]})
            return out

        rows, images = len(x), len(uncond["crossattn"] if isinstance(uncond, dict) else uncond)
        x_out = torch.zeros_like(x)
        if skip or length(tensor) == length(uncond):
            text = tensor if skip else join([tensor, uncond, uncond] if is_edit else [tensor, uncond])
            if shared.opts.batch_cond_uncond:
                return call(0, rows, text, image)
            for start in range(0, rows, images):
                end = start + images
                x_out[start:end] = call(start, end, cut(text, start, end), image[start:end])
            return x_out
        conds = rows - images
        size = images * (2 if shared.opts.batch_cond_uncond else 1)
        for start in range(0, conds, size):
            end = min(start + size, conds)
            x_out[start:end] = call(start, end, cut(tensor, start, end), image[start:end])
        x_out[-images:] = call(conds, rows, uncond, image[conds:])
        return x_out


class CFGDenoiserKDiffusion(CFGDenoiser):
    make_inner = SigmaDenoiser

    def progress(self, sigma: Tensor) -> float:
        inner: Any = self.inner_model
        return (999 - int((inner.sigmas - sigma.max()).abs().argmin())) / 1000


class CFGDenoiserTimesteps(CFGDenoiser):
    make_inner = TimestepDenoiser

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler)
        self.alphas = shared.sd_model.alphas_cumprod
        self.mask_before_denoising = True

    def progress(self, sigma: Tensor) -> float:
        return (999 - int(sigma.max())) / 1000


class Sampler:
    """One of ``Euler``, ``DPM2``, ``DDIM``, ``DDIM CFG++``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = SimpleNamespace(options={"second_order": True} if name == "DPM2" else {})
        self.has_sigmas = name in ("Euler", "DPM2")
        self.model_wrap_cfg = CFGDenoiserKDiffusion(self) if self.has_sigmas else CFGDenoiserTimesteps(self)
        self.sampler_extra_args: dict[str, Any] = {}

    def sample(self, p: Any, noise: Tensor, *, steps: int, callback: Callable[[int], None]) -> Tensor:
        denoiser = self.model_wrap_cfg
        denoiser.p, denoiser.step, denoiser.total_steps = p, 0, steps
        denoiser.mask, denoiser.nmask, denoiser.init_latent = p.mask, p.nmask, p.init_latent
        denoiser.image_cfg_scale = p.image_cfg_scale
        if self.name == "DDIM CFG++":
            denoiser.cond_scale_miltiplier = 1 / 12.5
        self.sampler_extra_args = {
            "cond": p.c, "uncond": p.uc, "cond_scale": p.cfg_scale, "s_min_uncond": p.s_min_uncond,
            "image_cond": p.image_conditioning(),
        }
        shared.state.sampling_steps = steps
        self.last_latent = noise
        timesteps = torch.linspace(980, 20, steps).round()
        alphas = shared.sd_model.alphas_cumprod[timesteps.long()]
        integrate = self._euler if self.has_sigmas else self._ddim
        try:
            return integrate(noise, timesteps, alphas, callback)
        except InterruptedException:
            return self.last_latent

    def _euler(self, noise: Tensor, _: Tensor, alphas: Tensor, callback: Callable[[int], None]) -> Tensor:
        sigmas = torch.cat([((1 - alphas) / alphas).sqrt(), torch.zeros(1)])
        x = noise * sigmas[0]
        for i in range(len(alphas)):
            x0 = self.model_wrap_cfg(x, sigmas[i].repeat(len(x)), **self.sampler_extra_args)
            if self.name == "DPM2" and sigmas[i + 1] > 0:  # the step is what is predicted in its middle
                between = (sigmas[i] * sigmas[i + 1]).sqrt()
                middle = x0 + (x - x0) * between / sigmas[i]
                x0 = self.model_wrap_cfg(middle, between.repeat(len(x)), **self.sampler_extra_args)
                x = x + (middle - x0) / between * (sigmas[i + 1] - sigmas[i])
            else:
                x = x0 + (x - x0) * sigmas[i + 1] / sigmas[i]
            self.last_latent = x
            callback(i)
        return x

    def _ddim(self, noise: Tensor, timesteps: Tensor, alphas: Tensor, callback: Callable[[int], None]) -> Tensor:
        x, after = noise, torch.cat([alphas[1:], torch.ones(1)])
        for i, a in enumerate(alphas):
            eps = self.model_wrap_cfg(x, timesteps[i].repeat(len(x)), **self.sampler_extra_args)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            x = after[i].sqrt() * x0 + (1 - after[i]).sqrt() * eps
            self.last_latent = x
            callback(i)
        return x
