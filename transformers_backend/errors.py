"""Which errors are meant for the user: a leaf that the entry points (train, verify) share."""

from __future__ import annotations

import traceback
from pathlib import Path

_OWN_FOLDERS = tuple(str(Path(__file__).parents[1] / name) for name in ("transformers_backend", "parallelize"))


def is_meant_for_the_user(error: Exception) -> bool:
    """Whether this project raised the error, or Transformers because a model or file could not be found.

    A ValueError from deep inside a library is a defect to be seen with its traceback, not a refusal.
    """
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, OSError) or raised_in.startswith(_OWN_FOLDERS)
