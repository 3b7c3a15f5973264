"""What guidance costs: operations counted on tensors without data, and bytes by following every tensor's storage."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lab.benchmark.steps import METHODS, TOKENS, Method, step_config, step_flops
from sag_pag.demo.unet import CrossAttention, UNetModel, redraw_
from sag_pag.engine import attention as attention_module
from sag_pag.engine.attention import AttentionPatch, MapCapture, attention_received, unchanged_inputs
from sag_pag.engine.plan import plan_at
from sag_pag.engine.topology import UNetTopology
from sag_pag.settings import Settings

MIB = 2**20
PAG, SAG = {"pag_enabled": True}, {"sag_enabled": True}
LIMITS = {"CFG": 1.0, "PAG": 1.35, "PAG, own call": 1.35, "SAG": 1.51, "SAG and PAG": 1.86}
UNGUIDED = {
    "off": Settings(pag_blocks="input.1", sag_block="input.1"),
    "scale 0": Settings(**PAG, **SAG, pag_scale=0.0, sag_scale=0.0),  # type: ignore[arg-type]
    "before the start": Settings(**PAG, **SAG, pag_start=0.51, sag_start=0.51),  # type: ignore[arg-type]
    "after the end": Settings(**PAG, **SAG, pag_end=0.49, sag_end=0.49),  # type: ignore[arg-type]
    "no block": Settings(**PAG, pag_blocks=""),  # type: ignore[arg-type]
    "no blur": Settings(**SAG, sag_blur_sigma=0.0),  # type: ignore[arg-type]
}
layouts = pytest.mark.parametrize("layout", ["sd1", "sdxl"], ids=["SD 1.5 at 512", "SDXL at 1024"])


@functools.cache
def cost_table(layout: str) -> dict[str, int]:
    """Operations of one full-size step of one image, by method."""
    config, latent = step_config(layout)
    others = {
        "only PAG on": Method(Settings(**PAG, **SAG, sag_scale=0.0)),  # type: ignore[arg-type]
        "PAG early": Method(Settings(**PAG, pag_blocks="input.4")),  # type: ignore[arg-type]
        "PAG late": Method(Settings(**PAG, pag_blocks="output.5")),  # type: ignore[arg-type]
    }
    others["off"] = Method(UNGUIDED["off"])
    return step_flops(config, {**METHODS, **others}, latent=latent)


def cost_lines() -> list[str]:
    """The table of ``docs/benchmark.md``: operations of a step over those of a plain one."""
    tables = [cost_table("sd1"), cost_table("sdxl")]
    return [
        f"| {method} | " + " | ".join(f"{counts[method] / counts['CFG']:.3f}" for counts in tables) + " |"
        for method in LIMITS
    ]


@layouts
@pytest.mark.parametrize("method", list(LIMITS))
def test_operations_of_a_step(layout: str, method: str) -> None:
    """Over those of a plain CFG step; batch 1, the default blocks (middle)."""
    counts = cost_table(layout)
    assert 1.0 <= counts[method] / counts["CFG"] <= LIMITS[method]


def test_the_documented_operations_are_the_counted_ones() -> None:
    text = (Path(__file__).parents[1] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    for line in cost_lines():
        assert line in text


@layouts
@pytest.mark.parametrize("settings", list(UNGUIDED))
def test_what_does_nothing_costs_nothing(layout: str, settings: str) -> None:
    """No step of guidance is made at all, so the host's own denoiser runs."""
    config, _ = step_config(layout)
    with torch.device("meta"):
        topology = UNetTopology(UNetModel(**config))
    assert plan_at(UNGUIDED[settings], topology, progress=0.5) is None
    assert cost_table(layout)["off"] == cost_table(layout)["CFG"]


@layouts
def test_less_is_shared_the_earlier_pag_starts(layout: str) -> None:
    counts = cost_table(layout)
    assert counts["PAG late"] < counts["PAG"] < counts["PAG early"] < 1.5 * counts["CFG"]
    assert counts["only PAG on"] == counts["PAG"] == counts["PAG, own call"]


