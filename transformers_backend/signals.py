"""SIGTERM, SIGINT and SIGUSR1 as a wish to stop: the trainer grants it after a step, on all ranks at the same one.

Slurm announces the end of a job's time by such a signal, to one process or to all; Ctrl-C and `kill` are the others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

SECONDS_BETWEEN_INTERRUPTS = 1.0
"""A second SIGINT within this time is the same Ctrl-C, which reached a process on two ways."""


class StopRequest:
    """Within the block the stop signals end nothing; `agreed()` says after each step whether the ranks shall stop.

    A second SIGINT, at least a second after the first, ends the process at once. Outside the main thread, where Python
    knows no signal handlers, the block leaves signals as they are, and follows the other ranks.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first that this process got
        self._time = 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None
        self._group: dist.ProcessGroup | None = None  # None: the default one

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        if dist.is_initialized() and "cpu:" not in dist.get_backend_config():  # somebody else's group, of NCCL alone
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None:  # after an error the other ranks may be gone, and what is under way would wait for them
            if self._exchange is not None:
                self._exchange[0].wait()
            if self._group is not None:
                dist.destroy_process_group(self._group)
        self._exchange = self._group = None

    def agreed(self) -> signal.Signals | None:
        """The signal for which all ranks stop now, the same on every rank, or None. All ranks call it once a step.

        A rank must not stop alone, or the others would wait for it in a collective. So each step ends with an
        all-reduce of the number of the signal, and its result is read a step later: then it has long arrived, and
        nobody waits (40 microseconds a step, where a blocking one took 520 on two ranks, and would grow with them).
        The price is that the run makes one step more. The tensor is on the CPU, so on CUDA it goes through gloo, and
        neither a stream nor the host's lead over the device is disturbed.
        """
        mine = self.signal or 0
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.signal
        found = 0
        if self._exchange is not None:
            work, result = self._exchange
            work.wait()
            found = int(result)
        result = torch.tensor(int(mine))
        self._exchange = (dist.all_reduce(result, op=dist.ReduceOp.MAX, group=self._group, async_op=True), result)
        return signal.Signals(found) if found else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, such as a data worker, inherits the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.signal is None:
            self.signal = signal.Signals(number)
            self._time = time.monotonic()
            if not dist.is_initialized() or dist.get_rank() == 0:
                # Not print or logging, because they may be what the signal interrupts.
                os.write(2, f"{self.signal.name}: the run stops after this step\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._time > SECONDS_BETWEEN_INTERRUPTS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def shield_child_process() -> None:
    """For helper processes of a rank (data workers), which call it as they start: only the rank itself ends them.

    Slurm signals every process of a job step, and a rank that finishes its step still needs its helpers. So the stop
    signals are ignored, except a SIGTERM from the parent process, with which multiprocessing ends its children. (Only
    Linux tells who sent a signal; elsewhere SIGTERM stays as it is.)
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies (Linux; elsewhere nothing happens).

    A rank whose launcher was killed would train on unseen, and write into the folder of the run that replaces it.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
