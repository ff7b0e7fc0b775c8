"""Checkpoints of a trainer in this process: beside training, where a run starts from, what is damaged, a full disk."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer, load_job_config
from transformers_backend.checkpoint import SaveError
from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.checkpoint.reading import LoadError
from transformers_backend.checkpoint.storage import NamesTheFile
from transformers_backend.job_config import validate

pytestmark = pytest.mark.usefixtures("process")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    (tmp_path / "text").mkdir()
    for number in range(6):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(12))
        (tmp_path / "text" / f"{number}.txt").write_text(text)

    def make(folder: str = "run", **changes) -> JobConfig:
        return tiny_job(tmp_path, folder, **{"checkpoint__enable": True, "checkpoint__interval": 2, **changes})

    return make


def _run(config: JobConfig) -> Trainer:
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def _folder(config: JobConfig) -> Path:
    return Path(config.job.dump_folder) / "checkpoint"


def _names(config: JobConfig) -> set[str]:
    return {path.name for path in _folder(config).iterdir()}


def _assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


# -- beside training ------------------------------------------------------------------------------------------------


def test_staging_is_on_the_device_of_its_rank(job, monkeypatch: pytest.MonkeyPatch):
    """A new thread is on device 0, wherever the rank is, and waits for the copies of that device."""
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((device, threading.current_thread().name))
    )
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(calls.append(stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "computation")
    trainer = Trainer(job(checkpoint__async_mode="async"))
    stream = SimpleNamespace(device="cuda:3", wait_stream=calls.append)
    trainer.checkpointer._writer._stream = stream
    trainer.checkpointer.save(1)
    trainer.checkpointer.wait()
    assert calls == ["computation", ("cuda:3", "save step-1"), stream]
    trainer.close()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes nothing before the event."""
    create_stream, answers = NamesTheFile.create_stream, threading.Event()

    def slowly(self, path, mode):
        if mode == "wb":
            assert answers.wait(timeout=120)
        return create_stream(self, path, mode)

    monkeypatch.setattr(NamesTheFile, "create_stream", slowly)
    return answers


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_save_beside_training_is_of_its_step(job, slow_disk: threading.Event, mode: str):
    """It is still being written when the next steps change the weights; a resume from it is that of a held run."""
    held, beside = job("held", training__steps=6), job("beside", training__steps=6, checkpoint__async_mode=mode)
    slow_disk.set()
    expected = _run(held).model.full_state_dict()
    slow_disk.clear()
    trainer = Trainer(beside)
    for _ in range(2):
        trainer.train_step()
    trainer.checkpointer.save(2)
    trainer.train_step()
    trainer.train_step()
    assert trainer.checkpointer.steps() == [], "two steps went by"
    threading.Timer(0.2, slow_disk.set).start()
    trainer.close()
    assert trainer.checkpointer.steps() == [2], "close waits for it"
    resumed = _run(beside)
    _assert_equal(resumed.model.full_state_dict(), expected)
    assert resumed.checkpointer.steps() == [2, 4, 6]


@pytest.mark.alone
def test_a_save_beside_training_does_not_hold_the_step(job):
    """26 million parameters and their AdamW state, 0.3 GB, to a real disk; the copy is made during the next step.

    The best of a few tries counts, as other work may share the cores.
    """
    held = {}
    for mode in ("disabled", "async", "async", "async"):
        config = job(mode, checkpoint__async_mode=mode, training__seq_len=128, training__local_batch_size=4)
        shutil.rmtree(_folder(config), ignore_errors=True)
        config.hf_transformers.config_overrides |= {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4,
        }  # fmt: skip
        trainer = Trainer(config)
        trainer.train_step()
        wait_until_staged, waits = trainer.checkpointer.wait_until_staged, []

        def timed(wait=wait_until_staged, waits=waits) -> None:
            start = time.perf_counter()
            wait()
            waits.append(time.perf_counter() - start)

        trainer.checkpointer.wait_until_staged = timed
        start = time.perf_counter()
        trainer.checkpointer.save(1)
        seconds = time.perf_counter() - start
        if mode == "async":
            trainer.train_step()
        held[mode] = min(seconds + sum(waits), held.get(mode, math.inf))
        trainer.close()
        assert trainer.checkpointer.steps() == [1]
        written = sum(file.stat().st_size for file in (_folder(config) / "step-1").iterdir())
        assert written > 300e6
        if mode == "async" and held["async"] <= 0.1 * held["disabled"]:
            break
    assert held["async"] <= 0.1 * held["disabled"], held


