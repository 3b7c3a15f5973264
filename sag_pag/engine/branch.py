"""One denoiser call with perturbed rows that share everything up to the first perturbed self-attention.

A perturbed row is a copy of a conditional row; it differs from it only from the first perturbed attention on. Modules
that run before that compute the host's own rows, and their output is copied to the extra rows: exact, and for PAG in
the middle block of SD 1.5 and SDXL an extra row costs 0.69 of a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from sag_pag.engine.attention import AttentionPatch, BlockPatch, KeyValueInputs, MapCapture, MapSize
from sag_pag.engine.blocks import AttentionSite, Topology
from sag_pag.engine.calls import JOINED, Denoiser, Manner, NotRunError, Watch
from sag_pag.engine.patching import Forward, forward_replaced
from sag_pag.engine.perturbations import Perturbation, Place
from sag_pag.engine.prefix import MakePrefixForward, Record, not_moved, shared
from sag_pag.engine.queries import QueryPatch
from sag_pag.engine.rows import take_rows
from sag_pag.engine.spaces import SigmaSpace, Space
from sag_pag.engine.trial import try_again
from sag_pag.settings import Settings


def _ignored(_: str) -> None:
    pass


@dataclass(frozen=True)
class Branch:
    """What to add to one denoiser call.

    ``rows``: those of the call to run once more, perturbed at ``perturbed`` in the way that ``settings`` name.
    ``capture``: reads the attention map of ``read`` on the way. ``trusted``: calls like this one have been tried;
    ``space`` is the one that they predict in.
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
    space: Space = field(default_factory=SigmaSpace)
    say_failure: Callable[[str], None] = _ignored

    @property
    def perturbation(self) -> Perturbation:
        """What perturbed rows do."""
        return self.topology.perturbations[self.settings.pag_perturbation]


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
    prefix = shared(total, branch.rows, stacked=branch.manner.stacked)
    with branch.watch.host_call(total=x.shape[0], again=()), _applied(branch, patches, rows=combined, prefix=prefix):
        out = denoise(with_extra(x), with_extra(sigma), cond=with_extra(cond))
    return out[:total], out[total:]


def _apart(denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, branch: Branch) -> tuple[Tensor, Tensor]:
    total, rows = x.shape[0], branch.rows
    own = partial(take_rows, rows=rows, total=total)
    before = branch.topology.prefix(branch.perturbed[0])
    record = Record(
        total, rows, branch.watch, last=before[-1] if before else None, chained=branch.topology.chained,
    )
    reading = _Patches.reading(branch, rows=total)
    with (
        branch.watch.host_call(total=total, again=rows),
        _applied(branch, reading, rows=total, prefix=record.recording),
    ):
        out = denoise(x, sigma, cond=cond)
    patches = _Patches.perturbing(branch, rows=len(rows), perturbed=range(len(rows)), extra=True)
    with (
        branch.watch.own_call(rows, same_picture=True), not_moved(before, branch.manner.moves),
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
    trust = branch.manner.trust
    if trust is not None and trust.reproduces is not False and not branch.trusted:
        try_again(
            trust, branch.watch, branch.topology.network, out, call=lambda: denoise(x, sigma, cond=cond),
            predicted=lambda out: branch.space.predicted(x, out, sigma),
        )
    if trust is not None and not trust.reproduces:
        branch.say_failure(trust.because)
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
