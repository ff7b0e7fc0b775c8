"""Everything that `HFTransformerModel.parallelize` decides before it acts: checked, and proven on twins, in this order.

The single decisions stand in `decisions.py`, `pipeline_plan.py`, `context_proof.py`, `tensor_proof.py`, `proof.py`,
`float8_plan.py` and `kernel_plan.py`; which parallelism is applied when, in `parallelize/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from parallelize.attention_backend import AttentionChoice
from parallelize.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    Float8Config,
    KernelConfig,
    ParallelismConfig,
    async_tensor_parallel_problems,
    check,
    float8_problems,
    memory_budget_problems,
    zero_bubble_problems,
)
from parallelize.distributed import pick_device
from parallelize.parallel_dims import ParallelDims
from transformers_backend.context import SharedContext
from transformers_backend.context_proof import choose_context
from transformers_backend.decisions import (
    TensorParallelism,
    check_every_layer_runs,
    check_mixed_precision,
    check_same_weights,
    choose_attention_order,
    choose_tensor_parallelism,
    proven_attention,
    warn_of_repeated_recomputation,
    without_wrong_compilation,
)
from transformers_backend.decoder import Decoder
from transformers_backend.float8_plan import Float8Plan, choose_float8
from transformers_backend.kernel_plan import KernelPlan, choose_kernels
from transformers_backend.pipeline_plan import PipelinePlan, plan_pipeline
from transformers_backend.proof import check_recomputation, prove


@dataclass(frozen=True)
class ParallelPlan:
    """How a model is to be placed on the ranks of this process group."""

    device: torch.device
    """Where this rank computes."""
    dims: ParallelDims
    mesh: DeviceMesh
    compute_dtype: torch.dtype
    parallelism: ParallelismConfig
    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig
    """As asked for, less what would compute something else."""
    pipeline: PipelinePlan | None
    context: SharedContext | None
    """How ranks share sequences. The model has it already: what is decided after it sees the model so."""
    tensor: TensorParallelism | None
    float8: Float8Plan
    kernels: KernelPlan
    attention: AttentionChoice
    """Which of torch's kernels attends; nothing is chosen with a context, which has its own."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether tensor-parallel ranks share the sequence."""
        return self.tensor is not None and self.tensor.sequence_parallel


def plan_parallelism(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    attn_implementation: str | None,
    *,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    float8: Float8Config,
    kernels: KernelConfig,
    param_dtype: torch.dtype | None,
    seq_len: int,
    mesh: DeviceMesh | None,
) -> ParallelPlan:
    """The plan for a whole model (meta or real); every rank calls it. Raises a ValueError for what cannot be exact.

    The arguments are those of `HFTransformerModel.parallelize`. With context parallelism the model attends over the
    ranks from then on; nothing else is changed.
    """
    _check_before_ranks_meet(hf_model, parallelism, activation_checkpoint, compile, float8, kernels, param_dtype)
    device = pick_device()
    check(async_tensor_parallel_problems(parallelism, compile, device.type))
    dims = ParallelDims.resolve(parallelism, dist.get_world_size())
    mesh = dims.build_mesh(device.type) if mesh is None else dims.check_mesh(mesh)
    check_same_weights(hf_model)
    attention = proven_attention(attn_implementation)
    pipeline = plan_pipeline(hf_model, decoder, attention, parallelism, seq_len)
    compute_dtype = param_dtype or hf_model.dtype
    if dims.cp > 1:  # what is no causal model is refused as that, not for the way its sequences are shared
        prove(hf_model.config, type(hf_model), attention)
    context = choose_context(hf_model, mesh["cp"], parallelism, compute_dtype)
    tensor = choose_tensor_parallelism(hf_model, decoder, attention, mesh["tp"], parallelism)
    if context is not None:
        context.check_others(pipeline=pipeline is not None, tensor=tensor is not None)
    check_recomputation(hf_model.config, type(hf_model), attention, activation_checkpoint)
    compile = without_wrong_compilation(compile, activation_checkpoint, hf_model, attention, device, tensor, context)
    is_compiled = compile.enable and "model" in compile.components
    attention_choice = AttentionChoice()
    if context is None:
        attention_choice = choose_attention_order(
            hf_model, decoder, device, compute_dtype, seq_len=seq_len, degree=dims.tp
        )
    return ParallelPlan(
        device=device, dims=dims, mesh=mesh, compute_dtype=compute_dtype,
        parallelism=parallelism, activation_checkpoint=activation_checkpoint, compile=compile,
        pipeline=pipeline, context=context, tensor=tensor,
        float8=choose_float8(
            hf_model, float8, device, compute_dtype, attn_implementation=attention,
            tensor_plan=None if tensor is None else tensor.plan,
            compile=compile, activation_checkpoint=activation_checkpoint,
        ),
        kernels=choose_kernels(hf_model, kernels, device, compute_dtype, is_compiled=is_compiled),
        attention=attention_choice,
    )  # fmt: skip


def _check_before_ranks_meet(
    hf_model: PreTrainedModel,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    float8: Float8Config,
    kernels: KernelConfig,
    param_dtype: torch.dtype | None,
) -> None:
    """What needs neither devices nor other ranks, so that each of them finds the same."""
    sections = (parallelism, activation_checkpoint, compile, float8, kernels)
    check(problem for section in sections for problem in section.problems())
    check(zero_bubble_problems(parallelism, compile, activation_checkpoint))
    check(memory_budget_problems(compile, activation_checkpoint))
    check(float8_problems(float8, parallelism))
    warn_of_repeated_recomputation(parallelism, activation_checkpoint)
    check_mixed_precision(hf_model, param_dtype)
    if not dist.is_initialized():
        raise ValueError("parallelize needs an initialised process group: torch.distributed.init_process_group().")
    check_every_layer_runs(hf_model, dist.get_world_size())
