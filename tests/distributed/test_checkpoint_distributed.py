"""Checkpoints of several ranks: beside training, on other meshes and numbers of ranks, and one rank that fails."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from tests.distributed.workers import Messages, WorkerPool
from tests.jobs import tiny_job
from transformers_backend import JobConfig, Trainer
from transformers_backend.checkpoint import SaveError, require_shared
from transformers_backend.checkpoint.local import LocalStorage


@pytest.fixture(scope="module")
def one() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


def _job(folder: str, name: str, **changes) -> JobConfig:
    """Four sequences a step, on any number of ranks up to four; the schedule of six steps."""
    defaults = {"training__local_batch_size": 1, "training__global_batch_size": 4, "checkpoint__enable": True,
                "checkpoint__interval": 2, "lr_scheduler__total_steps": 6}  # fmt: skip
    return tiny_job(folder, name, **{**defaults, **changes})


def _train(config: JobConfig) -> dict[str, torch.Tensor]:
    trainer = Trainer(config)
    trainer.train()
    state = trainer.model.full_state_dict()
    trainer.close()
    return state


def _names(config: JobConfig) -> set[str]:
    return {path.name for path in (Path(config.job.dump_folder) / "checkpoint").iterdir()}


def _losses(config: JobConfig) -> list[float]:
    lines = (Path(config.job.dump_folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("replicate", [1, 2])
def test_a_resume_beside_training_is_the_same_bit_by_bit(two: WorkerPool, folder: str, replicate: int):
    mesh = {"parallelism__data_parallel_replicate_degree": replicate, "checkpoint__async_mode": "async"}
    whole = _job(folder, "whole", checkpoint__enable=False, parallelism__data_parallel_replicate_degree=replicate)
    expected = two.run(_train, whole)
    two.run(_train, _job(folder, "parts", training__steps=4, **mesh))
    resumed = two.run(_train, _job(folder, "parts", **mesh))
    for state, wanted in zip(resumed, expected, strict=True):
        assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert _names(_job(folder, "parts")) == {"step-2", "step-4", "step-6"}
    assert _losses(_job(folder, "parts")) == _losses(whole)


def _train_on_fixed_batches(config: JobConfig) -> None:
    """Steps whose global batch depends on the step only: what the documents of a rank are is another test's matter."""
    trainer = Trainer(config)
    ranks = dist.get_world_size()
    position = [trainer.step * trainer.accumulation_steps]

    def next_batch(data):
        step, part = divmod(position[0], trainer.accumulation_steps)
        position[0] += 1
        tokens = torch.randint(384, (4, 32), generator=torch.Generator().manual_seed(step))
        row = tokens[part * ranks + dist.get_rank()][None]
        return {"input_ids": row, "labels": row.clone()}

    trainer._next_batch = next_batch
    trainer.train()
    trainer.close()


def test_other_numbers_of_ranks_and_other_meshes_go_on_with_the_curve(two: WorkerPool, one: WorkerPool, folder: str):
    """2 ranks sharded -> 1 -> 2 ranks as replicas -> 4 as 2 x 2, against one run on one rank."""
    options = {"optimizer__name": "Muon", "checkpoint__exclude_from_loading": ["dataloader"],
               "lr_scheduler__total_steps": 8}  # fmt: skip
    parts = [(2, 1, 2), (1, 1, 4), (2, 2, 6), (4, 2, 8)]  # ranks, replicas, last step
    with WorkerPool(4) as four:
        pools = {1: one, 2: two, 4: four}
        one.run(_train_on_fixed_batches, _job(folder, "whole", training__steps=8, **options))
        for ranks, replicas, steps in parts:
            mesh = {"parallelism__data_parallel_replicate_degree": replicas}
            pools[ranks].run(_train_on_fixed_batches, _job(folder, "parts", training__steps=steps, **mesh, **options))
    whole, resumed = _losses(_job(folder, "whole")), _losses(_job(folder, "parts"))
    assert len(resumed) == 8
    assert resumed == pytest.approx(whole, rel=1e-5)


