"""Gradient norms, clipping and optimizers on the meshes that tensor parallelism makes, 4 gloo processes.

The reference is the same on plain tensors. Parameters have all layouts that occur: whole and split along either
dimension over tp, evenly, unevenly and with empty parts, and each of these cut further by FSDP2 along dimension 0,
which makes `_StridedShard` of what tp splits there too.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from parallelize.grad_norm import clip_grad_norm_
from parallelize.mixed_precision import parameters_cast_to
from parallelize.parallel_dims import ParallelDims, data_parallel_mesh
from tests.distributed.workers import WorkerPool
from transformers_backend.optimizer import build_optimizer

LAYOUTS = {
    "colwise": ((8, 6), Shard(0)),
    "uneven": ((5, 3), Shard(0)),
    "empty": ((1, 7), Shard(0)),
    "one_row_each": ((2, 3), Shard(0)),
    "rowwise": ((6, 8), Shard(1)),
    "rowwise_uneven": ((3, 5), Shard(1)),
    "whole": ((4, 6), Replicate()),
    "norm": ((3,), Replicate()),
    "bias": ((7,), Shard(0)),
}
# (dp_replicate, dp_shard, tp): tp alone over two and over four ranks, FSDP2, HSDP, and replicas of unsharded groups.
MESHES = [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 4, 1), None]


class _Parameters(nn.Module):
    """Parameters with the same random values each time; the gradient of `forward(gradients)` is `gradients`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        start = _random(0)
        for name in names:
            self.register_parameter(name, nn.Parameter(start[name]))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((_local(p) * _part(gradients[name], p)).sum() for name, p in self.named_parameters())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _random(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in LAYOUTS.items()}


@functools.cache
def _mesh(replicate: int, shard: int, tensor: int) -> DeviceMesh:
    """In a worker, once: process groups take a while to start."""
    return ParallelDims(pp=1, dp_replicate=replicate, dp_shard=shard, cp=1, tp=tensor).build_mesh("cpu")


def _names(degrees: tuple[int, int, int] | None) -> list[str]:
    """FSDP2 of torch 2.13 cannot reduce the gradient of a parameter of which tp leaves a rank nothing."""
    is_sharded_further = degrees is not None and degrees[0] * degrees[1] > 1 and degrees[2] > 1
    return [name for name in LAYOUTS if not (is_sharded_further and name == "empty")]


def _split(model: nn.Module, degrees: tuple[int, int, int] | None) -> int:
    """Lay `model` out over (dp_replicate, dp_shard, tp) ranks, None: over tp of two with other ranks doing the same.

    Returns the number of data ranks.
    """
    replicate, shard, tensor = degrees or (2, 1, 2)
    mesh = _mesh(replicate, shard, tensor)
    if tensor > 1:
        for name, parameter in list(model.named_parameters()):
            value = distribute_tensor(parameter.detach(), mesh["tp"], [LAYOUTS[name][1]], src_data_rank=None)
            setattr(model, name, nn.Parameter(value))
    if degrees is None or replicate * shard == 1:
        return 1
    fully_shard(model, mesh=data_parallel_mesh(mesh))
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    if degrees == (1, 2, 2):
        assert isinstance(model.colwise.placements[0], _StridedShard), "what this file is about"
        assert model.colwise.device_mesh.mesh_dim_names == ("dp_shard", "tp")
    return replicate * shard


def _full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _backward(model: nn.Module, gradients: dict[str, torch.Tensor], data_ranks: int) -> None:
    model({name: gradient / data_ranks for name, gradient in gradients.items()}).backward()


