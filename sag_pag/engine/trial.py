"""Whether a call can be made once more at all, beside somebody of whom that is not known.

It is tried: the host's call is made again and what the model predicted in both is compared. In half precision the same
call may come out a little otherwise, where attention is summed in other pieces as memory is free; a row that somebody
takes for another is off by as much as it is large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sag_pag.engine.calls import Trust, Watch
from sag_pag.engine.patching import Forward, forward_replaced
from sag_pag.guidance import working_precision

logger = logging.getLogger(__name__)

REPRODUCED = 1e-3
"""How far, by mean square and relative to itself, a row's prediction may be from the first: devices are not exact."""
IN_HALF = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same, where the network computes in half precision."""


def try_again(
    trust: Trust, watch: Watch, network: nn.Module, out: Tensor, *, predicted: Callable[[Tensor], Tensor],
    call: Callable[[], Tensor],
) -> None:
    """Makes the host's ``call``, which gave ``out``, once more, and notes in ``trust`` what came of it.

    ``predicted`` tells what the ``network`` itself predicted where the call gave that.
    """
    first, dtypes = out.clone(), [out.dtype]
    try:
        with watch.own_call(range(len(out)), same_picture=True), forward_replaced(network, partial(_noting, dtypes)):
            second = call()
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever somebody unknown fails with
        logger.warning("a call of the model made once more failed", exc_info=True)
        trust.reproduces, trust.because = False, f"a call made once more failed with {type(error).__name__}"
        return
    tolerance = max(IN_HALF.get(dtype, REPRODUCED) for dtype in dtypes)
    near = second.shape == first.shape and _are_near(predicted(first), predicted(second), tolerance)
    trust.reproduces, trust.because = near, "" if near else "a call made once more gives something else"


def _noting(dtypes: list[torch.dtype], host: Forward) -> Forward:
    """What a network computes in is seen by what it puts out: what is made of that may be of another type."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = host(*args, **kwargs)
        if isinstance(out, Tensor):
            dtypes.append(out.dtype)
        return out

    return forward


def _are_near(first: Tensor, second: Tensor, tolerance: float) -> bool:
    first, second = (working_precision(value).flatten(1) for value in (first, second))
    return bool(((second - first).norm(dim=1) <= tolerance * first.norm(dim=1)).all())
