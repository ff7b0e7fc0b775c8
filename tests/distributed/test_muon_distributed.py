"""Muon and AdamW on sharded parameters, 2 gloo processes, against the same optimizer on the full ones."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from tests.distributed.workers import WorkerPool
from transformers_backend.optimizer import ShardedMuon, build_optimizer

WORLD_SIZE = 2
# Even, tall, wide, uneven, and with fewer rows than ranks.
SHAPES = [(8, 16), (16, 8), (64, 32), (7, 5), (1, 6)]
MUON = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def _check() -> None:
    line = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("shard",))
    plane = init_device_mesh("cpu", (1, WORLD_SIZE), mesh_dim_names=("replicate", "shard"))
    for shape in SHAPES:
        _muon_equals_one_process(shape, line, [Shard(0)])
        _muon_equals_one_process(shape, plane, [Replicate(), Shard(0)])
    _muon_communicates_once_a_matrix(line)
    for implementation in ("fused", "foreach", "for-loop"):
        _fully_sharded_model_equals_one_process(line, plane, implementation)


def _muon_equals_one_process(shape: tuple[int, int], mesh, placements: list) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    reference = torch.nn.Parameter(start.clone())
    sharded = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, placements))
    ours, theirs = ShardedMuon([sharded], **MUON), torch.optim.Muon([reference], **MUON)
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        reference.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh, placements)
        ours.step()
        theirs.step()
    assert sharded.placements == tuple(placements)
    torch.testing.assert_close(sharded.detach().full_tensor(), reference.detach(), rtol=0, atol=1e-6)
    buffers = [optimizer.state[p]["momentum_buffer"] for optimizer, p in ((ours, sharded), (theirs, reference))]
    assert buffers[0].placements == tuple(placements), "momentum stays sharded"
    torch.testing.assert_close(buffers[0].full_tensor(), buffers[1], rtol=0, atol=1e-6)


def _muon_communicates_once_a_matrix(mesh) -> None:
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.eye(8, 4), mesh, [Shard(0)])
    optimizer = ShardedMuon([parameter], **MUON)
    with CommDebugMode() as communication:
        optimizer.step()
    assert communication.get_total_counts() == 1, communication.get_comm_counts()


def _model() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 5))


def _fully_sharded_model_equals_one_process(line, plane, implementation: str) -> None:
    """Parameters on two meshes and a plain one, updated by Muon and AdamW together."""
    options = {"lr": 0.05, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    options |= {"implementation": implementation, "matrix_names": {"0.weight"}}
    reference, sharded = _model(), _model()
    fully_shard(sharded[0], mesh=line)
    fully_shard(sharded[2], mesh=plane)
    expected = build_optimizer(reference.named_parameters(), name="Muon", **options)
    optimizers = build_optimizer(sharded.named_parameters(), name="Muon", **options)
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        for model, steps in ((reference, expected), (sharded, optimizers)):
            model(inputs).square().sum().backward()
            for optimizer in steps:
                optimizer.step()
                optimizer.zero_grad()
    for (name, mine), theirs in zip(sharded.named_parameters(), reference.parameters(), strict=True):
        full = mine.detach().full_tensor() if isinstance(mine, DTensor) else mine.detach()
        torch.testing.assert_close(full, theirs.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_sharded_updates_are_those_of_one_process(two: WorkerPool):
    two.run(_check)
