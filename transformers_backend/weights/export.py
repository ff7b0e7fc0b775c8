"""Weights -> a folder that `AutoModelForCausalLM.from_pretrained` loads, written by all ranks side by side.

The files are dealt to the ranks in turn. In a round every rank collects one file and writes it, so that a rank holds
one file at a time; then the ranks tell each other how it went, and an error on one stops all. Where the tensors come
from is a `TensorSource`: the live model (`live.py`), or a checkpoint on disk (`saved_checkpoint.py`). The folder
appears under its name only when it is whole.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from parallelize.distributed import rank_and_world_size, same_outcome
from transformers_backend.decoder import Decoder
from transformers_backend.folders import replace_folder
from transformers_backend.weights.layout import INDEX_FILE, Layout, convert_group, plan_layout
from transformers_backend.weights.live import LiveTensors
from transformers_backend.weights.shards import named_tensors

logger = logging.getLogger(__name__)

DEFAULT_FILE_SIZE = 5 * 10**9  # bytes; the usual bound on the hub

# What an earlier export may consist of: weights, configs, tokenizer files, code of the model's own.
_EXPORTED = re.compile(
    r"config\.json|generation_config\.json|model.*\.safetensors(\.index\.json)?|.*\.py"
    r"|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.*\.(model|tiktoken|jinja)"
    r"|additional_chat_templates|__pycache__"
)


class TensorSource(Protocol):
    """Where an export takes the model's tensors from, by their names in the model."""

    def meta(self, name: str) -> torch.Tensor:
        """The tensor's shape and dtype, on the meta device."""

    def read(self, names: tuple[str, ...], *, keep: bool) -> dict[str, torch.Tensor]:
        """The full tensors, on the CPU. Every rank calls it for the same names in the same order, and those that do
        not `keep` the tensors get nothing."""


def save_hf_weights(
    model: nn.Module,
    blueprint: PreTrainedModel,
    decoder: Decoder,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
    max_file_size: int = DEFAULT_FILE_SIZE,
    pipeline_group: dist.ProcessGroup | None = None,
) -> None:
    """Export the live `model`; every rank calls it. See `write_export`.

    pipeline_group: the ranks that have the rest of the model; None where it is whole on this rank.
    """
    write_export(
        LiveTensors(model, named_tensors(model), pipeline_group),
        blueprint,
        decoder,
        folder,
        tokenizer=tokenizer,
        generation_config=generation_config,
        dtype=dtype,
        max_file_size=max_file_size,
    )


def write_export(
    source: TensorSource,
    blueprint: PreTrainedModel,
    decoder: Decoder,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
    max_file_size: int = DEFAULT_FILE_SIZE,
) -> list[str]:
    """Write weights, config, generation config and tokenizer to `folder` and return the names of the weight files.

    Every rank calls it, with a folder that all of them see; it is whole when any of them returns. An error of one
    rank (a full disk, a damaged source) is raised on all, and nothing is left behind. blueprint: the model,
    unsharded, on the meta device. dtype: cast floating-point weights to it; None keeps their own. max_file_size:
    bytes of one safetensors file; a larger tensor gets a file of its own. An existing export of that name is replaced
    once the new one is whole.
    """
    folder = Path(os.path.abspath(folder))
    temporary = folder.parent / f"{folder.name}.partial"
    rank, world_size = rank_and_world_size()
    with same_outcome(OSError, ValueError):
        _check_folder(folder)
        if rank == 0:
            if temporary.is_dir():  # of an export that was killed
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)

    def meta(name: str) -> torch.Tensor:
        return _cast(source.meta(name), dtype)

    layout = plan_layout(blueprint, decoder, meta, max_file_size)
    files = list(layout.sources)
    try:
        with same_outcome(OSError, ValueError):
            _check_space(temporary, layout.total_size)
        for first in range(0, len(files), world_size):
            with same_outcome(OSError, ValueError):
                _write_round(source, blueprint, layout, files[first : first + world_size], temporary, dtype, rank)
            if len(files) > world_size:
                logger.info("%s: %d of %d files", temporary, min(first + world_size, len(files)), len(files))
        with same_outcome(OSError, ValueError):
            if rank == 0:
                _write_index(layout, temporary)
                generation_config = generation_config or blueprint.generation_config
                _write_configs(blueprint, generation_config, temporary, dtype or _main_dtype(source, layout))
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
                replace_folder(folder, temporary)
    except (OSError, ValueError):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return files


