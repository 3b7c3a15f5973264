"""Reading self-attention during a denoiser call, and taking a call's last rows elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sag_pag.engine.patching import Forward, unhooked
from sag_pag.engine.rows import join_rows, replace_rows, stacked_rows, take_rows
from sag_pag.guidance import without_autocast

KeyValueInputs = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a self-attention's own tokens, what its ``to_k`` and ``to_v`` get (hypernetworks change these)."""

LOGITS_BUDGET = 2 * 1024 * 1024
"""Elements of the largest piece of an attention map that is held at a time (8 MiB in float32)."""


def unchanged_inputs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``KeyValueInputs`` of a model without hypernetworks: keys and values come from the tokens themselves."""
    return tokens, tokens


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
    key: Tensor = unhooked(attention, "to_k")(key_value_inputs(tokens)[0])[0]
    count = key.shape[0]
    head_size = key.shape[-1] // heads
    precision = torch.float64 if key.dtype == torch.float64 else torch.float32
    head_group = max(1, min(heads, LOGITS_BUDGET // (count * count)))
    queries = max(1, min(count, LOGITS_BUDGET // (count * head_group)))
    received = torch.zeros(count, dtype=precision, device=key.device)
    for start in range(0, count, queries):
        query: Tensor = unhooked(attention, "to_q")(tokens[:, start : start + queries])[0]
        with without_autocast(query.device):
            for first in range(0, heads, head_group):
                part = slice(first * head_size, min(first + head_group, heads) * head_size)
                q = query[:, part].reshape(len(query), -1, head_size).transpose(0, 1).to(precision)
                k = key[:, part].reshape(count, -1, head_size).permute(1, 2, 0).to(precision)
                received += torch.softmax((q * head_size**-0.5) @ k, dim=-1).sum(dim=(0, 1))
                del q, k
    return received / heads


@dataclass
class MapSize:
    """Learns the height and width of the map that an attention's tokens lie in, from the module that gets the map.

    ``patch`` places of what that module gets are a token's side.
    """

    patch: int = 1
    size: tuple[int, int] | None = field(default=None, init=False)

    def known(self) -> tuple[int, int]:
        """The size; the module that gets the map runs before the attention does."""
        assert self.size is not None
        return self.size

    def watch(self, host: Forward) -> Forward:
        """Wraps the module's forward."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.size = (int(x.shape[-2]) // self.patch, int(x.shape[-1]) // self.patch)
            return host(x, *args, **kwargs)

        return forward


@dataclass
class MapCapture:
    """Collects, during one denoiser call, the attention that tokens get in ``rows`` of the batch.

    ``latent_size`` is the height and width of the whole latent; ``received`` is ``(rows, tokens)``, ``size`` the
    feature map's height and width as the transformer got it.
    """

    rows: Sequence[int]
    latent_size: tuple[int, int]
    received: Tensor | None = field(default=None, init=False)
    size: tuple[int, int] | None = field(default=None, init=False)

    def read(self, attention: nn.Module, tokens: Tensor, key_value_inputs: KeyValueInputs) -> None:
        """Reads the map of an attention that gets ``tokens``, ``(rows of the call, tokens, channels)``."""
        own = [tokens[row] for row in self.rows]  # views: a copy of many tokens is large
        self.received = attention_received(attention, own, key_value_inputs)

    def check_whole(self, x: Tensor) -> None:
        """Raises ``RuntimeError`` if the U-Net's input ``x`` is only a part of the picture."""
        if tuple(x.shape[-2:]) != self.latent_size:
            (h, w), (whole_h, whole_w) = x.shape[-2:], self.latent_size
            raise RuntimeError(
                f"SAG needs the whole picture in one U-Net call; another extension gave the U-Net {h} x {w} of "
                f"{whole_h} x {whole_w} latent pixels"
            )


Perturb = Callable[..., Any]
"""From some rows of what an attention or a transformer block gets, what it puts out, or gets, instead."""


def call_copies(count: int, *, of: int, stacked: bool) -> int:
    """How often ``of`` rows are in a call of ``count``; 0 if it is not a call of these."""
    return count // of if count % of == 0 and (stacked or count == of) else 0


@dataclass
class AttentionPatch:
    """One self-attention's behaviour in a call of ``rows`` rows: those in ``perturbed`` put out something else.

    With ``left_out`` these are the last rows, and the host's attention does not see them; else it sees all, and their
    output is replaced. ``stacked``: the rows may come several times over. A call with another number of rows (an
    extension that runs the attention on some rows of its own) is left to the host. ``applied`` tells whether any call
    was this patch's.
    """

    rows: int
    perturb: Perturb | None = None
    perturbed: Sequence[int] = ()
    left_out: bool = False
    stacked: bool = False
    read: Callable[[Tensor], None] | None = None
    applied: bool = field(default=False, init=False)

    def wrap(self, host: Forward) -> Forward:
        """The replacement for ``host``, the present forward of the module that makes the attention."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            copies = call_copies(len(x), of=self.rows, stacked=self.stacked)
            if not copies:
                return host(x, *args, **kwargs)
            self.applied = True
            if self.read is not None:
                self.read(x)
            if self.perturb is None:
                return host(x, *args, **kwargs)
            rows = stacked_rows(self.perturbed, of=self.rows, copies=copies)
            some_args, some_kwargs = take_rows(((x, *args), kwargs), rows, total=len(x))
            perturbed = self.perturb(*some_args, **some_kwargs)
            if not self.left_out:
                return replace_rows(host(x, *args, **kwargs), rows, perturbed)
            kept = stacked_rows(range(self.rows - len(self.perturbed)), of=self.rows, copies=copies)
            if not kept:
                return perturbed
            own_args, own_kwargs = take_rows(((x, *args), kwargs), kept, total=len(x))
            joined = join_rows(host(*own_args, **own_kwargs), perturbed)
            if copies == 1:
                return joined
            order = sorted(range(len(x)), key=[*kept, *rows].__getitem__)
            return take_rows(joined, order, total=len(x))

        return forward


@dataclass
class BlockPatch:
    """One transformer block in a call of ``rows`` rows: those in ``perturbed`` get something else."""

    rows: int
    perturb: Perturb
    perturbed: Sequence[int]
    stacked: bool = False
    applied: bool = field(default=False, init=False)

    def wrap(self, host: Forward) -> Forward:
        """The replacement for ``host``, the block's present forward."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            copies = call_copies(len(x), of=self.rows, stacked=self.stacked)
            if not copies:
                return host(x, *args, **kwargs)
            self.applied = True
            rows = stacked_rows(self.perturbed, of=self.rows, copies=copies)
            perturbed = self.perturb(take_rows(x, rows, total=len(x)))
            return host(replace_rows(x, rows, perturbed), *args, **kwargs)

        return forward
