"""Folders: one name for what is whole, and one run at a time."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from transformers_backend import folders
from transformers_backend.folders import lock_folder, replace_folder


def test_a_folder_is_replaced_whole(tmp_path: Path):
    for name in ("run", "run.tmp", "run.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "run", tmp_path / "run.tmp")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "file").read_text() == "run.tmp"


def _hold(folder: Path, pids) -> None:
    with lock_folder(folder):
        worker = os.fork()  # as one that reads data, and outlives the process that started it
        if worker != 0:
            pids.send(worker)
        time.sleep(120)


def test_a_folder_has_one_owner_until_that_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    context = multiprocessing.get_context("fork")
    pids, other_end = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(tmp_path, other_end))
    process.start()
    worker = pids.recv()
    try:
        monkeypatch.setattr(folders, "PATIENCE_SECONDS", 0)
        with pytest.raises(ValueError, match=rf"in use by process {process.pid} on .*: two runs would") as caught:
            lock_folder(tmp_path).__enter__()
        assert str(tmp_path) in str(caught.value)
        holder = (tmp_path / ".lock").read_text().strip()
        monkeypatch.setattr(folders, "PATIENCE_SECONDS", 60)  # the run before may take a moment to die
        caplog.set_level(logging.WARNING)
        killing = threading.Timer(0.3, process.kill)
        killing.start()
        with lock_folder(tmp_path):
            assert caplog.messages == [f"{tmp_path} is in use by {holder}: waiting up to 60 s for it to end."]
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.join()
