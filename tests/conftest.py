"""What all tests share: one thread, and hypothesis that tries the same examples on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "same everywhere", derandomize=True, deadline=None, database=None, max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("same everywhere")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Commands may change the number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
