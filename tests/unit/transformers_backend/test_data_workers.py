"""Worker processes: they outlive signals that end a run in order, end with the trainer, and die with a killed one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.texts import build_batches, write_text_files
from transformers_backend.data import workers

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and prctl")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text_files(tmp_path / "texts", ["some words " * number for number in range(1, 30)])


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "some": 1, "words": 2, "</s>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_a_real_tokenizer_gets_a_worker_and_bytes_none(text: Path, capfd: pytest.CaptureFixture[str]):
    before = multiprocessing.active_children()
    assert build_batches(text).feeds.num_workers == 0
    assert multiprocessing.active_children() == before
    batches = build_batches(text, tokenizer=word_tokenizer())
    assert batches.feeds.num_workers == 1
    (worker,) = (process for process in multiprocessing.active_children() if process not in before)
    list(islice(batches, 20))
    batches.close()
    assert not worker.is_alive()
    assert capfd.readouterr().err == "", "no warning about tokenizers in forked processes"


@LINUX
def test_signals_to_the_process_group_leave_workers_at_work(text: Path):
    before = multiprocessing.active_children()
    batches = build_batches(text, num_workers=2)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    assert len(processes) == 2
    next(batches)
    for process in processes:
        subprocess.run(["kill", "-INT", str(process.pid)], check=True)
        subprocess.run(["kill", "-TERM", str(process.pid)], check=True)  # not the trainer's own
    list(islice(batches, 400))  # more than was read ahead
    assert all(process.is_alive() for process in processes)
    batches.close()
    assert not any(process.is_alive() for process in processes)


def test_a_worker_that_hangs_is_killed(text: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers.CollectionReader, "__getitem__", lambda self, request: time.sleep(1000))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    reader = workers.CollectionReader([])
    iterator = workers.WorkerIterator(reader, iter(range(5)), num_workers=1, prefetch_factor=2)
    (process,) = iterator._workers
    iterator.close()
    assert not process.is_alive()


def test_the_random_numbers_of_a_run_are_its_own(text: Path):
    state = torch.get_rng_state()
    batches = build_batches(text, num_workers=1)
    next(batches)
    batches.close()
    assert torch.equal(torch.get_rng_state(), state)


@LINUX
def test_workers_die_with_a_killed_trainer_and_say_nothing_at_an_exit(text: Path, tmp_path: Path):
    """A program with two workers, once killed and once ended by an exception, without `close`."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import multiprocessing, sys, time
        from tests.texts import build_batches
        from pathlib import Path
        batches = build_batches(Path({str(text)!r}), num_workers=2)
        next(batches)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        if sys.argv[1] == "wait":
            time.sleep(1000)
        raise SystemExit(3)
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(program), way],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for way in ("wait", "leave")
    ]  # fmt: skip
    killed, left = started
    pids = [int(pid) for process in started for pid in process.stdout.readline().split()]
    assert len(pids) == 4, [process.communicate() for process in started if process.poll() is not None]
    killed.kill()
    _, message = left.communicate(timeout=60)
    assert (left.returncode, message) == (3, "")
    killed.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, pids))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_batches_that_are_dropped_end_their_workers_at_once(text: Path, monkeypatch: pytest.MonkeyPatch):
    """Without being told, workers look every 5 seconds for a parent that has ended; here they would not for long."""
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 1000.0)
    batches = build_batches(text, num_workers=1)
    (process,) = batches.feeds._workers._workers
    next(batches)
    del batches
    process.join(timeout=60)
    assert process.exitcode == 0, "it was told, and not killed"
