"""What a self-attention is made to do during one U-Net call: identity rows for PAG, the map's column sums for SAG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sag_pag.engine.patching import Forward
from sag_pag.guidance import without_autocast

KeyValueInputs = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a self-attention's own tokens, what its ``to_k`` and ``to_v`` get (hypernetworks change these)."""

LOGITS_BUDGET = 2 * 1024 * 1024
"""Elements of the largest piece of an attention map that is held at a time (8 MiB in float32)."""


def unchanged_inputs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``KeyValueInputs`` of a model without hypernetworks: keys and values come from the tokens themselves."""
    return tokens, tokens


def identity_attention(attention: nn.Module, tokens: Tensor, key_value_inputs: KeyValueInputs) -> Tensor:
    """Self-attention with the identity as its attention map, ``to_out(to_v(tokens))`` (arXiv 2403.17377).

    ``tokens`` and the result are ``(rows, tokens, channels)``.
    """
    value: Tensor = attention.get_submodule("to_v")(key_value_inputs(tokens)[1])
    result: Tensor = attention.get_submodule("to_out")(value)
    return result


def attention_received(
    attention: nn.Module, tokens: Tensor | Sequence[Tensor], key_value_inputs: KeyValueInputs,
) -> Tensor:
    """How much attention each token gets: mean over heads and sum over queries of the self-attention map.

    ``tokens`` is ``(rows, tokens, channels)``, or its rows; the result ``(rows, tokens)`` in float32 (float64 for such
    input) with mean 1 in each row. The softmax is taken in that precision, also under autocast. The map is never held
    whole: rows one at a time, heads and queries in pieces of ``LOGITS_BUDGET`` elements.
    """
    return torch.stack([_received_in_row(attention, row[None], key_value_inputs) for row in tokens])


def _received_in_row(attention: nn.Module, tokens: Tensor, key_value_inputs: KeyValueInputs) -> Tensor:
    heads = int(attention.heads)  # type: ignore[arg-type]
    key: Tensor = attention.get_submodule("to_k")(key_value_inputs(tokens)[0])[0]
    count = key.shape[0]
    head_size = key.shape[-1] // heads
    precision = torch.float64 if key.dtype == torch.float64 else torch.float32
    head_group = max(1, min(heads, LOGITS_BUDGET // (count * count)))
    queries = max(1, min(count, LOGITS_BUDGET // (count * head_group)))
    received = torch.zeros(count, dtype=precision, device=key.device)
    for start in range(0, count, queries):
        query: Tensor = attention.get_submodule("to_q")(tokens[:, start : start + queries])[0]
        with without_autocast(query.device):
            for first in range(0, heads, head_group):
                part = slice(first * head_size, min(first + head_group, heads) * head_size)
                q = query[:, part].reshape(len(query), -1, head_size).transpose(0, 1).to(precision)
                k = key[:, part].reshape(count, -1, head_size).permute(1, 2, 0).to(precision)
                received += torch.softmax((q * head_size**-0.5) @ k, dim=-1).sum(dim=(0, 1))
                del q, k
    return received / heads


@dataclass
class MapCapture:
    """Collects, during one U-Net call, the attention that tokens get in ``rows`` of the batch.

    ``latent_size`` is the height and width of the whole latent; ``received`` is ``(rows, tokens)``, ``size`` the
    feature map's height and width as the transformer got it.
    """

    rows: Sequence[int]
    latent_size: tuple[int, int]
    received: Tensor | None = field(default=None, init=False)
    size: tuple[int, int] | None = field(default=None, init=False)

    def check_whole(self, x: Tensor) -> None:
        """Raises ``RuntimeError`` if the U-Net's input ``x`` is only a part of the picture."""
        if tuple(x.shape[-2:]) != self.latent_size:
            (h, w), (whole_h, whole_w) = x.shape[-2:], self.latent_size
            raise RuntimeError(
                f"SAG needs the whole picture in one U-Net call; another extension gave the U-Net {h} x {w} of "
                f"{whole_h} x {whole_w} latent pixels"
            )

    def watch_transformer(self, host: Forward) -> Forward:
        """Wraps the enclosing ``SpatialTransformer``'s forward to learn the spatial shape."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.size = (int(x.shape[-2]), int(x.shape[-1]))
            return host(x, *args, **kwargs)

        return forward


@dataclass
class AttentionPatch:
    """One self-attention's behaviour in a call of ``rows`` rows, of which the last ``identity_rows`` are perturbed.

    With ``overwrite`` the host's attention runs on all rows, and these rows of its output are replaced. A call with
    another number of rows (an extension that runs the attention on some rows of its own) is left to the host.
    ``applied`` tells whether any call was this patch's.
    """

    attention: nn.Module
    rows: int
    identity_rows: int
    key_value_inputs: KeyValueInputs
    capture: MapCapture | None = None
    overwrite: range | None = None
    applied: bool = field(default=False, init=False)

    def wrap(self, host: Forward) -> Forward:
        """The replacement for ``host``, the attention's present forward."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[0] != self.rows:
                return host(x, *args, **kwargs)
            self.applied = True
            if self.capture is not None:
                own = [x[row] for row in self.capture.rows]  # views: a copy of many tokens is large
                self.capture.received = attention_received(self.attention, own, self.key_value_inputs)
            if self.overwrite is not None:
                out = host(x, *args, **kwargs).clone()
                part = slice(self.overwrite.start, self.overwrite.stop)
                out[part] = identity_attention(self.attention, x[part], self.key_value_inputs)
                return out
            kept = self.rows - self.identity_rows
            if kept == self.rows:
                return host(x, *args, **kwargs)
            perturbed = identity_attention(self.attention, x[kept:], self.key_value_inputs)
            if kept == 0:
                return perturbed
            own_args, own_kwargs = first_rows((args, kwargs), kept, total=self.rows)
            return torch.cat([host(x[:kept], *own_args, **own_kwargs), perturbed])

        return forward


def first_rows(value: Any, count: int, *, total: int) -> Any:
    """``value`` with each batch of ``total`` rows in it (also in lists, tuples, dicts) cut to its first ``count``."""
    if isinstance(value, Tensor):
        return value[:count] if value.ndim and value.shape[0] == total else value
    if isinstance(value, (list, tuple)):
        return type(value)(first_rows(item, count, total=total) for item in value)
    if isinstance(value, dict):
        return {key: first_rows(item, count, total=total) for key, item in value.items()}
    return value