def test_the_end_of_a_run_waits_for_a_slow_storage(job, slow_disk: threading.Event):
    trainer = Trainer(job(checkpoint__async_mode="async"))
    trainer.checkpointer.save(1)
    trainer.job_config.comm.train_timeout_seconds = 0.05
    threading.Timer(0.3, slow_disk.set).start()
    trainer.close()
    assert trainer.checkpointer.steps() == [1]


def test_a_defect_in_a_save_beside_training_shows_its_traceback(job, monkeypatch, caplog: pytest.LogCaptureFixture):
    def defect(self, name):
        raise KeyError("defect")

    monkeypatch.setattr(LocalStorage, "begin", defect)
    trainer = Trainer(job(checkpoint__async_mode="async"))
    trainer.checkpointer.save(1)
    with pytest.raises(KeyError):
        trainer.checkpointer.wait()
    assert "in defect" in caplog.text
    trainer.close()


def test_the_weights_wait_until_they_are_copied(job, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(job(checkpoint__async_mode="async"))
    trainer.train_step()
    stage, copied = trainer.checkpointer._writer._stager.stage, []

    def slowly(state):
        time.sleep(0.5)
        copied.append(time.perf_counter())
        return stage(state)

    monkeypatch.setattr(trainer.checkpointer._writer._stager, "stage", slowly)
    before = trainer.model.full_state_dict()
    trainer.checkpointer.save(1)
    optimizer_step, stepped = trainer.optimizers[0].step, []
    monkeypatch.setattr(
        trainer.optimizers[0], "step", lambda **_: (stepped.append(time.perf_counter()), optimizer_step())[1]
    )
    trainer.train_step()
    assert copied[0] < stepped[0]
    trainer.checkpointer.wait()
    assert trainer.checkpointer.load(1) == 1
    _assert_equal(trainer.model.full_state_dict(), before)
    trainer.close()


def test_the_oldest_go_also_those_set_aside(job):
    config = job(checkpoint__interval=1, checkpoint__keep_latest_k=2, checkpoint__async_mode="async")
    _run(job(training__steps=1, checkpoint__interval=1))
    for step in (20, 30, 40):
        (_folder(config) / f"step-{step}.abandoned").mkdir()
    _run(config)
    assert _names(config) == {"step-5", "step-6", "step-30.abandoned", "step-40.abandoned"}


# -- where a run starts from ----------------------------------------------------------------------------------------


def test_every_checkpoint_brings_the_job_along(job):
    config = job(training__steps=2)
    _run(config)
    assert load_job_config([str(_folder(config) / "step-2" / "config.toml")]) == config


def test_a_seed_is_what_any_run_starts_from(job, tmp_path: Path):
    seed, plain = job("seed", checkpoint__create_seed_checkpoint=True), job("plain", training__steps=2)
    assert _run(seed).step == 0
    assert _names(seed) == {"step-0"}
    expected = _run(plain).model.full_state_dict()
    from_seed = job("seed", training__steps=2)
    from_seed.debug.seed = plain.debug.seed
    trainer = _run(from_seed)
    assert trainer.step == 2
    _assert_equal(trainer.model.full_state_dict(), expected)


def test_a_seed_is_written_by_one_process():
    config = load_job_config(["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"])
    validate(config, world_size=1)
    with pytest.raises(ValueError, match="create_seed_checkpoint = true: needs one process, and there are 2 ranks"):
        validate(config, world_size=2)


def test_a_run_starts_from_the_checkpoint_of_another(job, caplog: pytest.LogCaptureFixture):
    first = job("first", training__steps=4)
    weights = _run(first).model.full_state_dict()
    path = str(_folder(first) / "step-4")
    weights_only = Trainer(job("weights", checkpoint__initial_load_path=path, debug__seed=9))
    assert weights_only.step == 0
    _assert_equal(weights_only.model.full_state_dict(), weights)
    assert not [state for state in weights_only.optimizers[0].state.values() if state["exp_avg"].any()]
    weights_only.close()
    everything = job("all", checkpoint__initial_load_path=path, checkpoint__initial_load_model_only=False)
    trainer = _run(everything)
    _assert_equal(trainer.model.full_state_dict(), _run(job("first")).model.full_state_dict())
    assert _names(everything) == {"step-6"}
    with caplog.at_level(logging.INFO):
        assert _run(everything).step == 6
    assert "initial_load_path is not read: this run has checkpoints of its own" in caplog.text
    with pytest.raises(ValueError, match=r'initial_load_path = ".*nowhere/step-1": there is no such checkpoint. Name'):
        Trainer(job("other", checkpoint__initial_load_path="nowhere/step-1"))


def test_a_home_folder_is_found(job, monkeypatch: pytest.MonkeyPatch):
    first = job("first", training__steps=2)
    _run(first)
    monkeypatch.setenv("HOME", first.job.dump_folder)
    _run(job("second", checkpoint__initial_load_path="~/checkpoint/step-2", training__steps=1))


def test_a_run_starts_from_a_hugging_face_folder(job):
    first = job("first", training__steps=2, checkpoint__last_save_in_hf=True)
    weights = _run(first).model.full_state_dict()
    folder = str(_folder(first) / "step-2-hf")
    trainer = Trainer(job("second", checkpoint__initial_load_path=folder, checkpoint__initial_load_in_hf=True))
    _assert_equal(trainer.model.full_state_dict(), weights)
    assert trainer.step == 0
    trainer.close()


@pytest.mark.parametrize("part", ["model", "optimizer", "lr_scheduler", "dataloader", "train_state"])
def test_a_part_is_left_out(job, part: str):
    config = job(training__steps=4)
    before = _run(config)
    fresh = Trainer(job("fresh"))
    config.training.steps = 6
    config.checkpoint.exclude_from_loading = [part]
    trainer = Trainer(config)
    shown = {}
    for name, one in (("fresh", fresh), ("before", before), ("now", trainer)):
        averages = [state["exp_avg"].sum().item() for state in one.optimizers[0].state.values()]
        shown[name] = {
            "model": sum(value.double().sum().item() for value in one.model.full_state_dict().values()),
            "optimizer": sum(averages),
            "lr_scheduler": one.schedulers[0].last_epoch,
            "dataloader": str(one.data.state_dict()),
            "train_state": one.step,
        }
    for name, value in shown["now"].items():
        assert value == shown["fresh" if name == part else "before"][name], name
    trainer.close()
    if dist.is_initialized():
        fresh.close()


def test_load_only_saves_nothing_and_the_first_step_is_saved_when_asked(job):
    config = job(training__steps=3, checkpoint__enable_first_step_checkpoint=True)
    _run(config)
    assert _names(config) == {"step-1", "step-2", "step-3"}
    config.training.steps, config.checkpoint.load_only, config.checkpoint.load_step = 6, True, 1
    trainer = Trainer(config)
    assert not trainer.checkpointer.save_last(1)
    trainer.close()
    assert _run(config).step == 6
    assert _names(config) == {"step-1", "step-2", "step-3"}


def _branch(job, **changes) -> JobConfig:
    """A job that goes back to step 2 of one that came to step 6."""
    _run(job())
    return job(checkpoint__load_step=2, lr_scheduler__total_steps=6, optimizer__lr=2e-2, **changes)


def test_load_step_acts_once(job, caplog: pytest.LogCaptureFixture):
    """Restarts go on from the branch's own checkpoints; another job that names the step goes back to it."""
    config = _branch(job, training__steps=4)
    Trainer(config).close()
    assert _names(config) == {"step-2", "step-4.abandoned", "step-6.abandoned"}
    _run(config)
    with caplog.at_level(logging.INFO):
        trainer = Trainer(config)
    assert trainer.step == 4
    assert "step-4 was written by this job, so it goes on from there: checkpoint.load_step = 2" in caplog.text
    assert "step-4" in _names(config)
    trainer.close()
    config.optimizer.lr = 3e-2
    trainer = Trainer(config)
    assert trainer.step == 2
    trainer.close()


def test_exclude_from_loading_acts_once(job):
    _run(job(training__steps=2))
    config = job(training__steps=4, optimizer__lr=2e-2, checkpoint__exclude_from_loading=["dataloader"])
    trainer = _run(config)
    position = trainer.data.state_dict()
    config.training.steps = 6
    trainer = Trainer(config)
    assert trainer.step == 4
    assert trainer.data.state_dict() == position
    trainer.close()


@pytest.mark.parametrize("interval", [2, 6])
def test_what_a_run_starts_anew_from_is_kept_until_it_saves(job, interval: int):
    """Without the train state it begins at step 0, with all of the loaded weights behind it."""
    _run(job())
    config = job(
        checkpoint__exclude_from_loading=["train_state", "lr_scheduler"], checkpoint__interval=interval,
        training__steps=6, optimizer__lr=2e-2,
    )  # fmt: skip
    for _ in range(2):  # the first is lost before it saves
        trainer = Trainer(config)
        assert (trainer.step, "step-6" in _names(config)) == (0, True)
        trainer.close()
    trainer = Trainer(config)
    trainer.checkpointer.save(interval)
    trainer.close()
    left = {"step-2.abandoned", "step-4.abandoned", "step-6.abandoned", f"step-{interval}"}
    assert _names(config) == left
    trainer = Trainer(config)
    assert trainer.step == interval
    trainer.close()


def test_a_run_whose_checkpoints_are_all_set_aside_does_not_start_over(job):
    config = job(training__steps=2)
    _run(config)
    (_folder(config) / "step-2").rename(_folder(config) / "step-2.abandoned")
    with pytest.raises(ValueError, match=r"holds no whole checkpoint: step-2 was set aside as step-2\.abandoned\. "):
        Trainer(config)


def test_no_seed_is_made_of_a_run(job):
    _run(job(training__steps=2))
    trainer = Trainer(job(checkpoint__create_seed_checkpoint=True))
    with pytest.raises(ValueError, match=r"create_seed_checkpoint = true: .*checkpoint holds step-2, and a seed is"):
        trainer.train()
    trainer.close()


def test_settings_that_changed_are_told(job, caplog: pytest.LogCaptureFixture):
    _run(job(training__steps=2))
    config = job(training__steps=4, training__dtype="bfloat16", optimizer__lr=1e-3, training__gc_freq=7)
    with caplog.at_level(logging.WARNING):
        _run(config)
    changes = [text for text in caplog.messages if "was saved with another setting" in text]
    assert [text.rpartition("setting: ")[2] for text in changes] == [
        'training.dtype = "float32" there, "bfloat16" here.', "optimizer.lr = 0.01 there, 0.001 here."
    ]  # fmt: skip


def test_two_runs_in_one_folder_are_refused(job, monkeypatch: pytest.MonkeyPatch):
    def held(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("transformers_backend.folders.fcntl.lockf", held)
    monkeypatch.setattr("transformers_backend.folders.PATIENCE_SECONDS", 0)
    with pytest.raises(ValueError, match=r'job\.dump_folder = ".*run" is in use by another run: two runs would'):
        Trainer(job())
    assert not dist.is_initialized()


def test_another_number_of_sequences_in_a_step_is_told(job, caplog: pytest.LogCaptureFixture):
    _run(job(training__steps=2))
    with caplog.at_level(logging.WARNING):
        _run(job(training__steps=3, training__local_batch_size=1, training__global_batch_size=2))
        assert "sequences in an optimizer step" not in caplog.text
        _run(job(training__steps=4, training__local_batch_size=4))
    assert "was saved with another setting: 2 sequences in an optimizer step there, 4 here" in caplog.text


# -- damaged --------------------------------------------------------------------------------------------------------


def _no_index(folder: Path) -> None:
    (folder / ".metadata").unlink()


def _cut_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])


