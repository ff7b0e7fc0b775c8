"""The gradient norm over parameters on several meshes, 2 gloo processes, against the plain norm of the full tensors."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from parallelize.grad_norm import clip_grad_norm_
from tests.distributed.workers import WorkerPool

WORLD_SIZE = 2
SHAPES = [(6, 4), (5, 3), (1, 7), (4, 4), (3,), (4, 6)]


def _full_gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _check_all_norms() -> None:
    line = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("shard",))
    plane = init_device_mesh("cpu", (1, WORLD_SIZE), mesh_dim_names=("replicate", "shard"))
    # Even, uneven (5 rows) and empty (1 row) shards, another mesh, a replicated one, a plain tensor.
    placements = [
        (line, [Shard(0)]),
        (line, [Shard(0)]),
        (plane, [Replicate(), Shard(0)]),
        (line, [Shard(1)]),
        None,
        (plane, [Replicate(), Replicate()]),
    ]
    for norm_type in (2.0, float("inf")):
        for max_norm in (0.5, 1e9):
            _compare(placements, norm_type, max_norm)
    _unreduced_gradients_are_summed_first(line)


def _compare(placements: list, norm_type: float, max_norm: float) -> None:
    reference = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    sharded = []
    for plain, gradient, placement in zip(reference, _full_gradients(), placements, strict=True):
        plain.grad = gradient.clone()
        value = plain.detach() if placement is None else distribute_tensor(plain.detach(), *placement)
        parameter = torch.nn.Parameter(value)
        parameter.grad = gradient.clone() if placement is None else distribute_tensor(gradient, *placement)
        sharded.append(parameter)

    expected = torch.nn.utils.clip_grad_norm_(reference, max_norm, norm_type)
    norm = clip_grad_norm_(sharded, max_norm, norm_type=norm_type)

    assert type(norm) is torch.Tensor
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for plain, parameter, placement in zip(reference, sharded, placements, strict=True):
        gradient = parameter.grad if placement is None else parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, plain.grad, rtol=1e-6, atol=0)


def _unreduced_gradients_are_summed_first(mesh) -> None:
    local = torch.tensor([3.0, 4.0])
    parameter = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(local, mesh, [Partial()])
    assert clip_grad_norm_([parameter], float("inf")).item() == pytest.approx(5.0 * WORLD_SIZE)
    assert clip_grad_norm_([parameter], 1.0, norm_type=float("inf")).item() == pytest.approx(4.0 * WORLD_SIZE)


def test_norm_over_several_meshes_is_the_plain_norm(two: WorkerPool):
    two.run(_check_all_norms)
