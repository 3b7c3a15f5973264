"""Floating-point operations of layers, counted from their shapes; a multiply-add is two."""

from __future__ import annotations

from torch import nn


def linear_size(layer: nn.Module) -> tuple[int, int] | None:
    """The features that a Linear layer takes and puts out, ``None`` for any other layer.

    Forks have classes of their own that are no ``nn.Linear``; one for quantised weights knows only its weight's shape.
    """
    if not isinstance(layer, nn.Linear) and type(layer).__name__ != "Linear":
        return None
    if hasattr(layer, "in_features"):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    weight = layer.weight
    out, taken = getattr(getattr(weight, "quant_state", weight), "shape")  # noqa: B009 - mypy takes it for a module
    return int(taken), int(out)


def linear_operations(module: nn.Module, tokens: int) -> int:
    """Of all Linear layers in ``module`` on so many tokens."""
    sizes = [size for layer in module.modules() if (size := linear_size(layer)) is not None]
    return sum(2 * taken * out * tokens for taken, out in sizes)


def convolution_operations(module: nn.Module, size: tuple[int, int]) -> int:
    """Of all two-dimensional convolutions in ``module`` that put out so many rows and columns."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return sum(2 * layer.weight.numel() * size[0] * size[1] for layer in layers)


def attention_channels(attention: nn.Module) -> int:
    """The channels of each of a self-attention's tokens."""
    size = linear_size(attention.get_submodule("to_q"))
    assert size is not None
    return size[0]


def map_operations(attention: nn.Module, queries: int, keys: int) -> int:
    """The product of queries and keys; that of the map and the values is as much."""
    size = linear_size(attention.get_submodule("to_q"))
    assert size is not None
    return 2 * queries * keys * size[1]
