"""Compare the engine, on the WebUI's own SD3 transformer, with the literal mask over the whole map.

Run with the WebUI's own interpreter, from the WebUI's folder; prints one JSON object of relative errors::

    venv/bin/python /path/to/tests/webui/compare_mmdit.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from checkpoints import import_webui, redraw
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

DEPTH, CONTEXT, POOLED, TEXT, IMAGES = 6, 96, 128, 77, 2
BLOCKS = ("joint.0", "joint.1", "joint.3", "joint.5", "joint.2, joint.4")


def make_model() -> Any:
    from modules.models.sd3.mmdit import MMDiT

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 64 * DEPTH}}
    model = MMDiT(
        input_size=None, pos_embed_max_size=64, patch_size=2, in_channels=16, depth=DEPTH, num_patches=4096,
        adm_in_channels=POOLED, context_embedder_config=embedder,
    ).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    redraw(model, generator)
    model.pos_embed.copy_(0.5 * torch.randn(model.pos_embed.shape, generator=generator))
    return model


def literal(block: Any, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor | None, Tensor]:
    """The WebUI's own halves and attention, with the mask over all of text and picture."""
    from mmdit import literal_mask
    from modules.models.sd3.other_impls import attention

    text_qkv, text_rest = block.context_block.pre_attention(context, c)
    picture_qkv, picture_rest = block.x_block.pre_attention(x, c)
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(text_qkv, picture_qkv, strict=True))
    texts = context.shape[1]
    attended = attention(q, k, v, block.x_block.attn.num_heads, mask=literal_mask(texts, x.shape[1]))
    text = None if text_rest is None else block.context_block.post_attention(attended[:, :texts], *text_rest)
    return text, block.x_block.post_attention(attended[:, texts:], *picture_rest)


@contextmanager
def masked(blocks: list[Any]) -> Iterator[None]:
    """With these blocks' whole map masked."""
    for block in blocks:
        block.forward = MethodType(literal, block)
    yield
    for block in blocks:
        del block.forward


def compare(model: Any, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """By blocks and manner: the engine's perturbed rows against the masked ones, and how far these are from cond."""
    from sag_pag.engine.attention import unchanged_inputs
    from sag_pag.engine.branch import Branch, denoise_with_branch
    from sag_pag.engine.calls import APART, JOINED, REPEATED
    from sag_pag.engine.topology import topology_of
    from sag_pag.neighbours import Neighbours

    generator = torch.Generator().manual_seed(2)
    rows = 2 * IMAGES
    x = torch.randn(rows, 16, 32, 24, generator=generator).to(dtype)
    t = torch.tensor([0.7, 0.3] * IMAGES).to(dtype)
    cond = {
        "context": torch.randn(rows, TEXT, CONTEXT, generator=generator).to(dtype),
        "y": torch.randn(rows, POOLED, generator=generator).to(dtype),
    }
    topology = topology_of(model)
    assert Neighbours(topology).manner(short_of_memory=False) == JOINED

    def denoise(x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        out: Tensor = model(x, 1000 * sigma, **cond)
        return out

    plain = denoise(x, t, cond=cond)
    found = {}
    for text in BLOCKS:
        sites = topology.resolve(text)
        with masked([site.block for site in sites]):
            expected = denoise(x[:IMAGES], t[:IMAGES], cond={key: value[:IMAGES] for key, value in cond.items()})
        for name, manner in (("joined", JOINED), ("apart", APART), ("repeated", REPEATED)):
            out, perturbed = denoise_with_branch(denoise, x, t, cond=cond, branch=Branch(
                topology, unchanged_inputs, rows=range(IMAGES), perturbed=sites, manner=manner, watch=manner.watch(),
            ))
            assert perturbed is not None
            found[f"{text} {name}"] = {
                "perturbed": distance(perturbed, expected), "own": distance(out, plain),
                "effect": distance(expected, plain[:IMAGES]),
            }
    assert not any("forward" in vars(module) for module in model.modules())
    return found


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def main() -> None:
    """Prints the errors in float32 and in float64."""
    import_webui(Path.cwd())
    from modules import initialize

    initialize.imports()
    with torch.no_grad():
        model = make_model()
        found = {str(dtype): compare(model.to(dtype), dtype) for dtype in (torch.float32, torch.float64)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
