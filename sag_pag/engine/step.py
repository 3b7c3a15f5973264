"""One guided step: stands in for the host's denoiser calls, adds to them, and gathers the guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sag_pag import guidance
from sag_pag.engine.attention import KeyValueInputs, MapCapture, unchanged_inputs
from sag_pag.engine.blocks import Topology
from sag_pag.engine.branch import Branch, denoise_with_branch
from sag_pag.engine.calls import JOINED, Denoiser, Manner, Watch
from sag_pag.engine.plan import StepPlan
from sag_pag.engine.rows import Role, Row, StepRows, take_rows
from sag_pag.engine.spaces import Space


@dataclass(frozen=True)
class SagView:
    """What SAG saw in one step: ``attention`` of the feature map, ``mask`` of the latent.

    Both are ``(images, height, width)``.
    """

    attention: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _ReadCall:
    """A denoiser call of the host's in which SAG has read the attention of ``read``, some of its rows."""

    denoise: Denoiser
    x: Tensor
    sigma: Tensor
    cond: Any
    rows: Sequence[Row]
    read: Sequence[int]
    capture: MapCapture
    watch: Watch

    @property
    def role(self) -> Role:
        return self.rows[self.read[0]].role

    def of_rows(self, value: Any) -> Any:
        """The part of a batch of this call that is of the rows that were read."""
        return take_rows(value, self.read, total=len(self.x))


@dataclass(frozen=True)
class _Sag:
    """SAG's guidance of one image and what it was made of, all without the batch's dimension."""

    delta: Tensor
    attention: Tensor
    mask: Tensor


