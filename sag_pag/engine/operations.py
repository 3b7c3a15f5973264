"""Floating-point operations of layers, counted from their shapes; a multiply-add is two."""

from __future__ import annotations

from torch import nn


def linear_operations(module: nn.Module, tokens: int) -> int:
    """Of all Linear layers in ``module`` on so many tokens."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(2 * layer.in_features * layer.out_features * tokens for layer in layers)


def convolution_operations(module: nn.Module, size: tuple[int, int]) -> int:
    """Of all two-dimensional convolutions in ``module`` that put out so many rows and columns."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return sum(2 * layer.weight.numel() * size[0] * size[1] for layer in layers)


def map_operations(attention: nn.Module, queries: int, keys: int) -> int:
    """The product of queries and keys; that of the map and the values is as much."""
    channels = attention.get_submodule("to_q").out_features
    return 2 * queries * keys * int(channels)  # type: ignore[arg-type]
