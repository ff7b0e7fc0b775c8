"""Activation checkpointing: what a layer's backward recomputes instead of keeping.

A layer is changed from outside: its instance gets a `forward` that runs the original one under
`torch.utils.checkpoint`, so that parameter names stay what they are.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import parallelize.context_parallel.operator  # noqa: F401, makes the operator known

_MATRIX_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})
# Expensive to compute, cheap to keep: attention (quadratic in the sequence) and communication.
_ALWAYS_KEPT = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.parallelize.shared_attention.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_gather_into_tensor.default,
        torch.ops._c10d_functional.all_reduce.default,
    }
)


def apply_activation_checkpointing(
    layers: Sequence[nn.Module], *, mode: str, selective_option: str, preserve_rng_state: bool
) -> None:
    """Checkpoint `layers` in place: "none", "full", or "selective" with "op" or every n-th layer ("2", ...).

    "memory_budget" is nothing here: the compiler does it (`parallelize/compile.py`).
    """
    if mode in ("none", "memory_budget"):
        return
    per_op = mode == "selective" and selective_option == "op"
    every = int(selective_option) if mode == "selective" and not per_op else 1
    context_fn = _per_op_contexts if per_op else None
    for layer in layers[::every]:
        layer.forward = _checkpointed(layer.forward, preserve_rng_state, context_fn)


def _checkpointed(forward: Callable, preserve_rng_state: bool, context_fn: Callable | None) -> Callable:
    options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if context_fn is not None:
        options["context_fn"] = context_fn

    @functools.wraps(forward)
    def checkpointed_forward(*args, **kwargs):
        return checkpoint(forward, *args, **options, **kwargs)

    return checkpointed_forward


def _per_op_contexts():
    return create_selective_checkpoint_contexts(_make_policy())


def _make_policy() -> Callable:
    """Keep attention, communication and every second matrix product; recompute the rest."""
    matrix_products = Counter()

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        if operator in _ALWAYS_KEPT:
            return CheckpointPolicy.MUST_SAVE
        if operator in _MATRIX_PRODUCTS:
            # The forward and the recomputation see the same sequence, each counted on its own.
            matrix_products[context.is_recompute] += 1
            if matrix_products[context.is_recompute] % 2 == 1:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
