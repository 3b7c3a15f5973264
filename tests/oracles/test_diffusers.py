"""The engine against diffusers' own PAG and SAG pipelines on the same weights, step by step at the same latents.

In float32 with everything as it comes, to 1e-4; and in float64, where an error in the formulas could not hide in
rounding, to 1e-10. For that the pipelines get what they compute in float32 at their edges: the alphas, the time
embedding, and the blur's kernel (by torch's default type).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers_side import (
    Kind,
    Layout,
    Pipeline,
    Recorded,
    UNetModel,
    largest_error,
    our_noise,
    our_unet,
    pipeline,
    prompts,
    record,
    their_unet,
)
from torch import Tensor, nn

from sag_pag.demo.layers import CrossAttention, fused_forward
from sag_pag.engine.blocks import BlockNameError
from sag_pag.engine.plan import StepPlan, plan_at
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

pytest.importorskip("diffusers", reason="diffusers is not installed: its pipelines are NOT compared with the engine")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
precisions = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
cfg = pytest.mark.parametrize("cfg_scale", [7.5, 1.0], ids=["CFG", "no CFG"])


@pytest.fixture(autouse=True)
def _inference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("dtype") == torch.float64:
        torch.set_default_dtype(torch.float64)
        monkeypatch.setattr(CrossAttention, "forward", fused_forward)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)


def progress(timestep: int) -> float:
    return (999 - timestep) / 1000


def plan_for(settings: Settings, unet: UNetModel, at: float) -> StepPlan:
    plan = plan_at(settings, UNetTopology(unet), progress=at)
    assert plan is not None
    return plan


class Comparison:
    """One pipeline and one U-Net with the same weights."""

    def __init__(
        self, kind: Kind, layout: Layout, *, dtype: torch.dtype, cfg_scale: float, size: tuple[int, int] = (16, 24),
        images: int = 2, layers: list[str] | None = None,
    ) -> None:
        self.unet = our_unet(layout, dtype=dtype)
        options = {"pag_applied_layers": layers} if layers else {}
        self.pipe: Pipeline = pipeline(kind, layout, dtype=dtype, **options)
        self.prompts = prompts(layout, images=images, size=size, dtype=dtype)
        self.cfg_scale, self.dtype = cfg_scale, dtype
        self.latents = torch.randn(images, 4, *size, generator=torch.Generator().manual_seed(2)).to(dtype)

    def theirs(self, *, steps: int = STEPS, **arguments: float) -> list[Recorded]:
        height, width = (8 * n for n in self.latents.shape[-2:])
        return record(
            self.pipe, num_inference_steps=steps, guidance_scale=self.cfg_scale, latents=self.latents.clone(),
            height=height, width=width, **self.prompts.for_diffusers, **arguments,
        )

    def error(self, recorded: list[Recorded], plans: list[StepPlan]) -> float:
        ours = [
            our_noise(
                self.unet, given, plan, prompts=self.prompts, cfg_scale=self.cfg_scale,
                alphas=self.pipe.scheduler.alphas_cumprod,
            )
            for given, plan in zip(recorded, plans, strict=True)
        ]
        return largest_error(ours, [given.noise for given in recorded])

    def check(self, recorded: list[Recorded], settings: Settings) -> None:
        plans = [plan_for(settings, self.unet, progress(given.timestep)) for given in recorded]
        error = self.error(recorded, plans)
        assert error < TOLERANCE[self.dtype]
        other = [replace(plan, sag_scale=plan.sag_scale * 1.1, pag_scale=plan.pag_scale * 1.1) for plan in plans]
        assert self.error(recorded, other) > 10 * TOLERANCE[self.dtype], "the guidance is too weak to be compared"


PAG_LAYERS = [
    pytest.param("sd1", ["mid"], "mid", id="SD1-mid"),
    pytest.param("sd1", ["down_blocks.0", "up_blocks.3"], "down.block_0, up.block_3", id="SD1-outermost"),
    pytest.param("sd1", ["up_blocks.1.attentions.0", "up_blocks.2"], "up.block_1.attentions_0, u3-5", id="SD1-up"),
    pytest.param("sd2", ["mid"], "middle", id="SD2-mid"),
    pytest.param("sd2", ["down_blocks.2", "mid", "up_blocks.1"], "d4-5, m0, u0-2", id="SD2-around-mid"),
    pytest.param("sdxl", ["mid"], "mid_block", id="SDXL-mid"),
    pytest.param("sdxl", ["down_blocks.1.attentions.1"], "down_blocks.1.attentions.1", id="SDXL-down"),
    pytest.param(
        "sdxl", ["down_blocks.2.attentions.1.transformer_blocks.[12]", "up_blocks.0.attentions.0"], "d3.1-2, u0",
        id="SDXL-transformer-blocks",
    ),
]


@precisions
@cfg
@pytest.mark.parametrize(("layout", "layers", "blocks"), PAG_LAYERS)
def test_pag(
    layout: Layout, layers: list[str], blocks: str, cfg_scale: float, dtype: torch.dtype,
) -> None:
    comparison = Comparison("PAG", layout, dtype=dtype, cfg_scale=cfg_scale, layers=layers)
    settings = Settings(pag_enabled=True, pag_scale=2.5, pag_blocks=blocks)
    comparison.check(comparison.theirs(pag_scale=2.5), settings)


@precisions
@cfg
@pytest.mark.parametrize("layout", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("size", "images", "scale"), [((16, 24), 2, 0.75), ((24, 16), 1, 1.0), ((16, 16), 1, 0.4)], ids=str,
)
def test_sag(
    layout: Layout, size: tuple[int, int], images: int, scale: float, cfg_scale: float, dtype: torch.dtype,
) -> None:
    comparison = Comparison("SAG", layout, dtype=dtype, cfg_scale=cfg_scale, size=size, images=images)
    settings = Settings(sag_enabled=True, sag_scale=scale)
    comparison.check(comparison.theirs(sag_scale=scale), settings)


@precisions
@cfg
def test_adaptive_scale_is_a_fade_one_timestep_apart(cfg_scale: float, dtype: torch.dtype) -> None:
    """``s - a * (1000 - t)`` falls to 0 at ``t = 1000 - s / a``, a fade that ends at progress ``s / (1000 * a)``.

    Here a progress of 0 is timestep 999, there it is 1000: our scale at t is theirs at t + 1, larger by ``a``. A fade
    that has not reached 0 when the picture is done (``s > 1000 * a``) is the one thing that ours can't say.
    """
    s, a = 3.0, 0.004
    settings = Settings(pag_enabled=True, pag_scale=s, pag_fade=True, pag_end=s / (1000 * a))
    comparison = Comparison("PAG", "sd1", dtype=dtype, cfg_scale=cfg_scale)
    recorded = comparison.theirs(steps=8, pag_scale=s, pag_adaptive_scale=a)
    guided = [given for given in recorded if comparison.pipe._get_pag_scale(given.timestep) > 0]
    unguided = recorded[len(guided):]
    assert guided
    assert unguided
    for given in guided:
        ours = plan_for(settings, comparison.unet, progress(given.timestep)).pag_scale
        assert ours == pytest.approx(comparison.pipe._get_pag_scale(given.timestep + 1), rel=1e-9)
        assert ours - comparison.pipe._get_pag_scale(given.timestep) == pytest.approx(a, rel=1e-6)
    plans = [plan_for(settings, comparison.unet, (1000 - given.timestep) / 1000) for given in guided]
    assert comparison.error(guided, plans) < TOLERANCE[dtype]
    for given in unguided:
        assert plan_at(settings, UNetTopology(comparison.unet), progress=(1000 - given.timestep) / 1000) is None


def perturbed_modules(layout: Layout, layers: list[str]) -> set[str]:
    """diffusers' names of the attentions that its ``pag_applied_layers`` select."""
    pipe = pipeline("PAG", layout, dtype=torch.float32, pag_applied_layers=layers)
    before = pipe.unet.attn_processors
    pipe._set_pag_attn_processor(layers, do_classifier_free_guidance=True)
    selected = {name.removesuffix(".processor") for name in pipe.pag_attn_processors}
    pipe.unet.set_attn_processor(before)
    return selected


