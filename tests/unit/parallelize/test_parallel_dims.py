"""Degrees of a world of ranks: what -1 becomes, what does not multiply, and who sits where in the mesh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallelize.config import ParallelismConfig
from parallelize.parallel_dims import MESH_DIMENSIONS, ParallelDims, data_parallel_mesh


def _resolve(world_size: int, replicate: int = 1, shard: int = -1) -> ParallelDims:
    config = ParallelismConfig(data_parallel_replicate_degree=replicate, data_parallel_shard_degree=shard)
    return ParallelDims.resolve(config, world_size)


@pytest.mark.parametrize(
    ("world_size", "replicate", "shard", "expected"),
    [
        (1, 1, -1, (1, 1)),
        (8, 1, -1, (1, 8)),
        (8, 2, -1, (2, 4)),
        (8, 8, -1, (8, 1)),
        (8, 4, 2, (4, 2)),
        (6, 2, 3, (2, 3)),
    ],
)
def test_the_rest_of_the_world(world_size: int, replicate: int, shard: int, expected: tuple[int, int]):
    dims = _resolve(world_size, replicate, shard)
    assert (dims.dp_replicate, dims.dp_shard) == expected
    assert (dims.pp, dims.cp, dims.tp) == (1, 1, 1)
    assert dims.sizes == (1, *expected, 1, 1)
    assert dims.world_size == dims.data_parallel_size == world_size


@pytest.mark.parametrize(("world_size", "replicate", "shard"), [(8, 3, -1), (8, 1, 4), (4, 8, -1), (1, 2, 2)])
def test_degrees_must_multiply_to_the_world(world_size: int, replicate: int, shard: int):
    with pytest.raises(ValueError, match=f"the job runs on {world_size} ranks") as caught:
        _resolve(world_size, replicate, shard)
    assert f"data_parallel_replicate_degree = {replicate}" in str(caught.value)
    assert f"data_parallel_shard_degree = {shard}" in str(caught.value)
    assert "(pipeline_parallel_degree = 1, " in str(caught.value)
    assert "context_parallel_degree = 1, tensor_parallel_degree = 1)" in str(caught.value)
    assert "-1 takes the rest" in str(caught.value)


def test_the_rest_of_the_world_beside_tensor_parallelism():
    dims = ParallelDims.resolve(ParallelismConfig(data_parallel_replicate_degree=2, tensor_parallel_degree=2), 16)
    assert (dims.dp_replicate, dims.dp_shard, dims.tp) == (2, 4, 2)
    assert (dims.world_size, dims.data_parallel_size) == (16, 8)


def test_bad_values_are_told_before_the_product():
    with pytest.raises(ValueError, match=r"parallelism\.data_parallel_replicate_degree = 0: must be at least 1"):
        _resolve(4, replicate=0)


def test_text_names_the_dimensions_in_use():
    assert str(_resolve(8, 2)) == "dp_replicate 2 x dp_shard 4"
    assert str(_resolve(1)) == "of one rank"
    dims = ParallelDims(pp=2, dp_replicate=1, dp_shard=3, cp=1, tp=4)
    assert str(dims) == "pp 2 x dp_shard 3 x tp 4"
    assert (dims.world_size, dims.data_parallel_size) == (24, 3)


@pytest.fixture
def _eight_ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_eight_ranks")
def test_mesh_order_is_outermost_first():
    dims = ParallelDims(pp=2, dp_replicate=1, dp_shard=2, cp=1, tp=2)
    mesh = dims.build_mesh("cpu")
    assert mesh.mesh_dim_names == MESH_DIMENSIONS == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    assert mesh.mesh.flatten().tolist() == list(range(8))
    # Rank 5 = 1 * 4 + 0 * 2 + 1: the second pipeline stage, the first data rank, the second tensor rank.
    assert [mesh.get_local_rank(name) for name in ("pp", "dp_shard", "tp")] == [1, 0, 1]
    assert dims.check_mesh(mesh) is mesh
    other = ParallelDims(pp=1, dp_replicate=1, dp_shard=4, cp=1, tp=2)
    with pytest.raises(ValueError, match=r"mesh: it has .*'pp': 2, .* make .*'dp_shard': 4, .*same degrees"):
        other.check_mesh(mesh)


@pytest.mark.usefixtures("_eight_ranks")
@pytest.mark.parametrize(
    ("replicate", "names"), [(1, ("dp_shard",)), (2, ("dp_replicate", "dp_shard")), (8, ("dp_replicate", "dp_shard"))]
)
def test_fsdp_gets_a_line_or_a_plane(replicate: int, names: tuple[str, ...]):
    mesh = data_parallel_mesh(_resolve(8, replicate).build_mesh("cpu"))
    assert mesh.mesh_dim_names == names
    assert mesh.size() == 8
