"""Planners for torch.distributed.checkpoint that keep fused parameters on disk in Transformers' order.

Between `state.py`, which says what is saved, and `writing.py` and `reading.py`, which have torch do it. To torch a
sharded tensor is one box of the full tensor. A parameter that tensor parallelism stores in another order
(`parallelize/tensor_parallel/packing.py`), and its optimizer state, are several boxes of the original: a rank's part of
every segment. Only the plans and the look-up of a box know of it; files, index and staging are torch's own, so that
whatever reads a checkpoint finds plain tensors in Transformers' order, and any tensor-parallel degree resumes from it.

They are planners and not objects with torch's `_Checkpointable` protocol, as that one is not for objects that are no
tensors: `_init_state_dict` replaces them by None, and `find_state_dict_object` refuses them an offset (torch 2.13).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallelize.tensor_parallel.packing import Packing
from transformers_backend.weights import local_part, local_regions


class PackedSavePlanner(DefaultSavePlanner):
    """Writes each box of a fused tensor under its offset in the original. Ranks with the same boxes (replicas) share
    the work as for any tensor: torch writes what has the same name and offset once."""

    def __init__(self, packings: Mapping[str, Packing]) -> None:
        """packings: by key of the flattened state."""
        super().__init__()
        self._packings = packings

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.index.fqn not in self._packings]
        for key, packing in self._packings.items():
            items += _write_items(key, self.state_dict[key], packing)
        return dataclasses.replace(plan, items=items)

    def lookup_object(self, index: MetadataIndex) -> object:
        if index.fqn in self._packings:
            return _find_box(self.state_dict[index.fqn], self._packings[index.fqn], index)
        return super().lookup_object(index)


class PackedLoadPlanner(DefaultLoadPlanner):
    """Reads each box of a fused tensor from its offset in the original straight into the rank's part."""

    def __init__(self, packings: Mapping[str, Packing]) -> None:
        """packings: by key of the flattened state."""
        super().__init__()
        self._packings = packings

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.dest_index.fqn not in self._packings]
        for key, packing in self._packings.items():
            chunks = _chunks(self.state_dict[key], packing)
            items += create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], chunks)
        return dataclasses.replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        if index.fqn in self._packings:
            return _find_box(self.state_dict[index.fqn], self._packings[index.fqn], index)
        return super().lookup_tensor(index)


def _chunks(tensor: torch.Tensor, packing: Packing) -> list[ChunkStorageMetadata]:
    """The boxes that this rank holds, in the original."""
    return [
        ChunkStorageMetadata(
            offsets=torch.Size(part.start for part in region.original),
            sizes=torch.Size(part.stop - part.start for part in region.original),
        )
        for region in local_regions(tensor, packing)
    ]


def _write_items(key: str, tensor: torch.Tensor, packing: Packing) -> list[WriteItem]:
    properties = TensorProperties.create_from_tensor(local_part(tensor))
    return [
        WriteItem(
            index=MetadataIndex(key, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=tensor.size()),
        )
        for chunk in _chunks(tensor, packing)
    ]


def _find_box(tensor: torch.Tensor, packing: Packing, index: MetadataIndex) -> torch.Tensor:
    """The view of this rank's part that is the box at an offset in the original."""
    for region in local_regions(tensor, packing):
        if index.offset == torch.Size(part.start for part in region.original):
            return local_part(tensor)[region.local]
    raise AssertionError(f"{index} is no box of this rank")
