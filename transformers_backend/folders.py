"""Folders that appear whole, and belong to one run at a time. A leaf of checkpoints, exports and the trainer."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)

_HELD_BY_ANOTHER = {errno.EACCES, errno.EAGAIN}
# An agent on another machine gives a rank that does not end 30 seconds before it kills it, and the rank's lock with it.
PATIENCE_SECONDS = 40.0


def replace_folder(folder: Path, temporary: Path) -> None:
    """Give the whole new folder its name; an old one of that name is deleted only after that."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path, key: str = "job.dump_folder") -> Iterator[None]:
    """Hold `folder` for this process; ValueError, naming the holder, where another still does after 40 s.

    key: what the config calls the folder, for that message.

    The lock is one of the kernel on `folder`/.lock: it ends with the process, however that dies, and a process that
    this one forks does not carry it on. Where a file system has no locks, there is a warning and no protection.
    """
    if fcntl is None:
        yield
        return
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                raise ValueError(
                    f'{key} = "{folder}" is in use by {_holder(file)}: two runs would overwrite each '
                    "other's files. Wait for that one to end, or name another folder."
                ) from error
            logger.warning("%s cannot be locked (%s): start no second run in it.", folder, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _lock(file: TextIO) -> None:
    """The lock, or the OSError of the last try."""
    deadline, has_warned = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER or time.monotonic() >= deadline:
                raise
        if not has_warned:
            has_warned = True
            logger.warning(
                "%s is in use by %s: waiting up to %.0f s for it to end.",
                Path(file.name).parent, _holder(file), PATIENCE_SECONDS,
            )  # fmt: skip
        time.sleep(0.2)


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "another run"
