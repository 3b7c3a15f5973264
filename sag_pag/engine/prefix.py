"""What runs before the first perturbed attention: computed once, for the host's rows, and put out for ours too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from sag_pag.engine.calls import NotRunError, Watch
from sag_pag.engine.patching import Forward, Hook, without_hooks
from sag_pag.engine.rows import copied, count_rows, join_rows, stacked_rows, take_rows

MakePrefixForward = Callable[[nn.Module, Forward], Forward]


def shared(total: int, rows: Sequence[int], *, stacked: bool) -> MakePrefixForward:
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


class Record:
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
def not_moved(modules: Sequence[nn.Module], moves: Callable[[Hook], bool]) -> Iterator[None]:
    """Modules that only put out what was recorded are not moved to the GPU for it; ``moves`` tells hooks that do so."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(without_hooks(module, moves))
        yield
