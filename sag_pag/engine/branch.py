"""One denoiser call with perturbed rows that share everything up to the first perturbed self-attention.

A perturbed row is a copy of a conditional row; it differs from it only from the first perturbed attention on. Modules
that run before that compute the host's own rows, and their output is copied to the extra rows: exact, and for PAG in
the middle block of SD 1.5 and SDXL an extra row costs 0.69 of a plain one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sag_pag.engine.attention import AttentionPatch, BlockPatch, KeyValueInputs, MapCapture, MapSize
from sag_pag.engine.blocks import AttentionSite, Topology
from sag_pag.engine.calls import JOINED, Denoiser, Manner, Watch
from sag_pag.engine.patching import Forward, forward_replaced, without_hooks
from sag_pag.engine.perturbations import Perturbation, Place
from sag_pag.engine.queries import QueryPatch
from sag_pag.engine.rows import copied, count_rows, join_rows, stacked_rows, take_rows
from sag_pag.settings import Settings

logger = logging.getLogger(__name__)


def _ignored(_: str) -> None:
    pass


@dataclass(frozen=True)
class Branch:
    """What to add to one denoiser call.

    ``rows``: those of the call to run once more, perturbed at ``perturbed`` in the way that ``settings`` name.
    ``capture``: reads the attention map of ``read`` on the way. ``trusted``: calls like this one have been tried.
    ``say_failure`` is told why guidance can't be had from this call, beside somebody of whom nothing is known.
    """

    topology: Topology
    key_value_inputs: KeyValueInputs
    rows: Sequence[int] = ()
    perturbed: tuple[AttentionSite, ...] = ()
    settings: Settings = field(default_factory=Settings)
    capture: MapCapture | None = None
    read: AttentionSite | None = None
    manner: Manner = JOINED
    watch: Watch = field(default_factory=Watch)
    trusted: bool = False
    say_failure: Callable[[str], None] = _ignored

    @property
    def perturbation(self) -> Perturbation:
        """What perturbed rows do."""
        return self.topology.perturbations[self.settings.pag_perturbation]


class NotRunError(RuntimeError):
    """A selected attention did not run as expected: another extension has replaced it, skips it or works in tiles."""


def denoise_with_branch(
    denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch,
) -> tuple[Tensor, Tensor | None]:
    """The denoiser's output for its own rows and, if any rows are perturbed, for the perturbed ones.

    Nothing stays on any module after the call, whether it returns or raises. Raises ``NotRunError`` if the model or a
    selected attention did not run as expected, and the manner is not one in which that is only said.
    """
    if branch.manner.perturbed == "repeated":
        return _repeated(denoise, x, sigma, cond=cond, branch=branch)
    if not branch.rows:
        total = x.shape[0]
        patches = _Patches.reading(branch, rows=total)
        with branch.watch.host_call(total=x.shape[0], again=()), _applied(branch, patches, rows=total):
            return denoise(x, sigma, cond=cond), None
    make = {"joined": _joined, "apart": _apart}[branch.manner.perturbed]
    return make(denoise, x, sigma, cond=cond, branch=branch)


def _joined(denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch) -> tuple[Tensor, Tensor]:
    total = x.shape[0]
    combined = total + len(branch.rows)
    with_extra = partial(take_rows, rows=[*range(total), *branch.rows], total=total)
    patches = _Patches.perturbing(branch, rows=combined, perturbed=range(total, combined), extra=True)
    patches.read(branch, rows=combined, rows_in_prefix=total)
    prefix = _shared(total, branch.rows, stacked=branch.manner.stacked)
    with branch.watch.host_call(total=x.shape[0], again=()), _applied(branch, patches, rows=combined, prefix=prefix):
        out = denoise(with_extra(x), with_extra(sigma), cond=with_extra(cond))
    return out[:total], out[total:]


def _apart(denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch) -> tuple[Tensor, Tensor]:
    total, rows = x.shape[0], branch.rows
    own = partial(take_rows, rows=rows, total=total)
    last = branch.topology.prefix(branch.perturbed[0])[-1:]
    record = _Record(
        total, rows, branch.watch, last=last[0] if last else None, chained=branch.topology.chained,
    )
    reading = _Patches.reading(branch, rows=total)
    with (
        branch.watch.host_call(total=total, again=rows),
        _applied(branch, reading, rows=total, prefix=record.recording),
    ):
        out = denoise(x, sigma, cond=cond)
    patches = _Patches.perturbing(branch, rows=len(rows), perturbed=range(len(rows)), extra=True)
    with (
        branch.watch.own_call(rows, same_picture=True), _not_moved(branch),
        _applied(branch, patches, rows=len(rows), prefix=record.replaying),
    ):
        perturbed = denoise(own(x), own(sigma), cond=own(cond))
    return out, perturbed


def _repeated(
    denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch,
) -> tuple[Tensor, Tensor | None]:
    total, rows = x.shape[0], branch.rows
    reading = _Patches.reading(branch, rows=total)
    with branch.watch.host_call(total=total, again=rows), _applied(branch, reading, rows=total, whole=False):
        out = denoise(x, sigma, cond=cond)
    if missed := reading.missed():
        branch.say_failure(_NOT_EVERYWHERE.format(", ".join(missed)))
        return out, None
    _try_again(out, branch, lambda: denoise(x, sigma, cond=cond))
    if branch.manner.trust is not None and not branch.manner.trust.reproduces:
        branch.say_failure(branch.manner.trust.because)
        return out, None
    if not rows:
        return out, None
    patches = _Patches.perturbing(branch, rows=total, perturbed=rows, extra=False)
    with branch.watch.own_call(range(total), same_picture=True), _applied(branch, patches, rows=total, whole=False):
        perturbed = denoise(x, sigma, cond=cond)
    if missed := patches.missed():
        branch.say_failure(_NOT_EVERYWHERE.format(", ".join(missed)))
        return out, None
    return out, take_rows(perturbed, rows, total=total)


_NOT_EVERYWHERE = "the self-attention of {} did not run in every step"
REPRODUCED = 1e-3
"""How far, relative to the largest value, a call made once more may be from the first: devices are not exact."""


def _try_again(out: Tensor, branch: Branch, call: Callable[[], Tensor]) -> None:
    """Finds out whether the host's call can be made once more, if that is not known yet."""
    trust = branch.manner.trust
    if trust is None or trust.reproduces is False or branch.trusted:
        return
    first = out.clone()
    try:
        with branch.watch.own_call(range(len(out)), same_picture=True):
            second = call()
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody unknown fails with
        logger.warning("a call of the model made once more failed", exc_info=True)
        trust.reproduces, trust.because = False, f"a call made once more failed with {type(error).__name__}"
        return
    near = second.shape == first.shape and bool((second - first).abs().max() <= REPRODUCED * first.abs().max())
    trust.reproduces, trust.because = near, "" if near else "a call made once more gives something else"


