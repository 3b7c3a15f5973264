"""One sampling step on a U-Net of random weights, to be counted or timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sag_pag.demo.unet import UNetKwargs, UNetModel, redraw_, sd2_config, sd15_config, sdxl_config
from sag_pag.engine.calls import APART, JOINED
from sag_pag.engine.plan import plan_at
from sag_pag.engine.rows import StepRows
from sag_pag.engine.spaces import SigmaSpace
from sag_pag.engine.step import GuidedStep
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

CONFIGS: dict[str, Callable[[], UNetKwargs]] = {"sd1": sd15_config, "sd2": sd2_config, "sdxl": sdxl_config}
LATENTS = {"sd1": 64, "sd2": 64, "sdxl": 128}
CFG_SCALE, SIGMA, TIMESTEP, TOKENS = 7.5, 3.0, 500.0, 77


@dataclass(frozen=True)
class Method:
    """What a step does besides CFG, and whether PAG's extra rows are a call of their own."""

    settings: Settings = Settings()  # noqa: RUF009 - a frozen value
    own_call: bool = False


METHODS = {
    "CFG": Method(),
    "PAG": Method(Settings(pag_enabled=True)),
    "PAG, own call": Method(Settings(pag_enabled=True), own_call=True),
    "SAG": Method(Settings(sag_enabled=True)),
    "SAG and PAG": Method(Settings(sag_enabled=True, pag_enabled=True)),
}


def step_config(layout: str, *, small: bool = False) -> tuple[UNetKwargs, int]:
    """The U-Net's arguments and the latent's side; ``small`` is a fifth of the width and half the side."""
    config = CONFIGS[layout]()
    if not small:
        return config, LATENTS[layout]
    config["model_channels"] = 64
    return config, LATENTS[layout] // 2


def random_unet(config: UNetKwargs, *, device: str, dtype: torch.dtype) -> UNetModel:
    """A U-Net with every parameter drawn at random."""
    with torch.device("meta"):
        unet = UNetModel(**config)
    unet = unet.to(dtype).to_empty(device=device)
    redraw_(unet, seed=0)
    return unet.eval().requires_grad_(False)


class Step:
    """One sampling step of ``batch`` images, two rows each: a U-Net and what it is given."""

    def __init__(self, unet: UNetModel, config: UNetKwargs, *, latent: int, batch: int = 1) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=unet.dtype)

        self.device = next(unet.parameters()).device
        self.unet, self.batch = unet, batch
        self.x = normal(batch, 4, latent, latent)
        self.cond = {"crossattn": normal(2 * batch, TOKENS, config["context_dim"])}
        vector = config.get("adm_in_channels")
        if vector is not None:
            self.cond["vector"] = normal(2 * batch, vector)

    def denoise(self, x: Tensor, sigma: Tensor, *, cond: dict[str, Tensor]) -> Tensor:
        """x0 by a U-Net that predicts eps."""
        s = sigma[:, None, None, None]
        timestep = torch.full_like(sigma, TIMESTEP)
        eps: Tensor = self.unet(x / (s * s + 1).sqrt(), timestep, cond["crossattn"], cond.get("vector"))
        return x - s * eps

    def run(self, method: Method, *, progress: float = 0.5) -> Tensor:
        """The step's guided x0, ``(batch, 4, latent, latent)``."""
        topology = UNetTopology(self.unet)
        plan = plan_at(method.settings, topology, progress=progress)
        x = torch.cat([self.x, self.x])
        sigma = torch.full((len(x),), SIGMA, device=x.device, dtype=x.dtype)
        if plan is None:
            return _cfg(self.denoise(x, sigma, cond=self.cond))
        rows = StepRows.plain(self.batch)
        step = GuidedStep(
            plan, topology=topology, rows=rows, space=SigmaSpace(), manner=APART if method.own_call else JOINED
        )
        out = step(self.denoise, x, sigma, cond=self.cond, rows=rows.rows)
        step.finish()
        return step.apply(_cfg(out))


def _cfg(out: Tensor) -> Tensor:
    cond, uncond = out.chunk(2)
    return uncond + CFG_SCALE * (cond - uncond)


def step_flops(
    config: UNetKwargs, methods: Mapping[str, Method], *, latent: int, batch: int = 1, progress: float = 0.5,
) -> dict[str, int]:
    """For each method the floating-point operations of one step: matrix products and convolutions, a multiply-add
    being two.

    Counted on tensors without data, so it takes no memory, and seconds for any model.
    """
    counts = {}
    # the counter does not know the processor's fused attention
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        step = Step(UNetModel(**config), config, latent=latent, batch=batch)
        for name, method in methods.items():
            with FlopCounterMode(display=False) as counter:
                step.run(method, progress=progress)
            counts[name] = int(counter.get_total_flops())
    return counts
