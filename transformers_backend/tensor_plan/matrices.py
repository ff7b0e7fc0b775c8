"""The two kinds of matrices in Transformers models: torch's Linear, and Conv1D, whose weight is transposed."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is (in, out)."""
    return isinstance(module, Conv1D)


def input_features(module: nn.Module) -> int:
    return module.weight.shape[0 if is_transposed(module) else 1]


def output_features(module: nn.Module) -> int:
    return module.weight.shape[1 if is_transposed(module) else 0]


def local_output_features(module: nn.Module, features: int) -> dict[str, int]:
    """The attributes that the module's forward reads, with `features` outputs on one rank."""
    return {"nf": features} if is_transposed(module) else {}
