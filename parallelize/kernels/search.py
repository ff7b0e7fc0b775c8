"""How a kernel cuts its work: of a few candidates the fastest, found once on the GPU itself, and kept.

    launch -> chosen before in this process? -> in the file? -> every candidate compiled and timed on the very tensors
           -> the fastest is remembered, written to the file, and launched

What decides speed is the key: kernel, device, dtype, widths, options of the mask, and numbers of tokens by powers of
two, so that sequences of other lengths do not search again. The file lies in Triton's cache folder, where a second
start and the machine's other ranks find it; delete it to search again.

Nothing is searched, and the first candidate that fits is launched, where algorithms must be deterministic (results
would depend on what happened to be fastest), while a CUDA graph is captured, for small work, and without a GPU.

Not `triton.autotune`, for all that it could save here: what our launchers allocate and hand over (ranges of documents,
partial sums) depends on the candidate; its key is the values of arguments and knows neither powers of two nor several
GPUs in a process; it does not know when not to search; a damaged file stops it; and its clock waits for the whole GPU,
on which other ranks' exchanges may run that wait for this one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import torch

from parallelize.kernels.language import CACHE_FOLDER, KERNEL_ERRORS, VERSION, OutOfResources

try:
    import fcntl
except ImportError:  # not on Windows, where ranks search each for itself
    fcntl = None

logger = logging.getLogger(__name__)

Candidate = TypeVar("Candidate", bound=tuple)
Result = TypeVar("Result")

_LEAST_PRODUCTS = 2**30  # multiplications below which a kernel takes microseconds: less than can be measured or won
_TIE = 1.02  # how much faster than the first candidate another must be: clocks are no better
_PATIENCE = 60.0  # seconds that a rank waits for another's search before it makes its own


def bucket(number: int) -> int:
    """Which power of two a number is at most: 13 for 4,097 to 8,192."""
    return (number - 1).bit_length()


class Gpu:
    """What a search asks of a device; tests have another."""

    def is_free(self, device: torch.device) -> bool:
        """Whether launches there may depend on what is fast."""
        return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def name(self, device: torch.device) -> str:
        found = torch.cuda.get_device_properties(device)
        return f"{found.name} {found.major}.{found.minor}"

    def wait(self, device: torch.device) -> None:
        """Until what was launched before is done, in this stream."""
        torch.cuda.current_stream(device).synchronize()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The least of a few runs, after one that compiles; OutOfResources where the GPU has no room."""

        def measure(count: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / count

        run()
        first = measure(1)
        count = max(1, min(10, int(2 / max(first, 0.01))))  # some one after another, where launching takes as long
        return min(first, measure(count), measure(count))


class Search:
    """Choices of this process, and the file with those of all."""

    def __init__(self, file: Path, gpu: Gpu | None = None) -> None:
        self._file = file
        self._gpu = gpu or Gpu()
        self._fastest: dict[tuple, tuple | None] = {}

    def launch(
        self,
        kernel: str,
        device: torch.device,
        details: tuple,
        candidates: Sequence[Candidate],
        prepare: Callable[[Candidate], Callable[[], Result]],
        *,
        products: int,
        spare: Sequence[Candidate] = (),
        rehearse: Callable[[Candidate], Callable[[], Result]] | None = None,
    ) -> Result:
        """Launch a kernel with the fastest candidate; returns what the launch returns.

        details: what else decides speed, as JSON has it; numbers of tokens by `bucket`.
        candidates: tuples of numbers, the first where nothing is searched; spare: where the GPU has room for none.
        prepare: what launches with a candidate. It runs several times: where that is not harmless, `rehearse` does it
        elsewhere. products: multiplications of the launch.
        """
        order = [*candidates, *spare]
        if len(candidates) > 1 and products >= _LEAST_PRODUCTS and self._gpu.is_free(device):
            key = (kernel, device, details, tuple(candidates))
            if key not in self._fastest and not self._gpu.is_capturing():
                self._fastest[key] = self._search(kernel, device, details, candidates, rehearse or prepare)
            fastest = self._fastest.get(key)
            if fastest is not None:
                order.insert(0, fastest)
        for candidate in order[:-1]:
            try:
                return prepare(candidate)()
            except OutOfResources:  # known exactly only once a kernel is compiled
                continue
        return prepare(order[-1])()

    def _search(
        self, kernel: str, device: torch.device, details: tuple, candidates: Sequence[Candidate], prepare: Callable
    ) -> Candidate | None:
        """The fastest candidate; None where the GPU has room for none."""
        name = json.dumps([kernel, self._gpu.name(device), f"triton {VERSION}", *details])
        # Before the lock: what this stream waits for may be computed by a rank that would wait for the lock.
        self._gpu.wait(device)
        with self._alone():
            times = self._read(name, candidates)
            if times is None:
                begun = time.monotonic()
                times = {
                    candidate: self._time(prepare, candidate, is_first=candidate == candidates[0])
                    for candidate in candidates
                }
                self._write(name, times)
                logger.info("Kernel %s: searched in %.1f s, %s", name, time.monotonic() - begun, times)
        return _fastest(times)

    def _time(self, prepare: Callable, candidate: tuple, *, is_first: bool) -> float | None:
        """Milliseconds, or None where the GPU has no room for it. Only the first candidate must compile."""
        try:
            return self._gpu.milliseconds(prepare(candidate))
        except (OutOfResources, *KERNEL_ERRORS) as error:
            if is_first and not isinstance(error, (OutOfResources, torch.OutOfMemoryError)):
                raise
            return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, so that the others find what it found; without a lock where there can be none."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context(self._file.with_suffix(".lock").open("a")))
            yield

    def _entries(self) -> dict:
        """Of the file; none where it is damaged or somebody else's."""
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _read(self, name: str, candidates: Sequence[Candidate]) -> dict[Candidate, float | None] | None:
        """Milliseconds of every candidate, None where there was no room; None unless just these were searched."""
        try:
            times = [(tuple(candidate), taken) for candidate, taken in self._entries()[name]]
        except (KeyError, TypeError, ValueError):
            return None
        are_numbers = all(taken is None or isinstance(taken, float) for _, taken in times)
        is_ours = are_numbers and [candidate for candidate, _ in times] == [*candidates]
        return dict(zip(candidates, (taken for _, taken in times), strict=True)) if is_ours else None

    def _write(self, name: str, times: dict[Candidate, float | None]) -> None:
        entries = {**self._entries(), name: [*times.items()]}
        lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        with contextlib.suppress(OSError):  # then every process searches
            descriptor, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=self._file.name)
            with os.fdopen(descriptor, "w") as file:
                file.write("{\n" + ",\n".join(lines) + "\n}\n")
            os.replace(temporary, self._file)


def _fastest(times: dict[Candidate, float | None]) -> Candidate | None:
    fitting = {candidate: taken for candidate, taken in times.items() if taken is not None}
    if not fitting:
        return None
    first, best = next(iter(fitting)), min(fitting, key=fitting.get)
    return first if fitting[first] <= _TIE * fitting[best] else best


def _lock(file: IO) -> None:
    """Until it is closed; goes on without after a while."""
    end = time.monotonic() + _PATIENCE
    while fcntl is not None and time.monotonic() < end:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)


SEARCH = Search(CACHE_FOLDER / "parallelize_search.json")
"""That of this process."""
