"""What training a model costs: floating point operations a token, device peaks, model FLOPs utilisation, and memory.

A leaf: the caller counts parameters and describes each layer's attention, and everything here is arithmetic on those
numbers. `flops.py` and `memory.py` of transformers_backend do the counting, and training and `scripts/benchmark.py`
report with it, so that there is one formula.

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

The memory of activations is estimated in the way of "Reducing Activation Recomputation in Large Transformer Models"
(https://arxiv.org/abs/2205.05198, section 4.1): one adds up what each operation of a layer keeps for its backward. That
paper does so for one architecture. Here it follows from a layer's weights, so that it holds for any decoder layer:

    bytes a token and layer  =  b (I + O)  +  4 W  +  (b' + 4) H S

    b   bytes of one number in the computation's dtype
    I   inputs of all weight matrices of the layer: each product keeps its input. Projections that share one (query,
        key, value; gate, up) count it each, which stands for what activation functions and rotations keep.
    O   outputs of all weight matrices: kept by what follows, attention (fused, it keeps queries, keys, values and its
        output) or an activation function
    W   widths of all norms, which Transformers computes, and keeps the input of, in fp32
    H S scores of H query heads over S tokens, only where attention is not fused: kept after the softmax in fp32, and
        once more in b' = b bytes where b < 4, else b' = 0

With tensor parallelism these are the widths that one rank has (`LayerWidths`). Dropout masks and experts are left out.
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


@dataclass(frozen=True)
class LayerWidths:
    """How wide, in numbers a token, the values are that one decoder layer computes and this rank keeps."""

    hidden: int
    """Of the hidden states that enter the layer."""
    matrices: tuple[tuple[int, int], ...]
    """The two sizes of each weight matrix: of its outputs and inputs."""
    norms: tuple[int, ...]
    """What each norm normalises."""
    score_heads: int
    """Query heads whose scores are kept; 0 where attention is fused."""


@dataclass(frozen=True)
class ActivationBytes:
    """What the backward of layers needs, in bytes a token."""

    kept: float
    """From the forward on."""
    recomputed: float
    """More for a moment: what one layer computes again."""

    @property
    def together(self) -> float:
        return self.kept + self.recomputed


def activation_bytes_per_token(
    layers: Sequence[LayerWidths], *, itemsize: int, seq_len: int, recompute: str, memory_budget: float = 1.0
) -> ActivationBytes:
    """What the backward of all layers needs from the forward, by the formula at the top of this file.

    itemsize: bytes of a number in the computation's dtype. recompute: what activation checkpointing computes again:
    "none"; "full", every layer, of which one is whole at any time and the others keep only their input; "op", all but
    attention and every second matrix product; "2", "3" ..., every so many layers in full; or "memory_budget", all but
    that share of what is more than a layer's input.
    """
    whole = [_kept_bytes(layer, itemsize, seq_len) for layer in layers]
    if recompute == "none":
        return ActivationBytes(sum(whole), 0)
    if recompute == "op":
        kept = [itemsize * (2 * layer.hidden + sum(max(sizes) for sizes in layer.matrices) / 2) for layer in layers]
        return ActivationBytes(
            sum(min(some, everything) for some, everything in zip(kept, whole, strict=True)), max(whole)
        )
    if recompute == "memory_budget":
        inputs = [layer.hidden * itemsize for layer in layers]
        kept = [least + memory_budget * (most - least) for least, most in zip(inputs, whole, strict=True)]
        return ActivationBytes(sum(kept), max(most - some for most, some in zip(whole, kept, strict=True)))
    every = 1 if recompute == "full" else int(recompute)
    kept = [layers[n].hidden * itemsize if n % every == 0 else whole[n] for n in range(len(layers))]
    return ActivationBytes(sum(kept), max(whole[::every]))


def _kept_bytes(layer: LayerWidths, itemsize: int, seq_len: int) -> float:
    products = itemsize * sum(rows + columns for rows, columns in layer.matrices)
    scores = layer.score_heads * seq_len * (4 + (itemsize if itemsize < 4 else 0))
    return products + 4 * sum(layer.norms) + scores


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on one rank, part by part."""

    parameters: float
    """This rank's shards."""
    gradients: float
    """Of the shards."""
    optimizer: float
    """State of the optimizer for the shards."""
    working: float
    """Copies to compute with: gathered layers and their gradients before they are summed over ranks, or casts."""
    activations: float
    """What forwards keep for their backwards: of one micro-batch, in a pipeline of all that are under way at once."""
    logits: float
    """The head's output for one chunk of tokens, with its loss and gradient."""
    accumulates: bool
    """Whether gradients of earlier micro-batches are there while activations are."""
    offloaded: bool = False
    """Whether parameters, gradients and optimizer state are kept in the host's memory and do not count here."""

    @property
    def peak(self) -> float:
        """All that is there at once. As the backward proceeds activations go and gradients come, evenly, so without
        accumulation the larger of them counts."""
        in_flight = self.activations + self.logits
        if self.offloaded:
            return self.working + in_flight
        changing = in_flight + self.gradients if self.accumulates else max(in_flight, self.gradients)
        return self.parameters + self.optimizer + self.working + changing


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
