"""How the parallelisms are composed: THE order, written once.

`parallelize_model` changes a model in place, from outside. It knows nothing of Transformers: the caller says which
modules are the layers and which other modules deserve an FSDP unit of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallelize.activation_checkpoint import apply_activation_checkpointing
from parallelize.compile import apply_compile
from parallelize.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from parallelize.float8 import Float8Linears, apply_float8
from parallelize.fsdp import apply_fsdp
from parallelize.kernels.replace import ModuleKernel, apply_kernels
from parallelize.parallel_dims import data_parallel_mesh
from parallelize.tensor_parallel import Stack, TensorPlan, apply_tensor_parallel
from parallelize.tensor_parallel.overlap import overlap_in_compiled_code


def parallelize_model(
    model: nn.Module,
    *,
    layers: Sequence[str],
    stacks: Sequence[Stack] = (),
    separate_units: Sequence[str],
    mesh: DeviceMesh,
    float8: Float8Linears | None,
    kernels: Mapping[str, ModuleKernel],
    tensor_plan: TensorPlan | None,
    sequence_parallel: bool,
    has_dropout: bool,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    param_dtype: torch.dtype | None,
    cpu_offload: bool,
) -> None:
    """Apply, in this order: float8 -> kernels -> TP -> CP -> activation checkpointing -> compile -> FSDP2.

    layers: names of the decoder layers on this rank. stacks: which of them run one after another, () where a list of
    layers runs from its first to its last. separate_units: of further modules that are sharded on their own (an untied
    embedding). float8: the linears that multiply so, or None. kernels: what modules compute by, proven equal to them.
    tensor_plan: how weights are split over mesh["tp"], or None; sequence_parallel: whether the sequence is split over
    it, too. has_dropout: whether the model draws random numbers in training.
    param_dtype: dtype of the computation, None for the parameters' own. Gradients are summed over ranks in fp32. Where
    `needs_fsdp` says no, the caller computes within `parameters_cast_to(model, param_dtype)` instead.
    """
    # Another module in the place of a linear; whatever is done to modules is done to that.
    if float8 is not None:
        apply_float8(model, float8)

    # Kernels, tensor and context parallelism change what a layer computes with, so they come first.
    apply_kernels(model, kernels)
    if tensor_plan is not None:
        apply_tensor_parallel(
            model, tensor_plan, mesh["tp"],
            layers=layers, stacks=stacks, sequence_parallel=sequence_parallel, has_dropout=has_dropout,
        )  # fmt: skip
    layer_modules = [model.get_submodule(name) for name in layers]

    # Recomputation wraps the layer as it is now, and the compiler then sees (and may fuse into) the recomputation.
    apply_activation_checkpointing(
        layer_modules,
        mode=activation_checkpoint.mode,
        selective_option=str(activation_checkpoint.selective_ac_option),
        preserve_rng_state=activation_checkpoint.preserve_rng_state,
    )

    # Compiled code must not contain FSDP2's hooks: they gather and free parameters around it.
    if compile.enable and "model" in compile.components:
        if tensor_plan is not None and parallelism.enable_async_tensor_parallel:
            overlap_in_compiled_code(mesh["tp"].get_group())
        apply_compile(layer_modules, backend=compile.backend)

    # Last, because it replaces parameters by shards that only its own hooks gather again.
    if needs_fsdp(mesh, cpu_offload):
        apply_fsdp(
            model,
            [*layer_modules, *(model.get_submodule(name) for name in separate_units)],
            data_parallel_mesh(mesh),
            param_dtype=param_dtype,
            reduce_dtype=torch.float32,
            reshard_after_forward=reshards_after_forward(parallelism),
            cpu_offload=cpu_offload,
        )


def reshards_after_forward(parallelism: ParallelismConfig) -> bool:
    """Whether gathered parameters are freed after a forward; by default not in a pipeline, where each of many
    micro-batches would gather them again."""
    if parallelism.fsdp_reshard_after_forward == "default":
        return parallelism.pipeline_parallel_degree == 1
    return parallelism.fsdp_reshard_after_forward == "always"


def needs_fsdp(mesh: DeviceMesh, cpu_offload: bool) -> bool:
    """Whether there is something to shard or to offload; if not, `parallelize/mixed_precision.py` does the casting."""
    return data_parallel_mesh(mesh).size() > 1 or cpu_offload
