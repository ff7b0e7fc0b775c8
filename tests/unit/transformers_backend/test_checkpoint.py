"""The folder of checkpoints without any process: which steps it holds, and which are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from transformers_backend.checkpoint import Checkpointer


def _checkpointer(folder: Path, keep_latest_k: int = 0) -> Checkpointer:
    return Checkpointer(
        folder, model=None, optimizers=[], schedulers=[], data=None, data_rank=0, keep_latest_k=keep_latest_k
    )


def test_steps_are_whole_checkpoints_in_order(tmp_path: Path):
    for name in ("step-10", "step-9", "step-100", "step-200.tmp", "step-11-hf", "step-", "step-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_text("written last")
    (tmp_path / "step-300").mkdir()  # without it a folder is no checkpoint
    assert _checkpointer(tmp_path).steps() == [9, 10, 100]
    assert _checkpointer(tmp_path / "absent").steps() == []


@pytest.mark.parametrize(("keep_latest_k", "left"), [(0, [1, 2, 10, 20]), (2, [10, 20]), (9, [1, 2, 10, 20])])
def test_old_ones_are_deleted(tmp_path: Path, keep_latest_k: int, left: list[int]):
    for step in (1, 2, 10, 20):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / ".metadata").write_text("x")
    for name in ("step-1-hf", "step-5.tmp", "notes"):
        (tmp_path / name).mkdir()
    checkpointer = _checkpointer(tmp_path, keep_latest_k)
    checkpointer._delete_old()
    assert checkpointer.steps() == left
    assert {"step-1-hf", "step-5.tmp", "notes"} <= {path.name for path in tmp_path.iterdir()}
