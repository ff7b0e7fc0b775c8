"""Fixtures that the tests with several processes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.workers import WorkerPool


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    """Two processes for the tests of a file."""
    with WorkerPool(2) as pool:
        yield pool
