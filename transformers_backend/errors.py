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

import torch.distributed as dist

_OWN_FOLDERS = tuple(str(Path(__file__).parents[1] / name) for name in ("transformers_backend", "parallelize"))

# gloo raises RuntimeError; what a lost connection, and a collective that took too long, say:
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LATE_PEER = ("Timed out waiting", "Application timeout caused pair closure")


def is_meant_for_the_user(error: BaseException) -> bool:
    """Whether this project raised the error, or Transformers because a model or file could not be found.

    A ValueError from deep inside a library is a defect to be seen with its traceback, not a refusal.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, (ValueError, ImportError, FloatingPointError)):
        return False
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OWN_FOLDERS)


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


def _without_source_line(text: str) -> str:
    """gloo's message without the place in its source, and without the advice that follows the first sentence."""
    return text.rpartition("] ")[2].partition(". ")[0] if text.startswith("[/") and "]: " not in text else text
