"""Hypernetworks: here functions from tokens to what keys and values are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Hypernetwork = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def apply_hypernetworks(hypernetworks: Sequence[Hypernetwork], context: Tensor) -> tuple[Tensor, Tensor]:
    k = v = context
    for network in hypernetworks:
        k, v = network(k, v)
    return k, v
