"""What a rank reports of an error, to the elastic agent's file and without one."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transformers_backend import train
from transformers_backend.checkpoint.writing import SaveError
from transformers_backend.errors import is_meant_for_the_user, report
from transformers_backend.folders import lock_folder, replace_folder
from transformers_backend.job_config import JobConfig, Training, validate


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
        (SaveError("no space left"), "user", "no space left", "no space left"),
        (BrokenPipeError(32, "Broken pipe"), "defect", "BrokenPipeError: [Errno 32] Broken pipe", "Traceback"),
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
    error = _raised(SaveError("first line\nsecond line"))
    for rank, said in (("0", "error: first line\nsecond line\n"), ("1", "error: rank 1: first line\n")):
        monkeypatch.setenv("RANK", rank)
        assert report(error)
        assert capsys.readouterr().err == said
    assert not report(_raised(KeyError("a defect"))), "Python shows the traceback"


def _raised_in(package: str, code: str) -> OSError:
    """What `code` raises as a module of `package`, of which no more than the name is made."""
    namespace = {"__name__": f"{package}.somewhere"}
    try:
        exec(code, namespace)
    except OSError as error:
        return error
    raise AssertionError("nothing was raised")


def test_an_os_error_is_for_the_user_where_this_project_or_a_loader_raised_it(tmp_path: Path) -> None:
    """Not one of a library's sockets, pipes or workers, whose traceback is needed."""
    with pytest.raises(FileNotFoundError) as missing, lock_folder(tmp_path / "missing"):
        pass
    assert is_meant_for_the_user(missing.value)
    with pytest.raises(FileNotFoundError) as missing:  # raised in pathlib, for the function that called it
        replace_folder(tmp_path / "folder", tmp_path / "missing")
    assert is_meant_for_the_user(missing.value)
    message = "raise OSError('no/model is not a local folder and is not a valid model identifier')"
    assert is_meant_for_the_user(_raised_in("transformers", message))
    assert is_meant_for_the_user(_raised_in("huggingface_hub", "import pathlib; pathlib.Path('/no/x').read_text()"))
    assert not is_meant_for_the_user(_raised_in("torch", message))
    assert not is_meant_for_the_user(_raised_in("torch", "open('/no/such/file')"))


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


def _fails(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("set_up", "status"),
    [
        (lambda: validate(JobConfig(training=Training(steps=0)), world_size=1), train.CANNOT_WORK),
        (lambda: importlib.import_module("no_such_package"), train.FAILED),  # not this project's word
        (lambda: json.loads("a library's ValueError"), train.FAILED),
        (lambda: _fails(KeyError("a defect")), train.FAILED),
        (lambda: os.stat("/no/such/model"), train.FAILED),
        (lambda: _fails(RuntimeError(_RESET)), train.FAILED),  # a lost rank
        (lambda: _fails(torch.OutOfMemoryError("CUDA out of memory")), train.FAILED),
    ],
    ids=["refused", "import", "value", "key", "file", "peer", "memory"],
)
def test_only_a_refused_job_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, set_up: Callable[[], object], status: int
) -> None:
    monkeypatch.setattr(train, "Trainer", lambda config: set_up())
    monkeypatch.setattr(train, "load_job_config", lambda arguments: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert train.main([]) == status
    assert (tmp_path / "error.json").is_file()
