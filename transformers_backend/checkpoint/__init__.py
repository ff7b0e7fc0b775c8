"""Checkpoints to resume from: model, optimizers, schedulers, data position, random state and step.

    checkpointer.py   Checkpointer: what the trainer calls
    start.py          where a run starts from
    state.py          what is saved of a run, and how it is put back
    writing.py        one write: by all ranks, now or beside training
    planners.py       fused parameters in Transformers' order on disk
    reading.py        is a checkpoint whole, and does it fit this run
    storage.py        where checkpoints lie, as the files above see it
    local.py          a folder of this machine or of a shared file system
    remote.py         a bucket, through fsspec
    places.py         which of the two a path or URL means, and whether all machines share it

Written with torch.distributed.checkpoint, every rank its own shards. For a folder that Transformers loads, see
`weights/export.py`.
"""

from transformers_backend.checkpoint.checkpointer import Checkpointer
from transformers_backend.checkpoint.places import is_remote, locate_folder, open_storage, require_shared
from transformers_backend.checkpoint.reading import CONFIG_FILE
from transformers_backend.checkpoint.start import start
from transformers_backend.checkpoint.writing import SaveError

__all__ = [
    "CONFIG_FILE",
    "Checkpointer",
    "SaveError",
    "is_remote",
    "locate_folder",
    "open_storage",
    "require_shared",
    "start",
]