class _Patches:
    """What the modules around a call's attentions do, and those that tell how large the map of their tokens is."""

    def __init__(self) -> None:
        self.attentions: dict[AttentionSite, AttentionPatch | QueryPatch] = {}
        self.blocks: dict[AttentionSite, BlockPatch] = {}
        self.sizes: dict[nn.Module, MapSize] = {}
        self.capture: MapCapture | None = None

    @classmethod
    def perturbing(cls, branch: Branch, *, rows: int, perturbed: Sequence[int], extra: bool) -> _Patches:
        """A call of so many rows of which some are perturbed; ``extra`` rows the host's attention need not see."""
        made, stacked = cls(), branch.manner.stacked
        for site in branch.perturbed:
            perturb = partial(_perturb, branch, site, made._size_at(site))
            if branch.perturbation.at == "block":
                made.blocks[site] = BlockPatch(rows, perturb, perturbed, stacked)
            elif branch.perturbation.at == "queries":
                made.attentions[site] = QueryPatch(
                    rows, site.attention, made._size_at(site), perturb, perturbed, stacked
                )
            else:
                made.attentions[site] = AttentionPatch(
                    rows, perturb, perturbed, left_out=extra, stacked=stacked
                )
        return made

    @classmethod
    def reading(cls, branch: Branch, *, rows: int) -> _Patches:
        made = cls()
        made.read(branch, rows=rows)
        return made

    def read(self, branch: Branch, *, rows: int, rows_in_prefix: int | None = None) -> None:
        """Adds reading the attention map; where that attention is perturbed too, the one patch does both."""
        site, capture, order = branch.read, branch.capture, branch.topology.sites.index
        if capture is None or site is None:
            return
        if site not in self.attentions:
            in_prefix = rows_in_prefix is not None and order(site) < order(branch.perturbed[0])
            self.attentions[site] = AttentionPatch(rows_in_prefix if in_prefix and rows_in_prefix is not None else rows)
        self.attentions[site].read = partial(_read, branch, site, self._size_at(site), capture)
        self.capture = capture

    @property
    def any(self) -> bool:
        """Whether there is anything to put on."""
        return bool(self.attentions or self.blocks)

    def put_on(self, stack: ExitStack) -> None:
        """Replaces the modules' forwards until the stack is closed."""
        for sizing, size in self.sizes.items():
            stack.enter_context(forward_replaced(sizing, size.watch))
        for site, block in self.blocks.items():
            stack.enter_context(forward_replaced(site.module_at("block"), block.wrap))
        for site, attention in self.attentions.items():
            stack.enter_context(forward_replaced(site.module_at("attention"), attention.wrap))

    def missed(self) -> list[str]:
        """The attentions that did not run as they should have."""
        missed = [site for site, attention in self.attentions.items() if not attention.applied]
        missed += [site for site, block in self.blocks.items() if not block.applied]
        return [site.name for site in missed]

    def _size_at(self, site: AttentionSite) -> MapSize:
        module, patch = site.sized_by
        return self.sizes.setdefault(module, MapSize(patch))


