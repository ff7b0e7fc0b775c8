"""What is wrong with a batch before the model sees it: shapes, tokens that differ between ranks of one model, and
tokens and positions that there are not.

`HFTransformerModel` asks with every call.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from parallelize.distributed import are_equal
from transformers_backend.loss import IGNORE_INDEX

# Ranks that differ only along these dimensions of the mesh compute on the same tokens.
_SAME_BATCH = {"cp": "context-parallel group", "tp": "tensor-parallel group", "pp": "pipeline"}


def check_shapes(input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    """A ValueError unless all are (batch, seq) alike, and not empty."""
    for name, tensor in (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids)):
        if tensor is not None and (tensor.shape != input_ids.shape or tensor.dim() != 2):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: input_ids, labels and position_ids must all be "
                f"(batch, seq); input_ids is {tuple(input_ids.shape)}."
            )
    if input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: a batch has at least one sequence of one token. Leave the "
            f"call out; where other ranks still have data, give this one a sequence with all labels {IGNORE_INDEX}, "
            "because all of them must make the same calls."
        )


def check_same_batch(*batch: torch.Tensor | None, mesh: DeviceMesh | None, device: torch.device) -> None:
    """Ranks that split a model must work on the same tokens; a ValueError at once on a CPU, later on CUDA.

    mesh: of the whole job, with dimensions "cp", "tp" and "pp"; None on one device. device: where it is compared.
    """
    sizes = {} if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
    if all(sizes.get(name, 1) == 1 for name in _SAME_BATCH):
        return
    tensors = [tensor.to(device, non_blocking=True) for tensor in batch if tensor is not None]
    shape = [torch.full((1,), size, device=device) for size in tensors[0].shape]  # a copy would wait for the device
    contents = torch.cat([*shape, *(tensor.flatten() for tensor in tensors)])
    same = are_equal(contents, *(mesh.get_group(name) for name in _SAME_BATCH))
    kinds = {kind: sizes[name] for name, kind in _SAME_BATCH.items()}
    message = (
        "input_ids, labels or position_ids differ between ranks of one "
        f"{' or '.join(f'{kind} of {size}' for kind, size in kinds.items() if size > 1)}, which compute on the same "
        "tokens. Give each rank the batch of its data_rank, of dims.data_parallel_size."
    )
    _require(same, message)


def check_vocabulary(input_ids: torch.Tensor, targets: torch.Tensor, size: int) -> None:
    """Tokens and targets must be in a vocabulary of `size`; a ValueError at once on a CPU, later on CUDA.

    For ranks that share a sequence: the model itself would fail only on the one that has the token, and the others
    would wait for it.
    """
    is_token = (input_ids >= 0) & (input_ids < size)
    is_target = (targets == IGNORE_INDEX) | ((targets >= 0) & (targets < size))
    good = is_token.all() & is_target.all()
    message = (
        f"input_ids or labels have a token that the model has not: they must be from 0 to {size - 1} (labels that are "
        f"to be ignored {IGNORE_INDEX}). Use the model's own tokenizer, or resize_token_embeddings first."
    )
    _require(good, message)


def check_positions(position_ids: torch.Tensor, count: int) -> None:
    """Positions must be in a learned table of `count`; likewise."""
    good = ((position_ids >= 0) & (position_ids < count)).all()
    _require(
        good, f"position_ids must be from 0 to {count - 1}: the model has learned so many positions. Cut the rows."
    )


def _require(good: torch.Tensor, message: str) -> None:
    """good: bool scalar. An accelerator is not waited for: its error comes later."""
    if good.device.type == "cpu" and not good:
        raise ValueError(message)
    torch._assert_async(good, message)
