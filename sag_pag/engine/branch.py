"""One denoiser call with perturbed rows that share everything up to the first perturbed self-attention.

A perturbed row is a copy of a conditional row; it differs from it only from the first perturbed attention on. Modules
that run before that compute the host's own rows, and their output is copied to the extra rows: exact, and for PAG in
the middle block of SD 1.5 and SDXL an extra row costs 0.69 of a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sag_pag.engine.attention import AttentionPatch, KeyValueInputs, MapCapture, first_rows
from sag_pag.engine.patching import Forward, forward_replaced, is_replaced
from sag_pag.engine.topology import AttentionSite, Topology


class Denoiser(Protocol):
    """The host's denoiser: ``x`` is ``(rows, channels, height, width)``, ``sigma`` ``(rows,)``, ``cond`` by row."""

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class Branch:
    """What to add to one denoiser call.

    ``perturbed_rows``: rows of the call to run once more with identity attention in ``perturbed``.
    ``capture``: reads the attention map of ``read`` on the way.
    ``own_call``: run the extra rows as a call of their own, for people short of memory.
    ``same_rows``: run the host's rows once more and perturb them there, for extensions that tell rows apart.
    """

    topology: Topology
    key_value_inputs: KeyValueInputs
    perturbed_rows: range = range(0)
    perturbed: tuple[AttentionSite, ...] = ()
    capture: MapCapture | None = None
    read: AttentionSite | None = None
    own_call: bool = False
    same_rows: bool = False


