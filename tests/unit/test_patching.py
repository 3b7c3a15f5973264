"""A replaced ``forward`` is given back exactly, whatever stood there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_pag.engine.patching import Forward, forward_replaced, is_replaced


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def plus(number: float) -> Any:
    return lambda host: lambda x: host(x) + number


ONE = torch.ones(1)


def test_the_classes_own() -> None:
    module = Double()
    before = dict(vars(module))
    with forward_replaced(module, plus(1)):
        assert module(ONE) == 3
        assert Double()(ONE) == 2
    assert vars(module) == before
    assert "forward" not in vars(module)


def test_one_put_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """As attention optimisations do, here while the replacement is on."""
    module = Double()
    monkeypatch.setattr(Double, "forward", lambda self, x: 5 * x)
    with forward_replaced(module, plus(1)):
        assert module(ONE) == 6
        monkeypatch.setattr(Double, "forward", lambda self, x: 7 * x)
    assert module(ONE) == 7


def test_one_on_the_instance() -> None:
    """As other extensions do."""
    module = Double()

    def theirs(x: Tensor) -> Tensor:
        return 9 * x

    module.forward = theirs  # type: ignore[method-assign]
    with forward_replaced(module, plus(1)):
        assert module(ONE) == 10
    assert vars(module)["forward"] is theirs


def test_nested() -> None:
    module = Double()
    with forward_replaced(module, plus(1)):
        with forward_replaced(module, lambda host: lambda x: 10 * host(x)):
            assert module(ONE) == 30
        assert module(ONE) == 3
    assert "forward" not in vars(module)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_given_back_after_an_exception(error: type[BaseException]) -> None:
    module = Double()
    with pytest.raises(error), forward_replaced(module, plus(1)):
        raise error
    assert "forward" not in vars(module)


def test_given_back_after_the_module_raised() -> None:
    def failing(host: Forward) -> Forward:
        def forward(x: Tensor) -> Tensor:
            raise MemoryError

        return forward

    module = Double()
    with pytest.raises(MemoryError), forward_replaced(module, failing):
        module(ONE)
    assert module(ONE) == 2


def test_nothing_is_replaced_if_making_the_replacement_fails() -> None:
    def make(host: Forward) -> Forward:
        raise ValueError

    module = Double()
    with pytest.raises(ValueError), forward_replaced(module, make):  # noqa: PT011
        pass
    assert "forward" not in vars(module)


def test_someone_elses_replacement_made_meanwhile_stays() -> None:
    """Another extension may install itself in the same callback, after this one; that is not this one's to undo."""
    module = Double()

    def theirs(x: Tensor) -> Tensor:
        return 9 * x

    with forward_replaced(module, plus(1)):
        module.forward = theirs  # type: ignore[method-assign]
    assert module(ONE) == 9


def test_hooks_still_run() -> None:
    """Low-memory modes move modules about in hooks."""
    module, seen = Double(), []
    module.register_forward_pre_hook(lambda *_: seen.append(1))
    with forward_replaced(module, plus(1)):
        module(ONE)
    assert seen == [1]


def test_is_replaced() -> None:
    module = Double()
    assert not is_replaced(module, "forward")
    assert not is_replaced(module, "_forward")
    module.forward = module.forward  # type: ignore[method-assign]
    assert not is_replaced(module, "forward")  # given back by someone who does not know ``del``
    with forward_replaced(module, plus(1)):
        assert is_replaced(module, "forward")
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert is_replaced(module, "forward")
    assert not is_replaced(Double(), "forward")
