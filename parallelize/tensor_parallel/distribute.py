"""Where parameters are: each becomes a DTensor on the tensor-parallel mesh, cut as its style says.

Below `apply.py`. Fused parameters are cut in an order of their own, see `packing.py`.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallelize.tensor_parallel.packing import Packing, set_packing
from parallelize.tensor_parallel.plan import Split, TensorPlan


def distribute_parameters(model: nn.Module, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Replace every parameter by a DTensor on `mesh` that holds this rank's part; no rank sends anything."""
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            split = plan.split_of(f"{prefix}.{name}" if prefix else name)
            if id(parameter) not in done:
                done[id(parameter)] = _distributed(parameter, name, split, mesh)
            module._parameters[name] = done[id(parameter)]
            if (packing := _packing(split, name, mesh.size())) is not None:
                set_packing(module, name, packing)


def _distributed(parameter: nn.Parameter, name: str, split: Split, mesh: DeviceMesh) -> nn.Parameter:
    placement = _placement(split, name, mesh.size())
    full = parameter.detach()
    packing = _packing(split, name, mesh.size())
    if packing is not None:
        full = packing.to_stored(full)
    local = full
    if isinstance(placement, Shard):
        parts = full.tensor_split(_chunk_ends(full.shape[placement.dim], mesh.size()), placement.dim)
        local = parts[mesh.get_local_rank()].clone()  # not a view, which would keep the whole in memory
    if not local.is_meta:
        local = local.to(mesh.device_type)
    distributed = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def _chunk_ends(size: int, ranks: int) -> list[int]:
    """Where DTensor cuts an uneven dimension: chunks of equal size but for the last ones, which may be empty."""
    chunk = -(-size // ranks)
    return [min(rank * chunk, size) for rank in range(1, ranks)]


def _placement(split: Split, name: str, degree: int) -> Placement:
    """Where the parameter `name` of a module with this split is cut."""
    if split.style == "vocabulary":
        return Shard(0)
    if split.style == "split":
        return Replicate() if split.segments[0].is_shared(degree) else Shard(0)
    if split.style == "colwise":
        return Shard(split.output_dim(name))
    if split.style == "rowwise" and name == "weight":
        return Shard(1 - split.output_dim(name))
    return Replicate()


def _packing(split: Split, name: str, degree: int) -> Packing | None:
    if split.style not in ("colwise", "rowwise") or len(split.segments) < 2:
        return None
    placement = _placement(split, name, degree)
    if not isinstance(placement, Shard):  # the bias of a rowwise linear
        return None
    return Packing(dim=placement.dim, segments=tuple(segment.size for segment in split.segments), degree=degree)