def _check_folder(folder: Path) -> None:
    """Only what looks like an earlier export may be replaced."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; an export needs the name of a folder, new or to be replaced.")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if entries and "config.json" not in entries:
        raise ValueError(
            f"{folder} holds files and no config.json, so it is no earlier export and is not replaced. Name a new "
            "folder, or one that save_pretrained wrote."
        )
    if foreign := [name for name in entries if not _EXPORTED.fullmatch(name)]:
        raise ValueError(
            f"{folder} holds {foreign[0]}, which is no part of an export, so the folder is not replaced. Move it away, "
            "or name a new folder."
        )


def _check_space(temporary: Path, size: int) -> None:
    """The folder that rank 0 made is there for this rank, and `size` bytes have room in it."""
    if not temporary.is_dir():
        raise ValueError(
            f"{temporary} was made by the first rank and is not there for another: an export that several machines "
            "write needs a folder on a file system that they share."
        )
    disk = shutil.disk_usage(temporary)
    if disk.total and disk.free < size:  # some network file systems say nothing
        raise OSError(
            f"{temporary.parent}: the export takes {size / 1e9:.3g} GB, and {disk.free / 1e9:.3g} GB are free. Make "
            "room, or name a folder on another disk."
        )


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _main_dtype(source: TensorSource, layout: Layout) -> torch.dtype:
    first_group = next(iter(layout.sources.values()))[0]
    return source.meta(first_group[0]).dtype


def _write_round(
    source: TensorSource,
    blueprint: PreTrainedModel,
    layout: Layout,
    files: list[str],
    folder: Path,
    dtype: torch.dtype | None,
    rank: int,
) -> None:
    """Collect the tensors of one file for each rank, then write this rank's."""
    collected: list[dict[str, torch.Tensor]] = []
    for owner, file in enumerate(files):
        for group in layout.sources[file]:
            tensors = source.read(group, keep=owner == rank)
            if owner == rank:
                collected.append({name: _cast(tensor, dtype) for name, tensor in tensors.items()})
    if rank >= len(files):
        return
    pending: dict[str, torch.Tensor] = {}
    while collected:  # each group is forgotten as it is converted
        for name, tensor in convert_group(blueprint, collected.pop(0)).items():
            if layout.file_of[name] == files[rank]:
                pending[name] = tensor.contiguous()
    try:
        save_file(pending, folder / files[rank], metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OSError(f"{folder / files[rank]} could not be written: {error}") from error


def _write_index(layout: Layout, folder: Path) -> None:
    """The index of several files; first a look that every one of them is there."""
    absent = [file for file in layout.sources if not (folder / file).is_file()]
    if absent:
        raise OSError(
            f"{folder}: {', '.join(absent)} not there though written by another rank; the folder must be on a file "
            "system that all machines share."
        )
    if len(layout.sources) > 1:
        index = {"metadata": {"total_size": layout.total_size}, "weight_map": dict(sorted(layout.file_of.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_configs(
    blueprint: PreTrainedModel, generation_config: GenerationConfig | None, folder: Path, dtype: torch.dtype
) -> None:
    config = copy.deepcopy(blueprint.config)
    config.architectures = [type(blueprint).__name__]
    config.dtype = dtype
    if blueprint.is_remote_code():
        custom_object_save(blueprint, folder, config=config)
    config.save_pretrained(folder)
    if blueprint.can_generate() and generation_config is not None:
        generation_config.save_pretrained(folder)
