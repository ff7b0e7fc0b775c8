"""What a person sees of a run: one log format for the whole program, and a progress bar on a terminal.

Both write to stderr. A log line goes through `tqdm.write`, which clears a bar, prints the line and draws the bar again
below it; without a bar it only prints.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from tqdm import tqdm

_HANDLER = "transformers_backend"
# `python -m transformers_backend.train` runs under the name __main__.
_OWN_LOGGERS = ("transformers_backend", "parallelize", "__main__")
# Advises, on every rank, to gather a parameter over two mesh dimensions (FSDP2 and tensor parallelism) in one step:
# that is done for exports and Muon only, and cannot be helped from outside.
_GIVES_ADVICE = "torch.distributed.tensor._redistribute"


def silence_advice() -> None:
    """Keep torch from advising on every rank what nobody here can follow."""
    logging.getLogger(_GIVES_ADVICE).setLevel(logging.ERROR)


def setup_logging(rank: int) -> None:
    """Log in one format, `[rank0] 12:00:01 message`, to stderr: rank 0 from INFO on, other ranks from ERROR on.

    All ranks come to the same warnings, which would be read a thousand times on a thousand ranks. Other libraries
    speak from WARNING on. Calling it again replaces the earlier set-up.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _HANDLER]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(_AboveProgressBar(sys.stderr))
    handler.set_name(_HANDLER)
    handler.setFormatter(logging.Formatter(f"[rank{rank}] %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.NOTSET if rank == 0 else logging.ERROR)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    silence_advice()
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _AboveProgressBar:
    """A stream that prints above the progress bars on it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


class ProgressBar:
    """A bar with the steps done and the time left, where stderr is a terminal; elsewhere nothing."""

    def __init__(self, *, steps_done: int, total_steps: int, enabled: bool) -> None:
        # Made at the first step: until then there is nothing to show, and no time left to tell.
        self._steps_done, self._total_steps = steps_done, total_steps
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: tqdm | None = None

    def advance(self) -> None:
        """Say that a step is done."""
        if not self._enabled:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._total_steps, initial=self._steps_done, unit="step", file=sys.stderr, dynamic_ncols=True
            )
        self._bar.update()
        if self._bar.n == self._total_steps:
            self._bar.close()  # what follows (export, sample) is printed below it

    def show(self, text: str) -> None:
        """Put `text` behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03, before them days where there are any: 2d 01:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