def selected_modules(layout: Layout, blocks: str) -> set[str]:
    """The attentions that our block names select, by diffusers' names: those whose weights became theirs."""
    sites = UNetTopology(our_unet(layout, dtype=torch.float32)).resolve(blocks)
    wanted = {weights_of(site.attention) for site in sites}
    theirs = their_unet(layout, dtype=torch.float32)
    return {name for name, module in theirs.named_modules() if name.endswith(".attn1") and weights_of(module) in wanted}


def weights_of(attention: nn.Module) -> bytes:
    weight = attention.get_submodule("to_q").weight
    assert isinstance(weight, Tensor)
    return weight.detach().numpy().tobytes()


ALIASES = {
    "sd1": [
        ("mid", "mid"), ("mid_block", "mid_block"), ("mid_block.attentions.0", "mid_block.attentions.0"),
        ("mid_block.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"),
        *((f"down_blocks.{n}", f"down_blocks.{n}") for n in range(3)),
        *((f"up_blocks.{n}", f"up_blocks.{n}") for n in range(1, 4)),
        *((f"down_blocks.{n}", f"down.block_{n}") for n in range(3)),
        *((f"up_blocks.{n}", f"up.block_{n}") for n in range(1, 4)),
        *((f"up_blocks.{n}.attentions.{k}", f"up_blocks.{n}.attentions.{k}") for n in range(1, 4) for k in range(3)),
        *((f"down_blocks.{n}.attentions.{k}", f"down.block_{n}.attentions_{k}") for n in range(3) for k in range(2)),
    ],
    "sdxl": [
        ("mid", "mid"), ("mid", "m0"), ("mid_block.attentions.0.transformer_blocks.2", "m0.2"),
        *((f"down_blocks.{n}", f"down_blocks.{n}") for n in (1, 2)),
        *((f"up_blocks.{n}", f"up_blocks.{n}") for n in (0, 1)),
        *((f"up_blocks.{n}.attentions.{k}", f"up.block_{n}.attentions_{k}") for n in (0, 1) for k in range(3)),
        *((f"up_blocks.0.attentions.{k}.transformer_blocks.1", f"up_blocks.0.attentions.{k}.transformer_blocks.1")
          for k in range(3)),
        ("down_blocks.2.attentions.0.transformer_blocks.[01]", "d2.0-1"), ("up_blocks.1.attentions.0", "u3"),
    ],
}


@pytest.mark.parametrize("layout", list(ALIASES))
def test_aliases_select_what_diffusers_selects(layout: Layout) -> None:
    theirs_all = their_unet(layout, dtype=torch.float32).named_modules()
    ours = UNetTopology(our_unet(layout, dtype=torch.float32))
    assert len(ours.sites) == sum(name.endswith(".attn1") for name, _ in theirs_all)
    for theirs, alias in ALIASES[layout]:
        selected = perturbed_modules(layout, [theirs])
        assert selected
        assert selected_modules(layout, alias) == selected, (theirs, alias)


@pytest.mark.parametrize(
    ("layout", "name"),
    [("sd1", "down_blocks.3"), ("sd1", "up_blocks.0"), ("sdxl", "down_blocks.0"), ("sdxl", "up_blocks.2")],
)
def test_blocks_without_attention_are_refused_by_both(layout: Layout, name: str) -> None:
    with pytest.raises(ValueError, match="Cannot find PAG layer"):
        perturbed_modules(layout, [name])
    with pytest.raises(BlockNameError):
        UNetTopology(our_unet(layout, dtype=torch.float32)).resolve(name)
