"""How an export lies on disk: which tensors are converted together, under which names, in which file.

All of it follows from the blueprint (the model on the meta device), so every rank plans the same layout by itself and
no tensor is read for it. `export.py` carries the plan out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from transformers_backend.decoder import Decoder
from transformers_backend.weights.initialize import group_by_layer
from transformers_backend.weights.shards import named_tensors

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    file_of: dict[str, str]
    """Name on disk -> file name, in file order."""
    sources: dict[str, list[tuple[str, ...]]]
    """File name -> groups of names in the model that its tensors are made of, each group converted by itself. A group
    whose tensors lie in several files stands under each of them."""
    total_size: int
    """Bytes of all tensors."""


def plan_layout(
    blueprint: PreTrainedModel, decoder: Decoder, meta: Callable[[str], torch.Tensor], max_file_size: int
) -> Layout:
    """Plan the files of an export. `meta` gives a tensor of the model on the meta device, in the dtype of the export.

    Files are filled in the order of the model, each up to `max_file_size` bytes; a larger tensor has a file of its own.
    """
    file_index, filled, total = 0, 0, 0
    indices: dict[str, int] = {}
    groups_of: list[list[tuple[str, ...]]] = [[]]
    for group, outputs in _converted_groups(blueprint, _exported_groups(blueprint, decoder), meta):
        for name, tensor in outputs.items():
            size = tensor.numel() * tensor.element_size()
            if filled and filled + size > max_file_size:
                file_index, filled = file_index + 1, 0
                groups_of.append([])
            if group not in groups_of[-1][-1:]:
                groups_of[-1].append(group)
            indices[name] = file_index
            filled += size
            total += size
    count = len(groups_of)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return Layout(
        file_of={name: names[index] for name, index in indices.items()},
        sources=dict(zip(names, groups_of, strict=True)),
        total_size=total,
    )


def convert_group(blueprint: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name on disk: tensor} of one group, in the layout that the architecture's published checkpoints have."""
    return revert_weight_conversion(blueprint, tensors)


def _exported_groups(blueprint: PreTrainedModel, decoder: Decoder) -> list[list[str]]:
    """Names to export, one list a layer or other parameter; of tied parameters only the one that is stored."""
    ignored = [re.compile(pattern) for pattern in blueprint._keys_to_ignore_on_save or ()]
    names = [
        name
        for name in named_tensors(blueprint)
        if name not in blueprint.all_tied_weights_keys and not any(pattern.search(name) for pattern in ignored)
    ]
    return group_by_layer(names, decoder)


def _converted_groups(
    blueprint: PreTrainedModel, groups: list[list[str]], meta: Callable[[str], torch.Tensor]
) -> Iterator[tuple[tuple[str, ...], dict[str, torch.Tensor]]]:
    """(names that are converted together, outputs on meta): a layer as a whole, or tensor by tensor.

    No conversion reaches across layers. Most do not even reach across tensors: where the tensors one by one give what
    the layer gives, they are handled one by one, so that nobody holds more of them than a file needs.
    """
    for group in groups:
        together = convert_group(blueprint, {name: meta(name) for name in group})
        singles = [convert_group(blueprint, {name: meta(name)}) for name in group] if len(group) > 1 else []
        apart = {name: tensor.shape for outputs in singles for name, tensor in outputs.items()}
        if singles and apart == {name: tensor.shape for name, tensor in together.items()}:
            yield from zip(((name,) for name in group), singles, strict=True)
        else:
            yield tuple(group), together
