"""Fixtures of the trainer's tests and of the data's: a process left as it was, copies of `datasets`, a local hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.jobs import restored_process


@pytest.fixture
def process() -> Iterator[None]:
    """A trainer sets up logging and determinism for its process; the next test starts from neither."""
    with restored_process():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies that `datasets` makes of local files inside the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def hub(cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub id "hub/NAME" is the folder NAME of the test's own folder."""
    import datasets

    load_dataset = datasets.load_dataset

    def from_folder(path: str, **keywords):
        return load_dataset(str(tmp_path / path.removeprefix("hub/")), **keywords)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