def select_rows(cond: Any, rows: range | slice) -> Any:
    """``cond`` (a tensor, or dicts and lists of tensors) with only ``rows`` of each tensor."""
    if isinstance(cond, Tensor):
        return cond[rows.start : rows.stop]
    if isinstance(cond, dict):
        return {key: select_rows(value, rows) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return type(cond)(select_rows(value, rows) for value in cond)
    return cond


def append_rows(cond: Any, rows: range, *, total: int) -> Any:
    """``cond`` with ``rows`` of its first ``total`` rows once more at the end."""
    if isinstance(cond, Tensor):
        return torch.cat([cond[:total], cond[rows.start : rows.stop]])
    if isinstance(cond, dict):
        return {key: append_rows(value, rows, total=total) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return type(cond)(append_rows(value, rows, total=total) for value in cond)
    return cond


def denoise_with_branch(
    denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch,
) -> tuple[Tensor, Tensor | None]:
    """The denoiser's output for its own rows and, if any rows are perturbed, for the perturbed ones.

    Nothing stays on any module after the call, whether it returns or raises. Raises ``RuntimeError`` if the U-Net or a
    selected attention did not run as expected (another extension has replaced it, or works in tiles).
    """
    total, rows = x.shape[0], branch.perturbed_rows
    if not rows:
        with _applied(branch, _reading_patch(branch, rows=total), rows=total):
            return denoise(x, sigma, cond=cond), None
    if branch.same_rows:
        return _in_same_rows(denoise, x, sigma, cond=cond, branch=branch)
    if branch.own_call:
        return _in_own_call(denoise, x, sigma, cond=cond, branch=branch)
    combined = total + len(rows)
    patches = _identity_patches(branch, rows=combined, identity_rows=len(rows))
    patches |= _reading_patch(branch, rows=combined, already=patches, rows_in_prefix=total)
    with _applied(branch, patches, rows=combined, prefix=_shared_rows(total, rows)):
        out = denoise(
            append_rows(x, rows, total=total), append_rows(sigma, rows, total=total),
            cond=append_rows(cond, rows, total=total),
        )
    return out[:total], out[total:]


def _in_own_call(
    denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch,
) -> tuple[Tensor, Tensor]:
    rows = branch.perturbed_rows
    record: dict[nn.Module, Tensor] = {}
    with _applied(branch, _reading_patch(branch, rows=x.shape[0]), rows=x.shape[0], prefix=_recorded(record, rows)):
        out = denoise(x, sigma, cond=cond)
    patches = _identity_patches(branch, rows=len(rows), identity_rows=len(rows))
    with _applied(branch, patches, rows=len(rows), prefix=_replayed(record)):
        perturbed = denoise(select_rows(x, rows), select_rows(sigma, rows), cond=select_rows(cond, rows))
    return out, perturbed


def _in_same_rows(
    denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch,
) -> tuple[Tensor, Tensor]:
    rows, total = branch.perturbed_rows, x.shape[0]
    randomness = Randomness(x.device)
    with _applied(branch, _reading_patch(branch, rows=total), rows=total):
        out = denoise(x, sigma, cond=cond)
    patches = {
        site: AttentionPatch(site.attention, total, 0, branch.key_value_inputs, overwrite=rows)
        for site in branch.perturbed
    }
    with _applied(branch, patches, rows=total), randomness.again():
        perturbed = denoise(x, sigma, cond=cond)
    return out, perturbed[rows.start : rows.stop]


class Randomness:
    """Torch's random state as it is now, so that a second call can draw what a first one draws.

    ControlNet's reference modes add noise in every U-Net call; it must not be part of the guidance.
    """

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Runs from that state on; afterwards the state is as it was before."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


Patches = dict[AttentionSite, AttentionPatch]


def _identity_patches(branch: Branch, *, rows: int, identity_rows: int) -> Patches:
    return {
        site: AttentionPatch(site.attention, rows, identity_rows, branch.key_value_inputs) for site in branch.perturbed
    }


def _reading_patch(
    branch: Branch, *, rows: int, already: Patches | None = None, rows_in_prefix: int | None = None,
) -> Patches:
    """The patch that reads the attention map; where that attention is perturbed too, the one patch does both."""
    site, order = branch.read, branch.topology.sites.index
    if branch.capture is None or site is None:
        return {}
    if already and site in already:
        return {site: replace(already[site], capture=branch.capture)}
    in_prefix = rows_in_prefix is not None and order(site) < order(branch.perturbed[0])
    here = rows_in_prefix if in_prefix and rows_in_prefix is not None else rows
    return {site: AttentionPatch(site.attention, here, 0, branch.key_value_inputs, branch.capture)}


MakePrefixForward = Callable[[nn.Module, Forward], Forward]


def _shared_rows(total: int, rows: range) -> MakePrefixForward:
    """Prefix modules compute the first ``total`` rows; the extra ones get copies of ``rows``."""
    combined = total + len(rows)

    def make(module: nn.Module, host: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[0] != combined:
                return host(x, *args, **kwargs)
            own_args, own_kwargs = first_rows((args, kwargs), total, total=combined)
            out: Tensor = host(x[:total], *own_args, **own_kwargs)
            return torch.cat([out, out[rows.start : rows.stop]])

        return forward

    return make


def _recorded(record: dict[nn.Module, Tensor], rows: range) -> MakePrefixForward:
    """Prefix modules run as always, and what they put out for ``rows`` is kept."""

    def make(module: nn.Module, host: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if module in record:
                raise RuntimeError("PAG needs the whole picture in one U-Net call; another extension makes several")
            out: Tensor = host(*args, **kwargs)
            record[module] = out[rows.start : rows.stop].clone()  # others may change their skip connections in place
            return out

        return forward

    return make


def _replayed(record: dict[nn.Module, Tensor]) -> MakePrefixForward:
    """Prefix modules put out what was recorded."""

    def make(module: nn.Module, host: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return record.pop(module)

        return forward

    return make


@contextmanager
def _applied(
    branch: Branch, patches: Patches, *, rows: int, prefix: MakePrefixForward | None = None,
) -> Iterator[None]:
    """Puts on all of a call's patches, takes them off, and checks that every patched attention ran."""
    capture = next((patch.capture for patch in patches.values() if patch.capture is not None), None)

    def checked(host: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[0] != rows:
                raise RuntimeError(
                    f"another extension gave the U-Net {x.shape[0]} rows instead of {rows}: guidance can't be used "
                    "with pictures made in tiles"
                )
            if capture is not None:
                capture.check_whole(x)
            return host(x, *args, **kwargs)

        return forward

    with ExitStack() as stack:
        if patches or prefix is not None:
            stack.enter_context(forward_replaced(branch.topology.unet, checked))
        for patch in patches.values():
            stack.enter_context(forward_replaced(patch.attention, patch.wrap))
            if patch.capture is not None and branch.read is not None:
                stack.enter_context(forward_replaced(branch.read.transformer, patch.capture.watch_transformer))
        if prefix is not None:
            for module in prefix_modules(branch.topology, branch.perturbed[0]):
                stack.enter_context(forward_replaced(module, partial(prefix, module)))
        yield
    missed = [site.name for site, patch in patches.items() if not patch.applied]
    if missed:
        raise RuntimeError(f"the self-attention of {', '.join(missed)} did not run with the rows that it should have")


def prefix_modules(topology: Topology, first: AttentionSite) -> list[nn.Module]:
    """The modules that run before ``first``, as large as possible: blocks, then layers, then transformer blocks."""
    modules = list(topology.blocks[: topology.blocks.index(first.block)])
    layers = list(first.block.children())
    modules += layers[: layers.index(first.transformer)]
    siblings = list(first.transformer.get_submodule("transformer_blocks").children())
    return modules + siblings[: siblings.index(first.transformer_block)]


_LAYERS = {
    "Conv2d", "Linear", "ResBlock", "SpatialTransformer", "SpatialVideoTransformer", "AttentionBlock", "Downsample",
    "Upsample",
}


def tells_rows_apart(topology: Topology) -> bool:
    """Whether another extension is in the U-Net that may treat the rows of a call differently, or remember them.

    ControlNet keeps references and features for each row of the first call, its IP-Adapter and Regional Prompter split
    the batch by what the rows are, AnimateDiff's layers mix rows. Such a U-Net must get the host's rows and no others.
    Replacements of self-attentions alone (HyperTile) work on any rows.
    """
    attentions = {site.attention for site in topology.sites}
    if any(type(layer).__name__ not in _LAYERS for block in topology.blocks for layer in block.children()):
        return True
    return any(
        is_replaced(module, name)
        for module in topology.unet.modules() if module not in attentions
        for name in ("forward", "_forward")
    )
