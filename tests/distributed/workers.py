"""Gloo processes that run a test's functions, forked from a server that has imported the stack, which takes seconds.

    with WorkerPool(2) as pool:
        results = pool.run(function, argument)      # function(argument) on every rank -> [result of rank 0, rank 1]

`function` is a module-level function of a test file. It runs inside a default process group (a FileStore, so that no
port is needed) with warnings as errors, as in the tests themselves. An exception on any rank fails the test with that
rank's traceback; the other ranks may then wait for it in a collective for ever, so all are stopped and the next `run`
starts new ones.
"""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

_SECONDS_FOR_OTHER_RANKS = 2.0

# What nearly every test of the trainer ends up importing.
_PRELOADED = [
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",  # "aot_eager", too, imports it, for seconds
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "transformers_backend.train",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "tests.jobs",
]


def quick_context() -> multiprocessing.context.ForkServerContext:
    """Make processes in a moment, from a server that starts with the first one and does nothing but imports.

    They have the environment variables of that time, and the working directory and import path of now.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def start_quickly(function: Callable[..., Any], *arguments: Any, printed: Path) -> multiprocessing.process.BaseProcess:
    """Start a process that leads a group of its own and calls a program's function, whose result is its exit status.

    What it and its children print, on both streams, goes to the file `printed`.
    """
    process = quick_context().Process(target=_become, args=(function, arguments, printed))
    process.start()
    return process


def _become(function: Callable[..., Any], arguments: tuple, printed: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.exit(function(*arguments))


class WorkerPool:
    def __init__(self, world_size: int, *, timeout_seconds: float = 240) -> None:
        self.world_size = world_size
        self._timeout_seconds = timeout_seconds
        self._context = quick_context()
        self._processes: list = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank and return the results in rank order."""
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, arguments))
        outcomes = self._collect()
        failures = {rank: error for rank, (error, _) in outcomes.items() if error is not None}
        if failures or len(outcomes) < self.world_size:
            silent = [rank for rank in range(self.world_size) if rank not in outcomes]
            self.stop()
            reports = [f"rank {rank} of {self.world_size}:\n{error}" for rank, error in sorted(failures.items())]
            raise AssertionError("\n".join([*reports, f"no answer from ranks {silent}" if silent else ""]))
        return [outcomes[rank][1] for rank in range(self.world_size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outcomes = self._context.Queue()
        self._tasks = [self._context.SimpleQueue() for _ in range(self.world_size)]
        store = str(Path(self._folder.name) / "store")
        self._processes = [
            self._context.Process(
                target=_work, args=(rank, self.world_size, store, self._tasks[rank], self._outcomes), daemon=True
            )
            for rank in range(self.world_size)
        ]
        for process in self._processes:
            process.start()

    def _collect(self) -> dict[int, tuple[str | None, Any]]:
        outcomes: dict[int, tuple[str | None, Any]] = {}
        deadline = time.monotonic() + self._timeout_seconds
        while len(outcomes) < self.world_size and time.monotonic() < deadline:
            try:
                rank, error, result = self._outcomes.get(timeout=0.2)
            except Empty:
                if not all(process.is_alive() for process in self._processes):
                    deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHER_RANKS)
                continue
            outcomes[rank] = (error, result)
            if error is not None:
                deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHER_RANKS)
        return outcomes


def _work(rank: int, world_size: int, store: str, tasks, outcomes) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    while True:
        function, arguments = tasks.get()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # torch's own, all of torch.compile: a deprecated import, dynamo's instance of an autograd function, and
                # its look at a layer's input.
                warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
                warnings.filterwarnings("ignore", ".* should not be instantiated", DeprecationWarning)
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
                result = function(*arguments)
        except Exception:  # whatever it is, the test shall show it
            outcomes.put((rank, traceback.format_exc(), None))
        else:
            outcomes.put((rank, None, result))


class Messages(logging.Handler):
    """Collects what a logger says: `with Messages("transformers_backend") as messages: ...`."""

    def __init__(self, logger: str, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.texts: list[str] = []
        self._logger = logging.getLogger(logger)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> Messages:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)
