"""One write of a state by all ranks: now, or beside training.

    stage   copy what the next optimizer step would change   (only beside training; ends before that step)
    save    every rank writes its shards, then rank 0 the index
    commit  rank 0 makes the checkpoint appear, then deletes old ones

Beside training all three run in one thread a rank and speak over a gloo process group of their own: two threads must
not share one. It is no process because that would outlive a killed run, and write into the next one's folder.

Whatever fails on one rank is told to all before the next collective, so that none waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from parallelize.tensor_parallel.packing import Packing
from transformers_backend.checkpoint.planners import PackedSavePlanner
from transformers_backend.checkpoint.storage import Storage, StorageError

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=4)  # one rank writing to a slow disk while the others wait
_MEETING_SECONDS = 5.0  # ranks that end together, apart by what a loaded machine makes of it


class SaveError(OSError):
    """A checkpoint could not be written: no space, no permission, no connection. Earlier ones are whole."""


class Writer:
    """Writes one checkpoint at a time; every rank calls every method."""

    def __init__(self, storage: Storage, *, beside_training: bool, pinned: bool) -> None:
        """beside_training: `write` returns at once. pinned: stage CUDA tensors in page-locked memory."""
        self._storage = storage
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._closing = dist.new_group(backend="gloo")  # the other one is the thread's
        self._beside_training = beside_training
        self._stager: DefaultStager | None = None
        self._stream: torch.cuda.Stream | None = None
        if beside_training:
            on_cuda = torch.cuda.is_available()
            # Copies run beside the computation, on the device of this rank.
            self._stream = torch.cuda.Stream() if on_cuda else None
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=pinned and on_cuda,
                    use_shared_memory=False,
                    use_async_staging=False,  # it runs in our thread
                    use_non_blocking_copy=pinned and on_cuda,
                )
            )
        self._staged = threading.Event()
        self._staged.set()
        self._in_flight: Future[None] | None = None

    def write(
        self,
        name: str,
        state: dict[str, Any],
        packings: Mapping[str, Packing],
        files: dict[str, str],
        then: Callable[[], None],
    ) -> None:
        """Write `state` and text files as checkpoint `name`, then call `then` on rank 0, while the others wait.
        `wait` says how it went.

        packings: of the fused tensors in `state`, by key of the flattened state.
        """
        assert self._in_flight is None, "wait for the last one first"
        self._in_flight = Future()
        arguments = (self._in_flight, name, state, packings, files, then)
        if not self._beside_training:
            self._run(*arguments)
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # the optimizer step that the state comes from
        self._staged.clear()
        threading.Thread(target=self._run, args=arguments, name=f"save {name}", daemon=True).start()

    def wait_until_staged(self) -> None:
        """Return when the model and the optimizer state may change."""
        self._staged.wait()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when nothing is being written any more. Raises what the write raised: SaveError, on all ranks, if it
        failed on any; TimeoutError after the time."""
        if self._in_flight is not None:
            in_flight = self._in_flight
            error = in_flight.exception(timeout_seconds)
            self._in_flight = None
            if error is not None:
                raise error

    def _wait_as_long_as_all_do(self, timeout_seconds: float) -> None:
        """`wait`, and beyond that time where all ranks are here: then storage is slow, and no rank is lost."""
        try:
            self.wait(timeout_seconds)
        except TimeoutError:
            try:
                dist.monitored_barrier(self._closing, timeout=timedelta(seconds=max(timeout_seconds, _MEETING_SECONDS)))
            except RuntimeError:
                raise TimeoutError from None
            logger.info("a checkpoint is still being written, and waited for")
            self.wait(_PATIENCE.total_seconds())

    def close(self, timeout_seconds: float) -> None:
        """Wait for the write under way, and free what staging holds; what fails is logged.

        timeout_seconds: how long to wait where a rank does not close too; it may be lost.
        """
        try:
            self._wait_as_long_as_all_do(timeout_seconds)
        except SaveError as error:
            logger.error("%s", error)
        except TimeoutError:
            logger.error("A checkpoint was not written within %d s and is given up.", timeout_seconds)
            return  # its thread still uses the rest
        except RuntimeError as error:  # of gloo: another rank is gone
            logger.error("A checkpoint could not be written to its end: %s", error)
        if self._stager is not None:
            self._stager.close()
        dist.destroy_process_group(self.group)
        dist.destroy_process_group(self._closing)

    def _run(self, outcome: Future[None], *arguments) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # `wait` raises it, in the thread that trains
            if self._beside_training:  # that may be much later
                logger.error("%s", error, exc_info=None if isinstance(error, SaveError) else error)
            outcome.set_exception(error)
        else:
            outcome.set_result(None)
        finally:
            self._staged.set()

    def _write(
        self,
        name: str,
        state: dict[str, Any],
        packings: Mapping[str, Packing],
        files: dict[str, str],
        then: Callable[[], None],
    ) -> None:
        try:
            state = self._stage(state)
        except StorageError as error:
            raise self._save_error(name, error) from None
        try:
            self._on_first_rank(lambda: self._storage.begin(name))
            planner = PackedSavePlanner(packings)
            dcp.save(state, storage_writer=self._storage.writer(name), planner=planner, process_group=self.group)
            self._on_first_rank(lambda: self._storage.commit(name, files))
        except (CheckpointException, StorageError) as error:
            if dist.get_rank() == 0:
                # What stays is not whole, and the next save removes it.
                with contextlib.suppress(OSError):
                    self._storage.discard(name)
            raise self._save_error(name, error) from None
        logger.info("checkpoint saved: %s", self._storage.locate(name))
        self._on_first_rank(then)  # the others wait in a group that has the time for it

    def _stage(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._stager is None:
            return state
        problem = None
        try:
            state = self._stage_on_device(state, self._stager)
        except RuntimeError as error:  # out of memory
            problem = f"rank {dist.get_rank()}: {error}"
        finally:
            self._staged.set()
        problems = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(problems, problem, group=self.group)
        if any(problems):
            raise StorageError("; ".join(filter(None, problems)))
        return state

    def _stage_on_device(self, state: dict[str, Any], stager: DefaultStager) -> dict[str, Any]:
        if self._stream is None:
            return stager.stage(state)
        # A new thread is on device 0, and the stager ends by waiting for the device that its thread is on.
        torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):
            return stager.stage(state)

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Do it on rank 0; StorageError on every rank if it could not be done."""
        problem = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                problem = [f"rank 0: {error}"]
        dist.broadcast_object_list(problem, src=0, group=self.group)
        if problem[0] is not None:
            raise StorageError(problem[0])

    def _save_error(self, name: str, error: CheckpointException | StorageError) -> BaseException:
        """The sentence for the user where storage failed; any other error as it is."""
        causes = [str(error)]
        if isinstance(error, CheckpointException):
            causes = []
            for rank, (cause, _) in sorted(error.failures.items()):
                if not isinstance(cause, OSError):
                    return cause
                causes.append(f"rank {rank}: {cause}")
        return SaveError(
            f"checkpoint {self._storage.locate(name)} could not be written ({'; '.join(causes)}). Earlier checkpoints "
            "are whole. Make room or correct the access there, or set checkpoint.folder to another place; with "
            'checkpoint.on_save_error = "continue" training goes on without the checkpoint.'
        )
