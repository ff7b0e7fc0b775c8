"""(Sharded) parameters -> a folder that `AutoModelForCausalLM.from_pretrained` loads.

All ranks gather one group of parameters at a time (a decoder layer, or one other parameter); rank 0 keeps it until a
file is full, writes the file and forgets it. The folder appears under its name only when it is whole.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from transformers_backend.decoder import Decoder
from transformers_backend.folders import replace_folder
from transformers_backend.weights.initialize import group_by_layer
from transformers_backend.weights.shards import named_tensors

DEFAULT_FILE_SIZE = 5 * 10**9  # bytes; the usual bound on the hub

GetTensor = Callable[[str], torch.Tensor]


def save_hf_weights(
    model: nn.Module,
    blueprint: PreTrainedModel,
    decoder: Decoder,
    folder: str | Path,
    *,
    is_main: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | None = None,
    max_file_size: int = DEFAULT_FILE_SIZE,
) -> None:
    """Write weights, config, generation config and tokenizer to `folder`. Every rank calls it; the main one writes.

    blueprint: the same model, unsharded, on the meta device. dtype: cast floating-point weights to it; None keeps
    the parameters' own. max_file_size: bytes of one safetensors file; a larger tensor gets a file of its own. An
    existing folder of that name is replaced once the new one is whole.
    """
    folder = Path(folder)
    _check_folder(folder)
    tensors = named_tensors(model)

    def meta(name: str) -> torch.Tensor:
        return torch.empty(tensors[name].shape, dtype=_export_dtype(tensors[name], dtype), device="meta")

    def gathered(name: str) -> torch.Tensor:
        full = tensors[name].detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        return full.to("cpu", _export_dtype(full, dtype), copy=True).contiguous()

    groups = _exported_groups(blueprint, decoder)
    if not is_main:
        for name in (name for group in groups for name in group):
            if isinstance(tensors[name], DTensor):
                tensors[name].detach().full_tensor()  # takes part in the gathering, keeps nothing
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    file_of = _assign_files(_outputs(blueprint, groups, meta), max_file_size)
    _write_files(_outputs(blueprint, groups, gathered), file_of, temporary)
    _write_configs(
        blueprint,
        generation_config or blueprint.generation_config,
        temporary,
        dtype or next(iter(tensors.values())).dtype,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    replace_folder(folder, temporary)


def _check_folder(folder: Path) -> None:
    """Only what looks like an earlier export may be replaced."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; an export needs the name of a folder, new or to be replaced.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds files and no config.json, so it is no earlier export and is not replaced. Name a new "
            "folder, or one that save_pretrained wrote."
        )


def _export_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _exported_groups(blueprint: PreTrainedModel, decoder: Decoder) -> list[list[str]]:
    """Names to export, in groups that are gathered together; of tied parameters only the one that is stored."""
    ignored = [re.compile(pattern) for pattern in blueprint._keys_to_ignore_on_save or ()]
    names = [
        name
        for name in named_tensors(blueprint)
        if name not in blueprint.all_tied_weights_keys and not any(pattern.search(name) for pattern in ignored)
    ]
    return group_by_layer(names, decoder)


def _outputs(blueprint: PreTrainedModel, groups: list[list[str]], get: GetTensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name on disk, tensor) in file order, in the layout that the architecture's published checkpoints have.

    A group holds everything that one conversion needs, because no conversion reaches across layers.
    """
    for group in groups:
        yield from revert_weight_conversion(blueprint, {name: get(name) for name in group}).items()


def _assign_files(outputs: Iterator[tuple[str, torch.Tensor]], max_file_size: int) -> dict[str, str]:
    """Name on disk -> file name: files are filled in order, each up to `max_file_size` bytes."""
    file_index, filled, indices = 0, 0, {}
    for name, tensor in outputs:
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > max_file_size:
            file_index, filled = file_index + 1, 0
        indices[name] = file_index
        filled += size
    if file_index == 0:
        return dict.fromkeys(indices, "model.safetensors")
    return {name: f"model-{index + 1:05d}-of-{file_index + 1:05d}.safetensors" for name, index in indices.items()}


def _write_files(outputs: Iterator[tuple[str, torch.Tensor]], file_of: dict[str, str], folder: Path) -> None:
    pending: dict[str, torch.Tensor] = {}
    current, total = None, 0
    for name, tensor in outputs:
        if file_of[name] != current and pending:
            save_file(pending, folder / current, metadata={"format": "pt"})
            pending = {}
        current = file_of[name]
        pending[name] = tensor.contiguous()
        total += tensor.numel() * tensor.element_size()
    save_file(pending, folder / current, metadata={"format": "pt"})
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
