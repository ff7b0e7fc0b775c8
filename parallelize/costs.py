"""What training a model costs: floating point operations a token, device peaks, and model FLOPs utilisation.

A leaf: the caller counts parameters and describes each layer's attention, and everything here is arithmetic on those
numbers. `transformers_backend/metrics.py` and `scripts/benchmark.py` report with it, so that there is one formula.

The formula (PaLM, https://arxiv.org/abs/2204.02311, appendix B; torchtitan uses the same) counts the matrix products
of one forward and one backward pass, the backward being twice the forward, and a multiply-add as two operations:

    FLOPs a token  =  6 N  +  sum over layers of  6 H (Q + V) S

    N  parameters that multiply every token: all but the input embedding table, which is only looked up. A table that
       is tied to the head counts once, because as the head it does multiply.
    H  query heads. Grouped-query attention shares keys and values between them but computes as many scores.
    Q  size of a query and key head (scores: 2 H Q S forward).
    V  size of a value head (weighted sum: 2 H V S forward). With Q = V the term is the familiar 12 H Q S.
    S  sequence length, or the sliding window where that is shorter.

There is no discount for causal masking, and recomputation by activation checkpointing is not counted: the figure is
the work that the model needs, not the work that was done.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionCost:
    """What one layer's attention computes."""

    heads: int
    """Query heads."""
    query_key_dim: int
    """Size of one query or key head."""
    value_dim: int
    """Size of one value head; differs from query_key_dim in latent attention."""
    window: int | None
    """Sliding window in tokens; None means that every token sees the whole sequence."""


def training_flops_per_token(*, matmul_parameters: int, attention: Sequence[AttentionCost], seq_len: int) -> float:
    """Forward and backward operations for one token, by the formula at the top of this file.

    `matmul_parameters` is N, `attention` has one entry for each layer that has attention, `seq_len` is in tokens.
    """
    operations = 6 * matmul_parameters
    for layer in attention:
        visible = seq_len if layer.window is None else min(seq_len, layer.window)
        operations += 6 * layer.heads * (layer.query_key_dim + layer.value_dim) * visible
    return float(operations)


# Dense bf16 matrix-product peaks in FLOP/s with fp32 accumulation, from the vendors' data sheets (where those state
# figures "with sparsity", half of them). The first name that occurs in the device's name as whole words counts, so
# that a narrower name stands above a wider one.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500e12),
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX A6000", 154.8e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI355X", 2500e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 191.5e12),  # one of the two dies of a card: that is what a device is
)
# Names that contain one of the above but are a slower chip or a slice of one.
_SLOWER_VARIANTS = ("Laptop", "MIG", "4090 D")


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of dense matrix products in `dtype`, or None where it is not known.

    `device_name` is what `torch.cuda.get_device_name()` returns, e.g. "NVIDIA H100 80GB HBM3". Known are bfloat16
    and float16 (the same) on common accelerators. float32 has no single peak, because TF32 may be on, and so gives
    None, as every CPU does.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    if any(_occurs(variant, device_name) for variant in _SLOWER_VARIANTS):
        return None
    return next((peak for name, peak in _PEAK_FLOPS if _occurs(name, device_name)), None)


def mfu(tokens_per_second_per_device: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation as a fraction of `peak` (FLOP/s of one device), or None where the peak is unknown."""
    if peak is None:
        return None
    return tokens_per_second_per_device * flops_per_token / peak


def _occurs(name: str, device_name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE) is not None