def _cut(folder: Path) -> None:
    with open(folder / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)


def _no_data(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def _overwritten(folder: Path) -> None:
    """As after a power failure: of the right length, but zeros."""
    (folder / "__0_0.distcp").write_bytes(bytes((folder / "__0_0.distcp").stat().st_size))


DAMAGES = [
    (_no_index, r"step-6 is damaged: \.metadata is missing"),
    (_cut_index, r"step-6 is damaged: \.metadata cannot be read \(.*pickle"),
    (_cut, r"step-6 is damaged: __0_0\.distcp has 1000 bytes of \d+"),
    (_no_data, r"step-6 is damaged: __0_0\.distcp is missing"),
    (_overwritten, r"step-6 is damaged: rank 0 cannot read .*step-6/__0_0\.distcp: "),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_names_the_file(job, caplog: pytest.LogCaptureFixture, damage, message: str):
    config = job()
    expected = _run(config).model.full_state_dict()
    damage(_folder(config) / "step-6")
    config.checkpoint.load_step = 6
    with pytest.raises(ValueError, match=message):
        Trainer(config)
    config.checkpoint.load_step = -1
    with caplog.at_level(logging.WARNING):
        trainer = _run(config)
    assert "The one before is tried" in caplog.text
    _assert_equal(trainer.model.full_state_dict(), expected)
    assert _names(config) == {"step-2", "step-4", "step-6", "step-6.abandoned"}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(job):
    config = job()
    _run(config)
    for step in (2, 4, 6):
        _cut(_folder(config) / f"step-{step}")
    with pytest.raises(ValueError, match=r"holds no whole checkpoint: .*step-6 is damaged.*step-2 is damaged"):
        Trainer(config)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_passing_error_sets_nothing_aside(job, monkeypatch: pytest.MonkeyPatch, file: str):
    """Neither the file system's nor that of memory says that a checkpoint is damaged."""
    config = job(training__steps=4)
    _run(config)
    plain = FileSystem.create_stream
    for failure, expected, message in (
        (OSError(errno.EIO, "Input/output error"), LoadError, rf"step-4 cannot be read: .*{file}: Input/output error"),
        (RuntimeError("can't allocate memory"), LoadError, rf"step-4 cannot be read: .*{file}: can't allocate"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
    ):

        @contextlib.contextmanager
        def failing(self, path, mode, failure=failure):
            with plain(self, path, mode) as stream:
                if Path(path).name == file:
                    raise failure
                yield stream

        monkeypatch.setattr(FileSystem, "create_stream", failing)
        with pytest.raises(expected, match=message):
            Trainer(config)
        assert _names(config) == {"step-2", "step-4"}
    monkeypatch.setattr(FileSystem, "create_stream", plain)
    trainer = Trainer(config)
    assert trainer.step == 4
    trainer.close()


# -- a disk that is full --------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A disk that is full while disk["full"]."""
    state = {"full": False}

    class Full:
        def __init__(self, stream) -> None:
            self.tell, self.flush, self.fileno, self.close = stream.tell, stream.flush, stream.fileno, stream.close

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    plain = FileSystem.create_stream

    @contextlib.contextmanager
    def maybe_full(self, path, mode):
        with plain(self, path, mode) as stream:
            yield Full(stream) if state["full"] and mode == "wb" else stream

    monkeypatch.setattr(FileSystem, "create_stream", maybe_full)
    return state


FULL = r"checkpoint .*run/checkpoint/step-4 could not be written \(rank 0: .*__0_0\.distcp: No space left on device\)"


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints(job, disk, mode: str):
    config = job(checkpoint__async_mode=mode)
    trainer = Trainer(config)
    trainer.checkpointer.save(2)
    trainer.checkpointer.wait()
    disk["full"] = True

    def save_and_go_on() -> None:
        trainer.checkpointer.save(4)
        trainer.train_step()  # beside training it goes on for now
        trainer.checkpointer.save(6)

    with pytest.raises(SaveError, match=FULL) as caught:
        save_and_go_on()
    trainer.close()
    assert "Earlier checkpoints are whole" in str(caught.value)
    assert 'checkpoint.on_save_error = "continue"' in str(caught.value)
    assert _names(config) == {"step-2"}


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_training_goes_on_where_the_job_says_so(job, disk, caplog: pytest.LogCaptureFixture, mode: str):
    config = job(checkpoint__async_mode=mode, checkpoint__on_save_error="continue")
    trainer = Trainer(config)
    trainer.checkpointer.save(2)
    trainer.checkpointer.wait()
    disk["full"] = True
    with caplog.at_level(logging.WARNING):
        trainer.checkpointer.save(4)
        trainer.checkpointer.wait()
    assert "step-4 could not be written (rank 0" in caplog.text
    assert "Training goes on without it" in caplog.text
    disk["full"] = False
    trainer.checkpointer.save_last(4)
    trainer.close()
    assert _names(config) == {"step-2", "step-4"}


def test_the_last_checkpoint_is_written_after_one_that_failed(job, disk, caplog: pytest.LogCaptureFixture):
    config = job(checkpoint__async_mode="async")
    trainer = Trainer(config)
    trainer.checkpointer.wait_until_staged()
    disk["full"] = True
    trainer.checkpointer.save(2)
    trainer.checkpointer._writer._in_flight.exception()
    disk["full"] = False
    with caplog.at_level(logging.WARNING):
        assert trainer.checkpointer.save_last(3)
    assert "step-2 could not be written" in caplog.text
    assert _names(config) == {"step-3"}
    trainer.close()


def test_the_last_checkpoint_must_be_written(job, disk):
    trainer = Trainer(job(training__steps=1, checkpoint__on_save_error="continue"))
    disk["full"] = True
    with pytest.raises(SaveError, match="step-1 could not be written"):
        trainer.train()
    trainer.close()


def test_a_disk_that_is_really_full(job, tmp_path: Path):
    """A RAM disk that holds one checkpoint and a half."""
    one = job("one", training__steps=2)
    _run(one)
    size = f"size={int(1.5 * sum(file.stat().st_size for file in (_folder(one) / 'step-2').iterdir()))}"
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", small], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a RAM disk")
    try:
        with pytest.raises(SaveError, match=r"small/step-4 could not be written \(rank 0: .*No space left on device"):
            _run(job(checkpoint__folder=str(small)))
        assert {path.name for path in small.iterdir()} == {"step-2", ".lock"}
        assert _run(job(checkpoint__folder=str(small), training__steps=2)).step == 2
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_checkpoint_that_cannot_be_deleted_stops_nothing(job, monkeypatch, caplog: pytest.LogCaptureFixture):
    def refuse(self, step, *, abandoned=False):
        raise PermissionError(errno.EACCES, "Permission denied", "step-1")

    monkeypatch.setattr(LocalStorage, "delete", refuse)
    with caplog.at_level(logging.WARNING):
        _run(job(checkpoint__interval=1, checkpoint__keep_latest_k=2, training__steps=3))
    assert "Old checkpoints could not be deleted: [Errno 13] Permission denied" in caplog.text


def test_a_folder_that_cannot_be_listed_is_told(job, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LocalStorage, "find", refuse)
    with pytest.raises(ValueError, match=r"checkpoint\.folder .* cannot be listed: .*Permission denied"):
        Trainer(job())


def test_a_moved_folder_of_checkpoints_is_still_one(job, tmp_path: Path):
    config = job(training__steps=4, lr_scheduler__total_steps=6)
    expected = _run(job("whole")).model.full_state_dict()
    _run(config)
    shutil.move(_folder(config), tmp_path / "elsewhere")
    trainer = _run(job(checkpoint__folder=str(tmp_path / "elsewhere")))
    _assert_equal(trainer.model.full_state_dict(), expected)


# -- optimizer state that not every parameter has -------------------------------------------------------------------


def _without_gradient(trainer: Trainer) -> None:
    """As in a model that does not use its last norm: no step ever sees a gradient of it."""
    optimizer, weight = trainer.optimizers[0], trainer.model.hf_model.model.norm.weight
    optimizer.register_step_pre_hook(lambda *_: setattr(weight, "grad", None))


def test_a_parameter_that_never_gets_a_gradient_is_resumed_without_state(job):
    states = {}
    for name, lives in (("whole", (4,)), ("parts", (2, 4))):
        for steps in lives:
            trainer = Trainer(job(name, training__steps=steps, lr_scheduler__total_steps=6))
            _without_gradient(trainer)
            trainer.train()
            assert trainer.model.hf_model.model.norm.weight not in trainer.optimizers[0].state
            states[name] = trainer.model.full_state_dict()
            trainer.close()
    _assert_equal(states["parts"], states["whole"])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning")
def test_a_run_whose_first_step_was_skipped_is_resumed(job):
    states = {}
    for name, lives in (("whole", (3,)), ("parts", (1, 3))):
        for steps in lives:
            trainer = Trainer(job(name, training__steps=steps, lr_scheduler__total_steps=6))
            may_update = trainer._may_update
            trainer._may_update = lambda *args, one=trainer, plain=may_update: one.step > 0 and plain(*args)
            assert not trainer.optimizers[0].state
            trainer.train()
            states[name] = trainer.model.full_state_dict()
            trainer.close()
    _assert_equal(states["parts"], states["whole"])


def test_a_folder_of_checkpoints_elsewhere_has_one_run_too(job, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("transformers_backend.folders.PATIENCE_SECONDS", 0)
    place = tmp_path / "elsewhere"
    place.mkdir()
    holds = (
        f"import fcntl, time; f = open('{place}/.lock', 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); "
    )
    with subprocess.Popen([sys.executable, "-c", f"{holds} time.sleep(300)"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match=rf'checkpoint\.folder = "{place}" is in use by'):
            Trainer(job(checkpoint__enable=True, checkpoint__folder=str(place)))
        holder.kill()


def test_a_config_that_somebody_spoilt_is_not_compared(job, caplog):
    config = job(training__steps=2, checkpoint__enable=True)
    _run(config)
    spoilt = Path(config.job.dump_folder) / "checkpoint" / "step-2" / "config.toml"
    spoilt.write_text("garbage")
    config.training.steps = 3
    assert _run(config).step == 3
    assert f"{spoilt} is not valid TOML" in caplog.text
