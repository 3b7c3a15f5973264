"""What guidance costs, counted on the full-size U-Nets of SD 1.5 at 512 and SDXL at 1024 pixels."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sag_pag.attention import LOGITS_BUDGET, attention_received, unchanged_inputs
from sag_pag.benchmark.steps import METHODS, Method, step_config, step_flops
from sag_pag.demo.unet import CrossAttention, redraw_
from sag_pag.settings import Settings

LIMITS = {"PAG": 1.35, "PAG, own call": 1.35, "SAG": 1.51, "SAG and PAG": 1.86}
NOTHING = {
    "off": Method(Settings()),
    "scale 0": Method(Settings.from_dict({"pag_scale": 0, "sag_scale": 0})),
    "out of range": Method(Settings.from_dict({"pag_end": 0.2, "sag_start": 0.8})),
    "no block": Method(Settings.from_dict({"pag_blocks": ""})),
}


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_flops_of_a_guided_step_over_a_plain_one(layout: str) -> None:
    config, latent = step_config(layout)
    flops = step_flops(config, METHODS | NOTHING, latent=latent)
    ratios = {name: flops[name] / flops["CFG"] for name in flops}
    assert {name: ratio for name, ratio in ratios.items() if ratio > LIMITS.get(name, 1.0)} == {}
    assert all(ratios[name] == 1 for name in NOTHING)
    assert all(ratios[name] > 1.3 for name in LIMITS)  # a count that misses the extra work would be less
    print({name: round(ratio, 4) for name, ratio in ratios.items()})  # noqa: T201 - shown with -rA


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes that new tensors hold, each storage counted once while any tensor in it lives."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.tensors: Counter[tuple[int, int]] = Counter()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
            if key[0] not in self.known:
                self.tensors[key] += 1
                weakref.finalize(tensor, self._forget, key)
        self.peak = max(self.peak, sum(size for _, size in self.tensors))
        return out

    def _forget(self, key: tuple[int, int]) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key]


def test_memory_of_reading_a_large_map() -> None:
    """16,384 tokens and 10 heads: the whole map would take 10 GiB."""
    attention = CrossAttention(query_dim=640, heads=10, dim_head=64)
    redraw_(attention, seed=0)
    tokens = torch.randn(1, 16384, 640, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), LiveBytes(tokens, *attention.parameters()) as memory:
        received = attention_received(attention, tokens, unchanged_inputs)
    assert memory.peak > 16384 * 640 * 4 + LOGITS_BUDGET * 4  # the keys and a piece of the map were seen
    assert memory.peak <= 64 * 2**20
    print(f"{memory.peak / 2**20:.1f} MiB")  # noqa: T201 - shown with -rA
    assert received.mean().item() == pytest.approx(1, abs=1e-4)
