"""From degrees to a device mesh: the one place that knows how ranks are laid out.

Order, outermost first: (pp, dp_replicate, dp_shard, cp, tp). Ranks that talk most are neighbours, so that tensor
parallelism stays inside a node while pipeline stages may be far apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallelize.config import ParallelismConfig, check

MESH_DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class ParallelDims:
    """Resolved degrees (no -1) of a world of `world_size` ranks."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @classmethod
    def resolve(cls, config: ParallelismConfig, world_size: int) -> ParallelDims:
        """Fill in -1 and hold the product of all degrees against the world size; raises a ValueError."""
        check(config.problems())
        fixed = (
            config.data_parallel_replicate_degree
            * config.pipeline_parallel_degree
            * config.context_parallel_degree
            * config.tensor_parallel_degree
        )
        shard = config.data_parallel_shard_degree
        if shard == -1:
            shard = max(1, world_size // fixed)
        if shard * fixed != world_size:
            raise ValueError(
                f"parallelism: the degrees multiply to {shard * fixed}, but the job runs on {world_size} ranks "
                f"(pipeline_parallel_degree = {config.pipeline_parallel_degree}, data_parallel_replicate_degree = "
                f"{config.data_parallel_replicate_degree}, data_parallel_shard_degree = "
                f"{config.data_parallel_shard_degree}, context_parallel_degree = {config.context_parallel_degree}, "
                f"tensor_parallel_degree = {config.tensor_parallel_degree}). They must multiply to the number of "
                "ranks; data_parallel_shard_degree = -1 takes the rest."
            )
        return cls(
            pp=config.pipeline_parallel_degree,
            dp_replicate=config.data_parallel_replicate_degree,
            dp_shard=shard,
            cp=config.context_parallel_degree,
            tp=config.tensor_parallel_degree,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in MESH_DIMENSIONS)

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks that see different data; those that differ only in cp, tp or pp see the same."""
        return self.dp_replicate * self.dp_shard

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """The device mesh of the whole job, with all five dimensions (most of size 1)."""
        return init_device_mesh(device_type, self.sizes, mesh_dim_names=MESH_DIMENSIONS)

    def check_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """`mesh` itself if it is one that `build_mesh` of these sizes returned, else a ValueError."""
        if mesh.mesh_dim_names != MESH_DIMENSIONS or tuple(mesh.shape) != self.sizes:
            raise ValueError(
                f"mesh: it has {dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))}, and the degrees of "
                f"`parallelism` make {dict(zip(MESH_DIMENSIONS, self.sizes, strict=True))}. Pass the `mesh` of a model "
                "that was parallelised with the same degrees, or none."
            )
        return mesh

    def __str__(self) -> str:
        used = [f"{name} {size}" for name, size in zip(MESH_DIMENSIONS, self.sizes, strict=True) if size > 1]
        return " x ".join(used) or "of one rank"


def data_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that FSDP2 shards over: 1-D (dp_shard), or 2-D (dp_replicate, dp_shard) for HSDP.

    Ranks that share sequences hold shards like those with other data: both have a part of the loss.
    """
    shards = mesh["dp_shard"]
    if mesh["cp"].size() > 1:
        shards = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")  # the same one every time
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if mesh["dp_replicate"].size() > 1 else shards