def _compare_norms(degrees: tuple[int, int, int] | None) -> None:
    gradients = _random(1)
    for norm_type in (2.0, float("inf"), 1.0):
        for max_norm in (0.5, 1e9):
            plain, split = _Parameters(_names(degrees)), _Parameters(_names(degrees))
            data_ranks = _split(split, degrees)
            _backward(plain, gradients, 1)
            _backward(split, gradients, data_ranks)
            expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm, norm_type)
            norm = clip_grad_norm_(split.parameters(), max_norm, norm_type=norm_type)
            assert type(norm) is torch.Tensor
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
            for name, parameter in split.named_parameters():
                wanted = plain.get_parameter(name).grad
                torch.testing.assert_close(_full(parameter.grad), wanted, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_norms_and_clipped_gradients_are_the_plain_ones(four: WorkerPool, degrees: tuple[int, int, int] | None):
    four.run(_compare_norms, degrees)


def _compare_optimizers(degrees: tuple[int, int, int] | None, name: str, implementation: str) -> None:
    options = {"lr": 0.05, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "name": name}
    options |= {"implementation": implementation, "matrix_names": set(LAYOUTS)}
    plain, split = _Parameters(_names(degrees)), _Parameters(_names(degrees))
    data_ranks = _split(split, degrees)
    placements = {key: parameter.placements for key, parameter in split.named_parameters()}
    expected, optimizers = (build_optimizer(model.named_parameters(), **options) for model in (plain, split))
    for step in range(3):
        _backward(plain, _random(step), 1)
        _backward(split, _random(step), data_ranks)
        for optimizer in [*expected, *optimizers]:
            optimizer.step()
            optimizer.zero_grad()
    for key, parameter in split.named_parameters():
        assert parameter.placements == placements[key]
        torch.testing.assert_close(
            _full(parameter), plain.get_parameter(key).detach(), rtol=1e-5, atol=1e-6,
            msg=lambda m, key=key: f"{key}: {m}",
        )  # fmt: skip
        for ours in optimizers:
            state = [value for value in ours.state.get(parameter, {}).values() if value.ndim > 0]
            assert all(value.placements == placements[key] for value in state), "state lies as its parameter does"


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("AdamW", "fused"), ("AdamW", "foreach"), ("AdamW", "for-loop"), ("Muon", "fused")],
)
@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_updates_are_the_plain_ones(four: WorkerPool, degrees, name: str, implementation: str):
    four.run(_compare_optimizers, degrees, name, implementation)


# --- mixed precision without FSDP2


class _Table(nn.Embedding):
    """Whose weight other code reads, which is why no embedding but torch's own goes without a cast of its weight."""


class _Tied(nn.Module):
    """An embedding that is the head too, and a norm's weight between them; computes on local tensors where split.

    With a vocabulary that is split, `forward` gives this rank's logits; the embedding's part of the output is all that
    this rank's rows contribute, so that no communication is needed where each token is one of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = _Table(7, 6)
        self.embedding.weight = nn.Parameter(torch.randn(7, 6, generator=generator))
        self.norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, local_ids: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.embedding(local_ids, _local(self.embedding.weight))
        hidden = nn.functional.rms_norm(hidden, (6,), _local(self.norm.weight))
        return nn.functional.linear(hidden, _local(self.head.weight))


def _compare_casts() -> None:
    mesh = _mesh(2, 1, 2)["tp"]
    rank, rows = mesh.get_local_rank(), [4, 3]
    first = sum(rows[:rank])
    split, plain = _Tied(), _Tied()
    tied = nn.Parameter(distribute_tensor(split.head.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
    split.embedding.weight = split.head.weight = tied
    split.norm.weight = nn.Parameter(distribute_tensor(split.norm.weight.detach(), mesh, [Replicate()]))
    for _ in range(2):  # a second backward adds to the first
        with parameters_cast_to(split, torch.bfloat16):
            assert split.head.weight is split.embedding.weight is not tied, "one cast for both"
            logits = split(torch.arange(rows[rank]))
            assert logits.dtype == torch.bfloat16
            logits.float().square().sum().backward()
        with parameters_cast_to(plain, torch.bfloat16):
            mine = slice(first, first + rows[rank])
            plain(torch.arange(7)[mine])[:, mine].float().square().sum().backward()
    assert split.head.weight is split.embedding.weight is tied
    for parameter, reference in ((tied, plain.head.weight), (split.norm.weight, plain.norm.weight)):
        assert isinstance(parameter.grad, DTensor)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.placements == parameter.placements
        local = reference.grad[mine] if reference.ndim == 2 else reference.grad
        torch.testing.assert_close(parameter.grad.to_local(), local, rtol=1e-6, atol=1e-6)
        assert local.abs().max() > 0


def test_gradients_of_casts_arrive_in_the_parameters_own_dtype_and_placement(four: WorkerPool):
    four.run(_compare_casts)