def _perturb(branch: Branch, site: AttentionSite, map_size: MapSize, *args: Any, **kwargs: Any) -> Any:
    place = Place(site.module_at("attention"), map_size.known(), branch.key_value_inputs)
    return branch.perturbation.run(place, site.tokens(*args, **kwargs), branch.settings)


def _read(branch: Branch, site: AttentionSite, map_size: MapSize, capture: MapCapture, tokens: Tensor) -> None:
    capture.size = map_size.known()
    capture.read(site.attention, tokens, branch.key_value_inputs)


MakePrefixForward = Callable[[nn.Module, Forward], Forward]


def _shared(total: int, rows: Sequence[int], *, stacked: bool) -> MakePrefixForward:
    """Prefix modules compute the first ``total`` rows; the extra ones get copies of ``rows``."""
    combined = total + len(rows)

    def make(module: nn.Module, host: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            count = count_rows(args, kwargs) or 0
            copies, rest = divmod(count, combined)
            if rest or not copies or (copies > 1 and not stacked):
                return host(*args, **kwargs)
            kept = stacked_rows(range(total), of=combined, copies=copies)
            own_args, own_kwargs = take_rows((args, kwargs), kept, total=count)
            out = host(*own_args, **own_kwargs)
            if copies == 1:
                return join_rows(out, take_rows(out, rows, total=total))
            return take_rows(out, stacked_rows([*range(total), *rows], of=total, copies=copies), total=copies * total)

        return forward

    return make


class _Record:
    """What the prefix modules of a call of ``total`` rows put out for ``rows``, to be put out once more.

    ``last`` is the last of them: a call that leaves them out goes on from where the first call was after it. Of a chain
    what its last one puts out is kept alone.
    """

    def __init__(
        self, total: int, rows: Sequence[int], watch: Watch, *, last: nn.Module | None, chained: bool,
    ) -> None:
        self._total, self._rows, self._watch, self._last, self._chained = total, rows, watch, last, chained
        self._seen: set[nn.Module] = set()
        self._out: dict[nn.Module, Any] = {}
        self._passed: Any = None

    def recording(self, module: nn.Module, host: Forward) -> Forward:
        """Runs as always."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if module in self._seen:
                raise NotRunError("PAG needs the whole picture in one model call; another extension makes several")
            self._seen.add(module)
            out = host(*args, **kwargs)
            if self._chained:
                self._out.clear()
            # a copy: others may change their skip connections in place
            self._out[module] = copied(take_rows(out, self._rows, total=self._total))
            if module is self._last:
                self._passed = self._watch.passed()
            return out

        return forward

    def replaying(self, module: nn.Module, host: Forward) -> Forward:
        """Puts out what was recorded."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if module is self._last:
                self._watch.skip_to(self._passed)
            return args if self._chained and module not in self._out else self._out.pop(module)

        return forward


@contextmanager
def _not_moved(branch: Branch) -> Iterator[None]:
    """Prefix modules that only put out what was recorded are not moved to the GPU for it."""
    with ExitStack() as stack:
        for module in branch.topology.prefix(branch.perturbed[0]):
            stack.enter_context(without_hooks(module, branch.manner.moves))
        yield


@contextmanager
def _applied(
    branch: Branch, patches: _Patches, *, rows: int, prefix: MakePrefixForward | None = None, whole: bool = True,
) -> Iterator[None]:
    """Puts on all of a call's patches, takes them off, and, if the ``whole`` model has to run, checks that every
    patched attention did.
    """

    def checked(host: Forward) -> Forward:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.shape[0] % rows or (x.shape[0] != rows and not branch.manner.stacked):
                raise NotRunError(
                    f"another extension gave the model {x.shape[0]} rows instead of {rows}: guidance can't be used "
                    "with pictures made in tiles"
                )
            if patches.capture is not None:
                patches.capture.check_whole(x)
            return host(x, *args, **kwargs)

        return forward

    with ExitStack() as stack:
        if patches.any or prefix is not None:
            stack.enter_context(forward_replaced(branch.topology.network, checked))
        patches.put_on(stack)
        if prefix is not None:
            for module in branch.topology.prefix(branch.perturbed[0]):
                stack.enter_context(forward_replaced(module, partial(prefix, module)))
        yield
    if whole and (missed := patches.missed()):
        raise NotRunError(f"the self-attention of {', '.join(missed)} did not run with the rows that it should have")