class GuidedStep:
    """One step. Call it for each of the host's denoiser calls with what their rows are; then ``finish`` once, which
    makes SAG's own call; then ``apply`` to the host's result after CFG.

    ``circular``: the picture's left and right, upper and lower edges meet ("Tiling").
    """

    def __init__(
        self, plan: StepPlan, *, topology: Topology, rows: StepRows, space: Space, manner: Manner = JOINED,
        key_value_inputs: KeyValueInputs = unchanged_inputs, circular: bool = False,
    ) -> None:
        self.plan = plan
        self.topology = topology
        self.rows = rows
        self.space = space
        self.manner = manner
        self.key_value_inputs = key_value_inputs
        self.circular = circular
        self._out: dict[Row, Tensor] = {}
        self._pag: dict[Row, Tensor] = {}
        self._shares: dict[Row, Tensor] = {}
        self._read_calls: list[_ReadCall] = []
        self._sag: dict[int, _Sag] = {}
        self._tried = manner.trust is not None and manner.trust.reproduces is True
        self.failure = ""
        """Why this step can't be guided, if it can't."""

    def __call__(self, denoise: Denoiser, x: Tensor, sigma: Tensor, *, cond: Any, rows: Sequence[Row]) -> Tensor:
        """One of the step's denoiser calls: the host's rows go in and come out."""
        conds = [index for index, row in enumerate(rows) if row.role == "cond"]
        read = self._rows_to_read(rows) if self.plan.sag_scale else []
        capture = MapCapture(read, _size(x)) if read else None
        watch = self.manner.watch()
        out, perturbed = denoise_with_branch(denoise, x, sigma, cond=cond, branch=Branch(
            topology=self.topology, key_value_inputs=self.key_value_inputs,
            rows=conds if self.plan.pag_scale else (), perturbed=self.plan.perturbed,
            settings=self.plan.settings, capture=capture, read=self.plan.read, manner=self.manner, watch=watch,
            trusted=self._tried, space=self.space, say_failure=self._fail,
        ))
        kept = out.clone()  # other extensions may change the host's tensor in place
        self._out |= {row: kept[index] for index, row in enumerate(rows)}
        for number, index in enumerate(conds if perturbed is not None else ()):
            assert perturbed is not None
            own, other = guidance.working_precision(kept[index]), guidance.working_precision(perturbed[number])
            self._pag[rows[index]] = own - other
        if capture is not None:
            self._read_calls.append(_ReadCall(denoise, x, sigma, cond, rows, read, capture, watch))
        return out

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason

    def see_mixed(self, predictions: Tensor) -> None:
        """After others have seen the step's predictions: where they have mixed a sub-prompt's with the unconditional
        one, as regional prompts do, its guidance gets the same share as its part of CFG.

        ``predictions`` are those that the host goes on with: every sub-prompt of each image, at the end the
        unconditional rows.
        """
        conds, images = sorted(self.rows.conds, key=lambda row: (row.image, row.prompt)), self.rows.images
        if len(conds) == images or len(predictions) < len(conds) + images or self.failure:
            return
        for row, changed in zip(conds, predictions[: len(conds)], strict=True):
            base = predictions[len(predictions) - images + row.image]
            share = guidance.share_left(changed, own=self._out[row], base=base)
            if share is not None:
                self._shares[row] = share

    def _weight(self, row: Row) -> Tensor | float:
        """With what a sub-prompt enters, as in CFG: a number, or a map of its region."""
        return row.weight * self._shares[row] if row in self._shares else row.weight

    def _pag_deltas(self) -> dict[int, Tensor]:
        """PAG's scale * (cond - perturbed) of each image, each sub-prompt's own entering with its weight."""
        deltas: dict[int, Tensor] = {}
        for row, difference in self._pag.items():
            delta = self.plan.pag_scale * self._weight(row) * difference
            deltas[row.image] = deltas[row.image] + delta if row.image in deltas else delta
        return deltas

    def _rows_to_read(self, rows: Sequence[Row]) -> list[int]:
        """SAG reads the unconditional rows; a call without any may be all there is, so then the conditional ones."""
        uncond = [index for index, row in enumerate(rows) if row.role == "uncond"]
        if uncond or any(call.role == "uncond" for call in self._read_calls):
            return uncond
        first = self.rows.first_conds()
        return [index for index, row in enumerate(rows) if row in first]

    def finish(self) -> None:
        """After the step's last denoiser call: SAG's second prediction, at the degraded picture.

        Raises ``RuntimeError`` if the host's calls did not carry the rows that it announced, ``MergedTokensError`` as
        ``attention_mask`` does.
        """
        seen = {role: [row for row in self._out if row.role == role] for role in ("cond", "uncond")}
        if len(seen["cond"]) != len(self.rows.conds) or len(seen["uncond"]) not in (0, self.rows.images):
            raise RuntimeError(f"the denoiser was called with {len(self._out)} rows of {len(self.rows.rows)}")
        base = "uncond" if seen["uncond"] else "cond"
        for call in self._read_calls:
            if call.role == base and not self.failure:
                self._sag |= self._degraded(call)
        self._read_calls.clear()

    def _degraded(self, call: _ReadCall) -> dict[int, _Sag]:
        """SAG's guidance of the images whose rows a call has read."""
        received, size, settings = call.capture.received, call.capture.size, self.plan.settings
        assert received is not None  # the branch checks that the attention ran
        assert size is not None
        x, sigma = call.of_rows(call.x), call.of_rows(call.sigma)
        images = [call.rows[index].image for index in call.read]
        out = torch.stack([self._out[call.rows[index]] for index in call.read])
        mask = guidance.attention_mask(received, size=size, threshold=settings.sag_threshold, latent_size=_size(x))
        x0 = self.space.denoised(x, out, sigma)
        degraded = guidance.degrade(x0, mask.to(x0.dtype), sigma=settings.sag_blur_sigma, circular=self.circular)
        change = degraded - x0
        degraded_out = self._denoise_degraded(self.space.renoised(x, change, sigma), call)
        direction = self.space.sag_direction(
            guidance.working_precision(out), guidance.working_precision(degraded_out),
            guidance.working_precision(change),
        )
        delta = self.plan.sag_scale * direction
        return {
            image: _Sag(delta[row], received[row].view(size), mask[row, 0]) for row, image in enumerate(images)
        }

    def _denoise_degraded(self, degraded: Tensor, call: _ReadCall) -> Tensor:
        if self.manner.degraded == "apart":
            with call.watch.own_call(call.read, same_picture=False):
                return call.denoise(degraded, call.of_rows(call.sigma), cond=call.of_rows(call.cond))
        x = call.x.clone()
        x[list(call.read)] = degraded
        with call.watch.own_call(range(len(x)), same_picture=False):
            out: Tensor = call.of_rows(call.denoise(x, call.sigma, cond=call.cond))
        return out

    @property
    def seen_by_sag(self) -> SagView | None:
        """What SAG saw in this step, if it did anything."""
        if not self._sag:
            return None
        made = [self._sag[image] for image in range(self.rows.images)]
        return SagView(torch.stack([m.attention for m in made]).cpu(), torch.stack([m.mask for m in made]).cpu())

    def delta(self) -> Tensor:
        """The sum of both guidances, ``(images, channels, height, width)``, in the sampler's space."""
        sag = {image: made.delta for image, made in self._sag.items()}
        images = range(self.rows.images)
        deltas = [torch.stack([own[image] for image in images]) for own in (sag, self._pag_deltas()) if own]
        return torch.stack(deltas).sum(dim=0)

    def apply(
        self, combined: Tensor, *, factor: float = 1.0, weight: Tensor | None = None,
        blend: guidance.Blend | None = None,
    ) -> Tensor:
        """``combined``, the host's result after CFG (and blending), with the guidance added.

        ``factor`` multiplies the guidance (``DDIM CFG++`` shrinks CFG's scale, and ours with it); ``weight`` is 1
        where an inpainted picture is made anew, 0 where it is protected; ``blend`` is how the host has blended both, if
        not by that alone. A step that can't be guided stays as it is.
        """
        if self.failure:
            return combined
        settings = self.plan.settings
        uncond = self._uncond()
        first = torch.stack([self._out[row] for row in self.rows.first_conds()])
        cond = self._combined_cond(first if uncond is None else uncond)
        return guidance.add_guidance(
            combined, self.delta() * factor, cond=cond, uncond=uncond, rescale=settings.rescale,
            mode=settings.rescale_mode, weight=weight, blend=blend,
        )

    def _uncond(self) -> Tensor | None:
        by_image = {row.image: out for row, out in self._out.items() if row.role == "uncond"}
        return torch.stack([by_image[image] for image in range(self.rows.images)]) if by_image else None

    def _combined_cond(self, base: Tensor) -> Tensor:
        """The conditional prediction: with ``AND`` the weighted sum of the sub-prompts' differences from ``base``."""
        conds = self.rows.conds
        if all(row.weight == 1 for row in conds) and len(conds) == self.rows.images:
            return torch.stack([self._out[row] for row in self.rows.first_conds()])
        result = list(base)
        for row in conds:
            result[row.image] = result[row.image] + self._weight(row) * (self._out[row] - base[row.image])
        return torch.stack(result)


def _size(x: Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])
