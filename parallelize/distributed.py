"""Process groups: starting and stopping them, and the few collectives on plain numbers that the trainer needs.

The program knows one convention: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torchrun,
`accelerate launch` and the launch script (for srun) all set. Without them it is a world of one process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallelize.context_parallel.levels import groups_made
from parallelize.parallel_dims import data_parallel_mesh

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 4 * 3600  # one rank writing or downloading a large model while the others wait


def pick_device() -> torch.device:
    """This process's device: its CUDA GPU by local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Where the launcher shows each process its own GPU only, that one is number 0 whatever the local rank.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def launched_world_size() -> int:
    """Number of processes that the launcher started, known before a process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def initialize(device: torch.device, *, timeout_seconds: int) -> None:
    """Start the default process group (NCCL on CUDA, with gloo beside it for CPU tensors; gloo on the CPU)."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        if "MASTER_ADDR" in os.environ:
            logger.warning(
                "MASTER_ADDR is set, but RANK and WORLD_SIZE are not: this process trains alone. `accelerate launch` "
                "starts several with --multi_gpu (on machines without a GPU too), not with --cpu."
            )
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def record_collectives(path_prefix: str, *, buffer_size: int) -> None:
    """Have torch's flight recorder keep the last `buffer_size` collectives of this rank; before any group starts.

    NCCL's watchdog writes them to `path_prefix` + rank when a collective takes too long (and then kills the process);
    for gloo, where nothing does, there is `collectives_written_on_error`.
    """
    Path(path_prefix).parent.mkdir(parents=True, exist_ok=True)
    # torch has no other way in.
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(buffer_size)
    os.environ["TORCH_FR_DUMP_TEMP_FILE"] = path_prefix
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"


@contextlib.contextmanager
def collectives_written_on_error(path_prefix: str):
    """If the block raises, write this rank's flight recorder to `path_prefix` + rank: a pickled dict, as NCCL's is."""
    try:
        yield
    except Exception:
        Path(f"{path_prefix}{dist.get_rank()}").write_bytes(torch._C._distributed_c10d._dump_fr_trace())
        raise


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(seconds: int, mesh: DeviceMesh | None) -> None:
    """Bound every further collective of the mesh's groups: a rank that is gone shows as an error on the others."""
    timeout = timedelta(seconds=seconds)
    groups = [dist.group.WORLD]
    if mesh is not None:
        groups += [*mesh.get_all_groups(), *data_parallel_mesh(mesh).get_all_groups(), *groups_made(mesh["cp"])]
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def patience(mesh: DeviceMesh | None, *, then_seconds: int):
    """Within the block ranks may wait hours for one another (downloads, exports); then `then_seconds` again."""
    set_timeout(_PATIENCE_SECONDS, mesh)
    try:
        yield
    finally:
        set_timeout(then_seconds, mesh)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are native: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def sum_over(value: torch.Tensor, meshes: list[DeviceMesh]) -> torch.Tensor:
    """All-reduce a tensor (in place) over each mesh of size > 1 in turn and return it."""
    for mesh in meshes:
        if mesh.size() > 1:
            dist.all_reduce(value, group=mesh.get_group())
    return value


@contextlib.contextmanager
def first_rank_first():
    """Run the block on rank 0, then on the others: for downloads into a cache that ranks share."""
    if dist.is_initialized() and dist.get_rank() != 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and dist.get_rank() == 0:
            dist.barrier()


def gather_objects(value, group: dist.ProcessGroup | None = None) -> list:
    """One picklable object of every rank (of `group`; None is all), in rank order, on every one of them."""
    if not dist.is_initialized():
        return [value]
    objects = [None] * dist.get_world_size(group)
    dist.all_gather_object(objects, value, group=group)
    return objects


def first_reason(reason: str | None) -> str | None:
    """That of the first rank which has one, on every rank; None where none has."""
    return next((found for found in gather_objects(reason) if found is not None), None)


def from_first_rank(value):
    """A picklable object as rank 0 has it, on every rank."""
    if not dist.is_initialized():
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


def are_equal(tensor: torch.Tensor, *groups: dist.ProcessGroup) -> torch.Tensor:
    """Whether every rank of the group holds the same integers, as a bool scalar on the tensor's device.

    groups: dimensions of a mesh; all ranks of the block that they span get one answer.
    tensor: any number of integers, of any shape; nothing waits for the device. What is compared is a weighted sum, so
    that another order shows, too.
    """
    numbers = tensor.detach().flatten().to(torch.int64)
    weights = 2 * torch.arange(1, numbers.numel() + 1, device=tensor.device) + 1
    total = (weights * (numbers + 7)).sum()  # 7, so that zeros count, and with them the shape
    highest = torch.stack([total, -total])
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    return highest[0] == -highest[1]


def share_random_state(group: dist.ProcessGroup) -> None:
    """Give every rank of the group the state of the first one's default random generators (CPU, and its CUDA device).

    Ranks that compute the same (those of a tensor-parallel group, outside the split regions) must drop the same.
    """
    state = [torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None]
    dist.broadcast_object_list(state, group=group, group_src=0)
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def same_outcome(*kinds: type[Exception], group: dist.ProcessGroup | None = None):
    """Run the block on every rank; an error of one of `kinds` on any rank is raised on all, when all are through.

    So no rank waits for one that has stopped. A rank that fails must not leave collectives of the block to the others.
    """
    failure = None
    try:
        yield
    except kinds as error:
        failure = error
    kind = next((index for index, kind in enumerate(kinds) if isinstance(failure, kind)), None)
    outcomes = gather_objects(None if failure is None else (kind, str(failure)), group)
    failures = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
    if not failures:
        return
    if failure is not None and len(set(failures.values())) == 1 and len(failures) == len(outcomes):
        raise failure
    rank, (kind, message) = next(iter(failures.items()))
    raise kinds[kind](f"rank {rank}: {message}") from failure


def gathered(tensor: DTensor) -> torch.Tensor:
    """All of a DTensor, on every rank of its mesh, which all call it.

    `full_tensor` does the same, and where two dimensions of the mesh shard one dimension of the tensor it warns that it
    gathers twice: with FSDP2 over tensor parallelism that is so by their order (`_StridedShard`: FSDP2's shards are cut
    out of those of tensor parallelism, so they are joined first), and nobody could do anything about it.
    """
    placements = list(tensor.placements)
    for dimension in sorted(range(len(placements)), key=lambda number: (type(placements[number]) is Shard, -number)):
        if not placements[dimension].is_replicate():
            placements[dimension] = Replicate()
            tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
