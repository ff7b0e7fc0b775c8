"""A process for every contender, and the turns in which they train."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarking.contenders import Finished, Gate, Settings
from benchmarking.peers import CONTENDERS, why_not_here

WARM_UP_STEPS = 2
OUT_OF_TIME = "not started: the time was up (--limit)"


class Failed(Exception):
    """A contender stopped with an error, whose text this carries."""


class Contestant:
    """The benchmark's end of one contender: a process that trains as many steps as it is told."""

    def __init__(self, name: str, settings: Settings, *, cold: bool = False) -> None:
        self.name = name
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(name, settings, cold, theirs))
        self._process.start()
        theirs.close()
        self.record: dict[str, Any] = {
            "block_seconds": [], "block_cpu_seconds": [], **self._receive(), "peak_memory": 0
        }  # fmt: skip
        self.cpu_seconds = 0.0
        """That the last `train` took of all its threads together."""

    def train(self, steps: int) -> float:
        """Train `steps` steps and return the seconds they took."""
        self._connection.send(steps)
        report = self._receive()
        self.record["peak_memory"] = max(self.record["peak_memory"], report["peak_memory"])
        self.record.setdefault("first_loss", report["loss"])
        self.record["last_loss"] = report["loss"]
        self.cpu_seconds = report["cpu_seconds"]
        return report["seconds"]

    def close(self) -> None:
        if self._process.is_alive():
            self._connection.send(0)
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> dict[str, Any]:
        try:
            report = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from None
        if "error" in report:
            raise Failed(report["error"])
        return report


def serve(name: str, settings: Settings, cold: bool, connection: Connection) -> None:
    """A contender's process: train whenever the benchmark says so, and report what goes wrong."""
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if cold:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            CONTENDERS[name](settings, Gate(connection))
        except Finished:
            return
        except Exception as error:  # the other contenders go on, and the reason is part of the result
            print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
            connection.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def run(
    settings: Settings,
    names: list[str],
    *,
    steps: int,
    blocks: int,
    starts: int = 1,
    cold: bool = False,
    limit: float | None = None,
) -> dict[str, Any]:
    """Let the contenders train in turns; returns everything that was measured, by contender.

    starts: how often each is started, the last time to stay; cold: every time with an empty cache of compiled code.
    limit: seconds; contenders start in the first 60 % of them and rounds begin in the first 90 %.
    """
    began = time.monotonic()
    results: dict[str, Any] = {}
    contestants: list[Contestant] = []
    firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for start in range(starts):
        turn = start % len(names)  # who begins changes
        for name in [*names[turn:], *names[:turn]]:
            if name in results:
                continue
            if (reason := why_not_here(name)) is not None:
                results[name] = {"skipped": reason}
                continue
            if limit is not None and time.monotonic() - began > 0.6 * limit:
                results[name] = {"skipped": OUT_OF_TIME}
                continue
            say(f"{name}: building, first step and {WARM_UP_STEPS} to warm up")
            stays = start == starts - 1
            attempt(lambda: _begin(name, settings, cold, firsts[name], contestants if stays else None), name, results)  # noqa: B023
    contestants.sort(key=lambda one: names.index(one.name))
    try:
        for block in range(blocks):
            running = [one for one in contestants if one.name not in results]
            if not running or (limit is not None and time.monotonic() - began > 0.9 * limit):
                break
            turn = block % len(running)
            for one in [*running[turn:], *running[:turn]]:
                attempt(lambda one=one: train_block(one, steps), one.name, results)
            say(f"round {block + 1} of {blocks}: " + ", ".join(describe_block(one, settings) for one in running))
    finally:
        for contestant in contestants:
            contestant.close()
    return {**results, **{one.name: one.record for one in contestants if one.name not in results}}


def attempt(action: Callable[[], None], name: str, results: dict[str, Any]) -> None:
    try:
        action()
    except (Failed, ConnectionError) as error:
        say(f"{name} failed: {error}")
        results[name] = {"failed": str(error)}


def _begin(
    name: str, settings: Settings, cold: bool, firsts: list[tuple[float, float]], contestants: list[Contestant] | None
) -> None:
    """Start a contender and train its first step; its seconds, of the clock and of the processor, go to `firsts`.

    contestants: which it joins; None ends it then."""
    started = time.perf_counter()
    contestant = Contestant(name, settings, cold=cold)
    contestant.record["build_seconds"] = time.perf_counter() - started
    firsts.append((contestant.train(1), contestant.cpu_seconds))
    contestant.record["first_steps_seconds"] = [seconds for seconds, _ in firsts]
    contestant.record["first_steps_cpu_seconds"] = [seconds for _, seconds in firsts]
    if contestants is None:
        contestant.close()
        return
    contestants.append(contestant)
    contestant.train(WARM_UP_STEPS)


def train_block(contestant: Contestant, steps: int) -> None:
    if torch.cuda.is_available():
        contestant.train(1)  # gets its memory back from the device
    contestant.record["block_seconds"].append(contestant.train(steps) / steps)
    contestant.record["block_cpu_seconds"].append(contestant.cpu_seconds / steps)


def describe_block(contestant: Contestant, settings: Settings) -> str:
    seconds = contestant.record["block_seconds"]
    return f"{contestant.name} {settings.tokens_per_step / seconds[-1]:,.0f}" if seconds else f"{contestant.name} -"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
