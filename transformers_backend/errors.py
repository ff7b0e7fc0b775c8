"""Which errors are meant for the user, and how a rank reports one: a leaf that the entry points share.

Under torchrun or `launch.py` a report goes into the error file that the agent names (TORCHELASTIC_ERROR_FILE), and the
agent shows it when all ranks have ended, so that it stands last and once. Otherwise it goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

import torch.distributed as dist

_OWN_PACKAGES = ("transformers_backend", "parallelize")
_OWN_FOLDERS = tuple(str(Path(__file__).parents[1] / name) for name in _OWN_PACKAGES)
_LOADERS = ("transformers", "huggingface_hub")
# In whose functions an OSError is raised for the one that called them.
_FILE_MODULES = ("pathlib", "os", "shutil", "tempfile", "codecs")

# gloo raises RuntimeError; what a lost connection, and a collective that took too long, say:
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LATE_PEER = ("Timed out waiting", "Application timeout caused pair closure")


def is_meant_for_the_user(error: BaseException) -> bool:
    """Whether this project raised the error, or Transformers because a model or file could not be found.

    An error from deep inside a library, such as a ValueError or a broken pipe, is a defect to be seen with its
    traceback, not a refusal.
    """
    if type(error).__module__.partition(".")[0] in _OWN_PACKAGES:  # SaveError, which another thread may have raised
        return True
    if not isinstance(error, (OSError, ValueError, ImportError, FloatingPointError)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):
        while frames and _package(frames[-1]) in _FILE_MODULES:
            frames.pop()
        if frames and _package(frames[-1]) in _LOADERS:
            return True
    return bool(frames) and frames[-1].f_code.co_filename.startswith(_OWN_FOLDERS)


def is_refusal(error: BaseException) -> bool:
    """Whether this project refused the job, so that starting it again is no use.

    Never a lost rank, a defect or an OSError (a file system may be away for a moment).
    """
    return isinstance(error, (ValueError, ImportError)) and is_meant_for_the_user(error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or late: what happened stands with that rank."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER + _LATE_PEER)


def report(error: BaseException) -> bool:
    """Report an error that ends this rank; False where it is left to Python's own traceback.

    The error file's format is that of torch.distributed.elastic.multiprocessing.errors, with `kind` added to its
    extraInfo: "user" (the message says all), "peer" (another rank is to blame) or "defect" (the traceback is needed).
    """
    kind = "user" if is_meant_for_the_user(error) else "peer" if is_lost_peer(error) else "defect"
    message = str(error) if kind == "user" else f"{type(error).__name__}: {error}"
    if kind == "peer":
        late = any(text in str(error) for text in _LATE_PEER)
        what = "another rank did not answer in time" if late else "the connection to another rank broke"
        message = f"{what} ({_without_source_line(str(error))})"
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is not None:
        stack = "".join(traceback.format_exception(error)) if kind == "defect" else message
        extra = {"py_callstack": stack, "timestamp": str(int(time.time())), "kind": kind}
        Path(error_file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        return True
    if kind == "defect":
        return False
    rank = os.environ.get("RANK", "0")
    # Nearly always every rank found the same; a line of each shows the one that did not.
    print(f"error: {message}" if rank == "0" else f"error: rank {rank}: {message.splitlines()[0]}", file=sys.stderr)
    return True


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _without_source_line(text: str) -> str:
    """gloo's message without the place in its source, and without the advice that follows the first sentence."""
    return text.rpartition("] ")[2].partition(". ")[0] if text.startswith("[/") and "]: " not in text else text
