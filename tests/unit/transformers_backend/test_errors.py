"""What a rank reports of an error, to the elastic agent's file and without one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from transformers_backend import train
from transformers_backend.errors import report


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


_RESET = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9351: Connection reset by peer. "
    "This is typically caused by a remote worker hanging or bugs in the application."
)


@pytest.mark.parametrize(
    ("error", "kind", "message", "stack"),
    [
        (FileNotFoundError(2, "No such file", "x"), "user", "[Errno 2] No such file: 'x'", "[Errno 2]"),
        (ValueError("from a library"), "defect", "ValueError: from a library", "Traceback"),
        (
            RuntimeError(_RESET),
            "peer",
            "the connection to another rank broke (Read error [127.0.0.1]:9351: Connection reset by peer)",
            "the connection",
        ),
        (
            RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"),
            "peer",
            "another rank did not answer in time (Timed out waiting 3000ms for recv operation)",
            "another rank",
        ),
        (RuntimeError("mat1 and mat2"), "defect", "RuntimeError: mat1 and mat2", "Traceback"),
    ],
)
def test_the_error_file_says_what_kind_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, message: str, stack: str
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert report(_raised(error))
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert written["message"] == message
    assert written["extraInfo"]["kind"] == kind
    assert written["extraInfo"]["py_callstack"].startswith(stack)


def test_without_an_error_file_ranks_say_it_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    error = _raised(OSError("first line\nsecond line"))
    for rank, said in (("0", "error: first line\nsecond line\n"), ("1", "error: rank 1: first line\n")):
        monkeypatch.setenv("RANK", rank)
        assert report(error)
        assert capsys.readouterr().err == said
    assert not report(_raised(KeyError("a defect"))), "Python shows the traceback"


def test_a_failed_run_is_closed_and_has_its_own_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Trainer:
        closed = 0

        def __init__(self, config: object) -> None:
            pass

        def train(self) -> None:
            raise OSError(28, "No space left on device", "checkpoint")

        def close(self) -> None:
            Trainer.closed += 1

    monkeypatch.setattr(train, "Trainer", Trainer)
    monkeypatch.setattr(train, "load_job_config", lambda arguments: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert train.main([]) == train.FAILED
    assert Trainer.closed == 1
    assert "No space left on device" in (tmp_path / "error.json").read_text()
    monkeypatch.setattr(Trainer, "__init__", lambda self, config: os.stat("/no/such/model"))
    assert train.main([]) == train.CANNOT_WORK
    assert Trainer.closed == 1
