"""From what the config calls a folder to the storage behind it."""

from __future__ import annotations

from pathlib import Path

from transformers_backend.checkpoint.local import LocalStorage
from transformers_backend.checkpoint.storage import Storage


def open_storage(folder: str, inside: Path) -> Storage:
    """The storage of a path (relative ones lie `inside`) or URL (`s3://bucket/run`)."""
    if is_remote(folder):
        from transformers_backend.checkpoint.remote import RemoteStorage  # fsspec only where it is asked for

        return RemoteStorage(folder)
    return LocalStorage(inside / folder)


def is_remote(folder: str) -> bool:
    return "://" in folder
