"""Fixtures that the tests with several processes share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.workers import WorkerPool


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    """Two processes for the tests of a file."""
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    """Four processes for the tests of a file."""
    with WorkerPool(4) as pool:
        yield pool


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """What `tiny_job` trains on, in "text", and a text that it can be validated on."""
    (tmp_path / "text").mkdir()
    for number in range(8):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(12))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    (tmp_path / "held_out.txt").write_text("something else, of a length that no block divides" * 5)
    return str(tmp_path)