@layouts
def test_the_count_has_the_attention_in_it(layout: str) -> None:
    """The products with q, k and v in closed form: 4 N M C operations for N tokens that attend to M.

    A counter that misses the attention would flatter PAG, which leaves some of it out, and SAG.
    """
    config, latent = step_config(layout)
    with torch.device("meta"):
        topology = UNetTopology(UNetModel(**config))
    per_row = 0
    for site in topology.sites:
        down = {320: 1, 640: 2, 1280: 4}[site.attention.to_q.in_features]  # type: ignore[union-attr, index]
        down = 8 if layout == "sd1" and site.part == "middle" else down
        tokens = (latent // down) ** 2
        per_row += 4 * tokens * (tokens + TOKENS) * site.attention.to_q.in_features  # type: ignore[union-attr, operator]
    assert cost_table(layout)["CFG"] - flops_without_attention_products(config, latent) == 2 * per_row


def flops_without_attention_products(config: Any, latent: int) -> int:
    """The count of a plain step whose attentions pass their values on."""
    def forward(self: CrossAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, _, v = self.to_q(x), self.to_k(source), self.to_v(source)
        result: Tensor = self.to_out(q + v.sum(dim=1, keepdim=True))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossAttention, "forward", forward)
        return step_flops(config, {"CFG": Method()}, latent=latent)["CFG"]


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors made inside it: ``live`` bytes now, ``peak`` at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def know(self, *tensors: Tensor) -> None:
        """Storages that were there before, and don't count."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def make_attention(heads: int, channels: int, *, dtype: torch.dtype = torch.float32) -> CrossAttention:
    attention = CrossAttention(channels, heads=heads, dim_head=channels // heads)
    redraw_(attention, seed=4, gain=1.5)
    attention.eval().requires_grad_(False).to(dtype)
    return attention


def test_the_byte_counter_counts() -> None:
    with LiveBytes() as counter:
        a = torch.zeros(MIB)
        b = a.view(2, -1)[0]
        c = b + 1
        del c
        d = torch.zeros(MIB // 4)
        assert counter.live == 5 * MIB
        del a, b, d
    assert counter.live == 0
    assert counter.peak == 6 * MIB


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def capture_peak(*, tokens: int, dtype: torch.dtype, rows: int, fake: bool) -> float:
    """MiB that reading the last of ``rows`` rows' map adds, the way that it is done in the U-Net's call.

    10 heads of 64. ``fake``: with tensors that have sizes and no data, so in no time.
    """
    with torch.no_grad(), default_dtype(dtype), FakeTensorMode() if fake else nullcontext():
        attention = CrossAttention(640, heads=10, dim_head=64)
        x = torch.randn(rows, tokens, 640)
        capture = MapCapture([rows - 1], (1, tokens))
        read = functools.partial(capture.read, attention, key_value_inputs=unchanged_inputs)
        forward = AttentionPatch(rows, read=read).wrap(lambda x: x)
        with LiveBytes() as counter:
            counter.know(x, *attention.parameters())
            forward(x)
    assert capture.received is not None
    assert capture.received.shape == (1, tokens)
    return counter.peak / MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_the_map_capture(dtype: torch.dtype) -> None:
    """At 16,384 tokens and 10 heads, where a whole map in float32 would take 10 GiB. One of two rows is read."""
    peak = capture_peak(tokens=16_384, dtype=dtype, rows=2, fake=True)
    assert 8 < peak <= 64  # at least one piece of the logits, or nothing was measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_without_data_is_the_memory_with_data(dtype: torch.dtype) -> None:
    peaks = [capture_peak(tokens=2_500, dtype=dtype, rows=2, fake=fake) for fake in (False, True)]
    assert peaks[0] == peaks[1]


def full_map(attention: CrossAttention, tokens: Tensor) -> Tensor:
    """The map's column sums in float64, the whole map held."""
    q, k = (
        layer(tokens).double().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k)
    )
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).mean(dim=1).sum(dim=1)


@pytest.mark.parametrize("budget", [attention_module.LOGITS_BUDGET, 3 * 77 * 77, 77 * 10, 1], ids=str)
@pytest.mark.parametrize("heads", [1, 5, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)], ids=str,
)
def test_received_attention_is_the_maps(
    budget: int, heads: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In pieces of any size. Half precision may round q and k, but nothing from there on."""
    monkeypatch.setattr(attention_module, "LOGITS_BUDGET", budget)
    attention = make_attention(heads, 80, dtype=dtype)
    tokens = torch.randn(2, 77, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    received = attention_received(attention, tokens, unchanged_inputs)
    expected = full_map(attention, tokens)
    assert received.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert expected.std() > 0.05, "a uniform map tests nothing"
    assert (received - expected).abs().max() < tolerance


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_received_attention_under_autocast(autocast: torch.dtype) -> None:
    """The softmax is taken in float32 whatever the host's autocast wants."""
    attention, tokens = make_attention(8, 80), 4 * torch.randn(2, 77, 80, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=autocast):
        received = attention_received(attention, tokens, unchanged_inputs)
        expected = full_map_outside(attention, tokens)
    assert received.dtype == torch.float32
    assert (received - expected).abs().max() < 1e-4


def full_map_outside(attention: CrossAttention, tokens: Tensor) -> Tensor:
    """``full_map`` with only the projections under autocast."""
    q, k = attention.to_q(tokens), attention.to_k(tokens)
    with torch.autocast("cpu", enabled=False):
        q, k = (t.double().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (q, k))
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).mean(dim=1).sum(dim=1)