def test_other_numbers_of_ranks_go_on_in_the_data(two: WorkerPool, one: WorkerPool, tmp_path: Path):
    """2 -> 1 -> 4 data ranks. One document is one block, so that the global batches are those of the whole run."""
    (tmp_path / "text").mkdir()
    for number in range(64):
        (tmp_path / "text" / f"{number:02}.txt").write_text(f"{number:02} is a text of 31 bytes only."[:31].ljust(31))
    folder = str(tmp_path)
    with WorkerPool(4) as four:
        one.run(_train, _job(folder, "whole"))
        for pool, steps in ((two, 2), (one, 4), (four, 6)):
            pool.run(_train, _job(folder, "parts", training__steps=steps))
    assert _losses(_job(folder, "parts")) == pytest.approx(_losses(_job(folder, "whole")), rel=1e-5)


def _random_after_resume(config: JobConfig) -> tuple[list[str], torch.Tensor]:
    with Messages("transformers_backend") as messages:
        trainer = Trainer(config)
        numbers = torch.rand(3)
        trainer.close()
    return [text for text in messages.texts if "seeded anew" in text], numbers


def test_a_rank_that_is_new_has_random_numbers_of_its_own(two: WorkerPool, one: WorkerPool, folder: str):
    config = _job(folder, "random", training__steps=2)
    one.run(_train, config)
    config.checkpoint.exclude_from_loading = ["dataloader"]
    (messages, first), (_, second) = two.run(_random_after_resume, config)
    assert "step-2 holds the random states of 1 ranks, and this run has 2: those without one" in messages[0]
    assert not torch.equal(first, second)
    assert torch.equal(two.run(_random_after_resume, config)[1][1], second), "the same at every resume"


def _save_twice(trainer: Trainer) -> None:
    for step in (2, 3):
        trainer.train_step()
        trainer.checkpointer.save(step)


def _fail_on_second_rank(config: JobConfig, where: str) -> str:
    """The second rank's disk is full, or its memory, at the second save; then both train on."""
    trainer = Trainer(config)
    trainer.train_step()
    trainer.checkpointer.save(1)
    trainer.checkpointer.wait()
    plain_stream = FileSystem.create_stream

    @contextmanager
    def full(self, path, mode):
        if mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        with plain_stream(self, path, mode) as stream:
            yield stream

    def no_memory(state):
        raise RuntimeError("cannot allocate")

    if trainer.rank == 1 and where == "disk":
        FileSystem.create_stream = full
    if trainer.rank == 1 and where == "memory":
        trainer.checkpointer._writer._stager.stage = no_memory
    try:
        with pytest.raises(SaveError) as caught:
            _save_twice(trainer)
    finally:
        FileSystem.create_stream = plain_stream
    trainer.train_step()  # both ranks are still in step
    trainer.close()
    return str(caught.value)


@pytest.mark.parametrize(("mode", "where"), [("disabled", "disk"), ("async", "disk"), ("async", "memory")])
def test_one_rank_that_cannot_write_holds_up_nobody(two: WorkerPool, folder: str, mode: str, where: str):
    config = _job(folder, "full", checkpoint__async_mode=mode)
    messages = two.run(_fail_on_second_rank, config, where)
    assert messages[0] == messages[1]
    assert "checkpoint/step-2 could not be written (rank 1: " in messages[0]
    assert {"disk": "__1_0.distcp: No space left on device", "memory": "cannot allocate"}[where] in messages[0]
    assert _names(config) == {"step-1"}


def _save_to_folders_of_their_own(config: JobConfig, folder: str) -> str:
    """The second rank's folder has the same name and lies on another machine."""
    trainer = Trainer(config)
    if trainer.rank == 1:
        trainer.checkpointer.storage.root = Path(folder) / "other machine"
    trainer.train_step()
    try:
        with pytest.raises(SaveError) as caught:
            trainer.checkpointer.save_last(1)
    finally:
        trainer.close()
    return str(caught.value)


def test_half_a_checkpoint_is_none(two: WorkerPool, folder: str):
    config = _job(folder, "halves")
    for message in two.run(_save_to_folders_of_their_own, config, folder):
        assert "(rank 0: __1_0.distcp is missing, although it was written: checkpoint.folder must be" in message
    assert _names(config) == set()


