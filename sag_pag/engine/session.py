"""One generation's guidance: what to do in a step, and doing it. Knows rows, steps and predictions, but no host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sag_pag import guidance
from sag_pag.engine.attention import KeyValueInputs, MapCapture, unchanged_inputs
from sag_pag.engine.branch import Branch, Denoiser, Randomness, denoise_with_branch, select_rows, tells_rows_apart
from sag_pag.engine.topology import AttentionSite, BlockNameError, Topology, check_names
from sag_pag.settings import PARAMETERS, SettingError, Settings


class Space(Protocol):
    """The space that a sampler's denoiser predicts in. ``sigma`` is what the denoiser gets, ``(rows,)``."""

    def denoised(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        """The prediction ``out`` at ``x`` as a picture x0."""

    def renoised(self, x: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
        """``x`` after its x0 has changed by ``change``, the predicted noise being the same."""

    def sag_direction(self, out: Tensor, degraded_out: Tensor, change: Tensor) -> Tensor:
        """What SAG's scale multiplies, in this space: eps(x) - eps(x degraded), or its x0 equivalent."""


class SigmaSpace:
    """k-diffusion: ``x = x0 + sigma * eps``, the denoiser gives x0."""

    def denoised(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        return out

    def renoised(self, x: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
        return x + change

    def sag_direction(self, out: Tensor, degraded_out: Tensor, change: Tensor) -> Tensor:
        return (out + change) - degraded_out


class TimestepSpace:
    """DDPM: ``x = sqrt(a) * x0 + sqrt(1 - a) * eps``, the denoiser gives eps and gets the timestep as ``sigma``.

    ``alphas_cumprod`` is ``a`` by timestep; between two timesteps (UniPC) ``log a`` is interpolated.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.log_alphas = alphas_cumprod.cpu().double().log()  # there is no float64 on some devices

    def _alpha(self, timestep: Tensor, like: Tensor) -> Tensor:
        t = timestep.cpu().double().clamp(0, len(self.log_alphas) - 1)
        below = t.floor().long()
        above = (below + 1).clamp_max(len(self.log_alphas) - 1)
        log_alpha = torch.lerp(self.log_alphas[below], self.log_alphas[above], t - below)
        return log_alpha.exp().to(like)[:, None, None, None]

    def denoised(self, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        a = self._alpha(sigma, x)
        return (x - (1 - a).sqrt() * out) / a.sqrt()

    def renoised(self, x: Tensor, change: Tensor, sigma: Tensor) -> Tensor:
        return x + self._alpha(sigma, x).sqrt() * change

    def sag_direction(self, out: Tensor, degraded_out: Tensor, change: Tensor) -> Tensor:
        return out - degraded_out


@dataclass(frozen=True)
class StepPlan:
    """What one step does. A scale of 0 means that the feature does nothing in this step."""

    sag_scale: float
    pag_scale: float
    read: AttentionSite | None
    perturbed: tuple[AttentionSite, ...]
    settings: Settings


def check_blocks(settings: Settings, topology: Topology | None) -> None:
    """Raises ``SettingError`` if a feature that is on names no block, or blocks that ``topology`` does not have.

    Without a topology only the form of the names is checked.
    """
    for name in ("sag_block", "pag_blocks"):
        if not getattr(settings, f"{PARAMETERS[name].feature}_enabled"):
            continue
        text = getattr(settings, name)
        allowed = topology.describe() if topology is not None else PARAMETERS[name].allowed
        if not text.strip(", "):
            raise SettingError(name, text, allowed)
        try:
            sites = check_names(text) if topology is None else topology.resolve(text)
        except BlockNameError as error:
            raise SettingError(name, error.unknown, error.allowed) from error
        if name == "sag_block" and ("," in text or len({site.block_name for site in sites}) > 1):
            raise SettingError(name, text, f"one block{f' of {topology.describe()}' if topology else ''}")


def unknown_blocks(settings: Settings, topology: Topology) -> list[str]:
    """The block names and ranges of the features that are on of which ``topology`` has nothing."""
    return [
        name for feature, text in (("sag", settings.sag_block), ("pag", settings.pag_blocks))
        if getattr(settings, f"{feature}_enabled") for name in topology.unknown(text)
    ]


HiresPass = Literal["first pass", "hires pass"]


def guides_pass(settings: Settings, hires: HiresPass | None) -> bool:
    """Whether this pass of hires. fix is to be guided; ``None`` where a picture is made without it."""
    return hires is None or settings.hires_pass in ("both passes", hires)


def plan_step(
    settings: Settings, topology: Topology, *, progress: float, hires: HiresPass | None = None,
) -> StepPlan | None:
    """What to do at ``progress`` (0 noise, 1 picture; ``(999 - timestep) / 1000``), or ``None`` for nothing.

    ``hires`` is the pass of hires. fix, ``None`` where the picture is made without it.

    Blocks that this U-Net does not have are left out: ``check_blocks`` has refused those that the first model does not
    have, and a refiner may have fewer; ``unknown_blocks`` names those of which nothing is left.
    """
    if not guides_pass(settings, hires):
        return None
    own = hires == "hires pass" and settings.hires_own_scales
    sag_scale = settings.hires_sag_scale if own else settings.sag_scale
    pag_scale = settings.hires_pag_scale if own else settings.pag_scale
    read = topology.resolve_known(settings.sag_block)
    perturbed = topology.resolve_known(settings.pag_blocks)
    sag_on = settings.sag_enabled and settings.sag_start <= progress <= settings.sag_end
    if not (sag_on and read and settings.sag_blur_sigma):
        sag_scale = 0.0
    if not (settings.pag_enabled and perturbed and settings.pag_start <= progress <= settings.pag_end):
        pag_scale = 0.0
    elif settings.pag_fade and settings.pag_end > settings.pag_start:
        pag_scale *= (settings.pag_end - progress) / (settings.pag_end - settings.pag_start)
    if not sag_scale and not pag_scale:
        return None
    return StepPlan(sag_scale, pag_scale, read[0] if read else None, perturbed, settings)


@dataclass(frozen=True)
class RowLayout:
    """Which rows one step's denoiser calls carry, in order.

    ``conds``: for each conditional row its image's index and its weight (several rows an image with ``AND``); then
    ``middle_rows`` that guidance does not touch (InstructPix2Pix), then one unconditional row for each image, which
    the host may leave out.
    """

    conds: tuple[tuple[int, float], ...]
    images: int
    middle_rows: int = 0

    @property
    def first_uncond(self) -> int:
        """Index of the first unconditional row."""
        return len(self.conds) + self.middle_rows

    @property
    def total(self) -> int:
        """Number of rows if the unconditional ones are there."""
        return self.first_uncond + self.images

    def first_cond_rows(self) -> list[int]:
        """For each image, its first conditional row: the host puts these where unconditional ones are left out."""
        return [next(row for row, (image, _) in enumerate(self.conds) if image == i) for i in range(self.images)]


Role = Literal["cond", "uncond"]


@dataclass
class _SagBase:
    """The rows that SAG starts from: one for each image, collected as the calls come."""

    x: list[Tensor] = field(default_factory=list)
    sigma: list[Tensor] = field(default_factory=list)
    cond: list[Any] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    calls: list[_Call] = field(default_factory=list)


@dataclass(frozen=True)
class SagView:
    """What SAG saw in one step: ``attention`` of the feature map, ``mask`` of the latent.

    Both are ``(images, height, width)``.
    """

    attention: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Call:
    """A denoiser call of the host's, and which of its rows SAG starts from."""

    x: Tensor
    sigma: Tensor
    cond: Any
    rows: Sequence[int]
    randomness: Randomness


class GuidedStep:
    """One step: stands in for the host's denoiser, adds rows to its calls and gathers the guidance.

    Call it for each of the host's denoiser calls in order; then ``finish`` once, which makes SAG's own call; then
    ``apply`` to the host's result after CFG.
    """

    def __init__(
        self, denoise: Denoiser, plan: StepPlan, *, topology: Topology, layout: RowLayout, space: Space,
        own_call: bool = False, key_value_inputs: KeyValueInputs = unchanged_inputs,
    ) -> None:
        self.denoise = denoise
        self.plan = plan
        self.topology = topology
        self.layout = layout
        self.space = space
        self.own_call = own_call
        self.key_value_inputs = key_value_inputs
        self.same_rows = tells_rows_apart(topology)
        self.seen = 0
        self.finished = False
        self._cond_out: dict[int, Tensor] = {}
        self._uncond_out: list[Tensor] = []
        self._pag_delta: dict[int, Tensor] = {}
        self._sag_delta: Tensor | None = None
        self.seen_by_sag: SagView | None = None
        self._bases: dict[Role, _SagBase] = {"cond": _SagBase(), "uncond": _SagBase()}

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Any) -> Tensor:
        """One of the step's denoiser calls: the host's rows go in and come out. Later calls are not the step's."""
        first, count = self.seen, x.shape[0]
        if self.finished or first + count > self.layout.total:
            return self.denoise(x, sigma, cond=cond)
        self.seen += count
        cond_rows = range(max(0, min(len(self.layout.conds) - first, count)))
        role, read_rows = self._rows_to_read(first, count)
        capture = MapCapture(read_rows, _size(x)) if self.plan.sag_scale and read_rows else None
        randomness = Randomness(x.device) if capture is not None and self.same_rows else None
        out, perturbed = denoise_with_branch(self.denoise, x, sigma, cond=cond, branch=Branch(
            topology=self.topology, key_value_inputs=self.key_value_inputs,
            perturbed_rows=cond_rows if self.plan.pag_scale else range(0), perturbed=self.plan.perturbed,
            capture=capture, read=self.plan.read, own_call=self.own_call, same_rows=self.same_rows,
        ))
        kept = out.clone()  # other extensions may change the host's tensor in place
        for row in cond_rows:
            self._cond_out[first + row] = kept[row]
            if perturbed is not None:
                self._add_pag_delta(first + row, kept[row], perturbed[row])
        self._uncond_out += [kept[row] for row in range(count) if first + row >= self.layout.first_uncond]
        if capture is not None:
            self._keep(self._bases[role], capture, x, sigma, cond, kept)
        if randomness is not None:
            self._bases[role].calls.append(_Call(x, sigma, cond, read_rows, randomness))
        return out

    def _add_pag_delta(self, row: int, cond: Tensor, perturbed: Tensor) -> None:
        """PAG's scale * (cond - perturbed), each sub-prompt's own entering with its weight, as in CFG."""
        image, weight = self.layout.conds[row]
        difference = guidance.working_precision(cond) - guidance.working_precision(perturbed)
        delta = self.plan.pag_scale * weight * difference
        self._pag_delta[image] = self._pag_delta[image] + delta if image in self._pag_delta else delta

    def _rows_to_read(self, first: int, count: int) -> tuple[Role, list[int]]:
        """SAG reads the unconditional rows; a call without any may be all there is, so then the conditional ones."""
        uncond = [row for row in range(count) if first + row >= self.layout.first_uncond]
        if uncond:
            return "uncond", uncond
        return "cond", [row - first for row in self.layout.first_cond_rows() if first <= row < first + count]

    def _keep(
        self, base: _SagBase, capture: MapCapture, x: Tensor, sigma: Tensor, cond: Any, out: Tensor,
    ) -> None:
        assert capture.received is not None  # the branch checks that the attention ran
        assert capture.size is not None
        base.size = capture.size
        for row, received in zip(capture.rows, capture.received, strict=True):
            one = slice(row, row + 1)
            base.x.append(x[one])
            base.sigma.append(sigma[one])
            base.cond.append(select_rows(cond, one))
            base.out.append(out[one])
            base.received.append(received[None])

    def finish(self) -> None:
        """After the step's last denoiser call: SAG's second prediction, at the degraded picture.

        Raises ``RuntimeError`` if the host's calls did not carry the rows that the layout announced.
        """
        self.finished = True
        if self.seen not in (len(self.layout.conds), self.layout.total):
            raise RuntimeError(f"the denoiser was called with {self.seen} rows of {self.layout.total}")
        if not self.plan.sag_scale:
            return
        base = self._bases["uncond" if self._uncond_out else "cond"]
        x, sigma, out = torch.cat(base.x), torch.cat(base.sigma), torch.cat(base.out)
        settings = self.plan.settings
        mask = guidance.attention_mask(
            torch.cat(base.received), size=base.size, threshold=settings.sag_threshold, latent_size=_size(x)
        )
        x0 = self.space.denoised(x, out, sigma)
        change = guidance.degrade(x0, mask.to(x0.dtype), sigma=settings.sag_blur_sigma) - x0
        if settings.sag_show:
            self.seen_by_sag = SagView(torch.cat(base.received).view(-1, *base.size).cpu(), mask[:, 0].cpu())
        degraded_out = self._denoise_degraded(self.space.renoised(x, change, sigma), sigma, base)
        self._sag_delta = self.plan.sag_scale * self.space.sag_direction(
            guidance.working_precision(out), guidance.working_precision(degraded_out),
            guidance.working_precision(change),
        )

    def _denoise_degraded(self, degraded: Tensor, sigma: Tensor, base: _SagBase) -> Tensor:
        if not self.same_rows:
            return self.denoise(degraded, sigma, cond=_stack(base.cond))
        outs, first = [], 0
        for call in base.calls:
            x, rows = call.x.clone(), list(call.rows)
            x[rows] = degraded[first : first + len(rows)]
            first += len(rows)
            with call.randomness.again():
                outs.append(self.denoise(x, call.sigma, cond=call.cond)[rows])
        return torch.cat(outs)

    def delta(self) -> Tensor:
        """The sum of both guidances, ``(images, channels, height, width)``, in the sampler's space."""
        deltas = [] if self._sag_delta is None else [self._sag_delta]
        if self._pag_delta:
            deltas.append(torch.stack([self._pag_delta[image] for image in range(self.layout.images)]))
        return torch.stack(deltas).sum(dim=0)

    def apply(self, combined: Tensor, *, factor: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """``combined``, the host's result after CFG (and blending), with the guidance added.

        ``factor`` multiplies the guidance (``DDIM CFG++`` shrinks CFG's scale, and ours with it); ``weight`` is 1
        where an inpainted picture is made anew, 0 where it is protected.
        """
        settings = self.plan.settings
        first = torch.stack([self._cond_out[row] for row in self.layout.first_cond_rows()])
        uncond = torch.stack(self._uncond_out) if self._uncond_out else None
        cond = self._combined_cond(first if uncond is None else uncond)
        return guidance.add_guidance(
            combined, self.delta() * factor, cond=cond, uncond=uncond, rescale=settings.rescale,
            mode=settings.rescale_mode, weight=weight,
        )

    def _combined_cond(self, base: Tensor) -> Tensor:
        """The conditional prediction: with ``AND`` the weighted sum of the sub-prompts' differences from ``base``."""
        if all(weight == 1 for _, weight in self.layout.conds) and len(self.layout.conds) == self.layout.images:
            return torch.stack([self._cond_out[row] for row in range(self.layout.images)])
        result = list(base)
        for row, (image, weight) in enumerate(self.layout.conds):
            result[image] = result[image] + weight * (self._cond_out[row] - base[image])
        return torch.stack(result)


def _size(x: Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])


def _stack(conds: Sequence[Any]) -> Any:
    """Single-row conds as one, row by row."""
    first = conds[0]
    if isinstance(first, Tensor):
        return torch.cat(list(conds))
    if isinstance(first, dict):
        return {key: _stack([cond[key] for cond in conds]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_stack(items) for items in zip(*conds, strict=True))
    return first
