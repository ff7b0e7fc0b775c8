"""How much of a model tensor parallelism splits: the share of the numbers in matrices that a rank has a part of."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallelize.distributed import gather_objects
from parallelize.tensor_parallel.apply import check_complete
from parallelize.tensor_parallel.distribute import distribute_parameters
from transformers_backend.decoder import describe_decoder
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.proof import MODEL_ERRORS
from transformers_backend.tensor_plan import Recipe, make_plan


def sharded_share(model: nn.Module, pipeline_group: dist.ProcessGroup) -> float:
    """Of all numbers in `model`'s parameters with two dimensions or more (each tied one once), the share that is split.

    pipeline_group: the ranks that have other parameters of the same model, or copies; all of them call this.
    """
    parts = gather_objects(_matrices(model), pipeline_group)
    return _share({name: size for part in parts for name, size in part.items()})


def _matrices(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """By name: how many numbers, and whether they are split over the last dimension of their mesh, the tensor-parallel
    one."""
    return {
        name: (parameter.numel(), isinstance(parameter, DTensor) and parameter.placements[-1].is_shard())
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
    }


def _share(matrices: dict[str, tuple[int, bool]]) -> float:
    split = sum(count for count, is_split in matrices.values() if is_split)
    return split / sum(count for count, _ in matrices.values())


def share_of_real_sizes(hf_config, model_class, recipe: Recipe, mesh: DeviceMesh) -> float | None:
    """The share for the sizes in `hf_config`, or None where `recipe` does not divide them evenly over `mesh`.

    On the meta device, without communication: one rank may call it alone.
    """
    try:
        model = build_on_meta(hf_config, model_class, HFTransformerModelArgs())
        plan = make_plan(model, describe_decoder(model), recipe, mesh.size())
        check_complete(model, plan)
        distribute_parameters(model, plan, mesh)
    except MODEL_ERRORS:  # sizes that do not fit, or a config class whose defaults cannot be built at all
        return None
    return _share(_matrices(model))
