"""Weights in and out: initialise, load from safetensors, export for `from_pretrained`.

Parameters here may be sharded (DTensor) or plain; nothing in this package ever holds a full model: weights move
one tensor, one layer or one file at a time. Names are Transformers' own, on disk and in memory.
"""

from transformers_backend.weights.export import DEFAULT_FILE_SIZE, save_hf_weights, write_export
from transformers_backend.weights.initialize import allocate, init_buffers, init_weights
from transformers_backend.weights.live import LiveTensors
from transformers_backend.weights.load import check_weight_files, load_hf_weights, recall_conversions, resolve_folder
from transformers_backend.weights.shards import full_tensor, local_part, local_regions, named_tensors

__all__ = [
    "DEFAULT_FILE_SIZE",
    "LiveTensors",
    "allocate",
    "check_weight_files",
    "full_tensor",
    "init_buffers",
    "init_weights",
    "load_hf_weights",
    "local_part",
    "local_regions",
    "named_tensors",
    "recall_conversions",
    "resolve_folder",
    "save_hf_weights",
    "write_export",
]