def _require_shared(folder: str, own: bool) -> str | None:
    storage = LocalStorage(Path(folder) / (f"machine {dist.get_rank()}" if own else "shared"))
    try:
        require_shared(storage, patience=0.0)
    except ValueError as error:
        return str(error)
    return None


def test_a_folder_on_each_machine_is_refused_before_work_starts(two: WorkerPool, tmp_path: Path):
    assert two.run(_require_shared, str(tmp_path), False) == [None, None]
    first, second = two.run(_require_shared, str(tmp_path), True)
    assert "is not the same place for all ranks: what rank 0 writes there, rank 1 cannot see (it is missing" in first
    assert "Name a folder that all machines share" in second
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _resume_and_say(config: JobConfig) -> tuple[int, list[str]]:
    with Messages("transformers_backend") as messages:
        trainer = Trainer(config)
        trainer.close()
    return trainer.step, messages.texts


def test_all_ranks_leave_a_damaged_checkpoint_for_the_same_older_one(two: WorkerPool, folder: str):
    """Only the second rank reads from the file that is zeros."""
    config = _job(folder, "damaged", training__steps=4)
    two.run(_train, config)
    file = Path(config.job.dump_folder) / "checkpoint" / "step-4" / "__1_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    config.parallelism.data_parallel_shard_degree = 2
    for step, messages in two.run(_resume_and_say, config):
        assert step == 2
        assert any("step-4/__1_0.distcp" in message and "damaged" in message for message in messages), messages


def _refused(config: JobConfig) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        Trainer(config)
    return str(caught.value)


def test_all_ranks_say_the_same_of_what_does_not_fit(two: WorkerPool, folder: str):
    config = _job(folder, "fit", training__steps=2)
    two.run(_train, config)
    config.hf_transformers.config_overrides["intermediate_size"] = 64
    first, second = two.run(_refused, config)
    assert first == second
    assert "step-2 cannot be resumed from (" in first
    assert "gate_proj.weight (here (64, 32), saved (48, 32))" in first


def _save_where_deleting_is_slow(config: JobConfig) -> tuple[float, float]:
    """Seconds that deleting took on this rank, and the save as a whole."""
    trainer = Trainer(config)
    delete, spent = LocalStorage.delete, []

    def slowly(self, step, *, abandoned=False):
        spent.append(1.0)
        time.sleep(1.0)
        delete(self, step, abandoned=abandoned)

    LocalStorage.delete = slowly
    try:
        for step in (1, 2):
            trainer.checkpointer.save(step)
        dist.barrier()
        start = time.perf_counter()
        trainer.checkpointer.save(3)
        return sum(spent), time.perf_counter() - start
    finally:
        LocalStorage.delete = delete
        trainer.close()


def test_all_ranks_wait_where_they_have_the_time_until_old_checkpoints_are_deleted(two: WorkerPool, folder: str):
    config = _job(folder, "delete", checkpoint__keep_latest_k=2)
    (first_deletes, _), (second_deletes, second_saves) = two.run(_save_where_deleting_is_slow, config)
    assert (first_deletes, second_deletes) == (1.0, 0.0)
    assert second_saves >= 1.0


def _close_during_a_slow_save(config: JobConfig) -> list[str]:
    """The first rank's part of a save takes longer than a collective may, from when it is waited for."""
    trainer = Trainer(config)
    trainer.job_config.comm.train_timeout_seconds = 0.1
    create_stream = FileSystem.create_stream

    @contextmanager
    def slowly(self, path, mode):
        if trainer.rank == 0 and mode == "wb":
            deadline = time.monotonic() + 60
            while not any("still being written" in text for text in messages.texts) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.5)
        with create_stream(self, path, mode) as stream:
            yield stream

    FileSystem.create_stream = slowly
    try:
        with Messages("transformers_backend") as messages:
            trainer.checkpointer.save(1)
            trainer.close()
    finally:
        FileSystem.create_stream = create_stream
    return messages.texts


def test_ranks_that_close_together_wait_for_a_slow_storage(two: WorkerPool, folder: str):
    config = _job(folder, "close", checkpoint__async_mode="async")
    messages, _ = two.run(_close_during_a_slow_save, config)
    assert "a checkpoint is still being written, and waited for" in messages
    assert _names(config) == {"step-1"}
