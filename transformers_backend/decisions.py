"""The single decisions of `plan.py`: checks of what a user wants, and choices proven on twins.

Each function either raises a ValueError for what cannot be exact, or returns what is, and logs what was given up for
it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from parallelize.attention_backend import AttentionChoice, choose_attention
from parallelize.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig, backward_in_halves
from parallelize.distributed import gather_objects
from parallelize.tensor_parallel import TensorPlan
from transformers_backend.context import SharedContext
from transformers_backend.context_proof import ContextProof
from transformers_backend.decoder import Decoder, drops_layers, has_dropout
from transformers_backend.flops import attention_costs
from transformers_backend.proof import why_not_compile
from transformers_backend.tensor_plan import Recipe, make_plan
from transformers_backend.tensor_plan.attention_heads import head_counts
from transformers_backend.tensor_proof import prove_tensor_plan

logger = logging.getLogger(__name__)


def warn_of_repeated_recomputation(
    parallelism: ParallelismConfig, activation_checkpoint: ActivationCheckpointConfig
) -> None:
    """Say so where layers are recomputed many times: torch runs the backward of weights once for each group of them."""
    setting = backward_in_halves(parallelism)
    if setting is not None and activation_checkpoint.mode != "none":
        logger.warning(
            'parallelism.%s: with activation_checkpoint.mode = "%s" a layer is recomputed for nearly each of its '
            "weights (a layer of Llama runs forward 11 times a micro-batch instead of twice), which is exact and slow. "
            'Set that to "none", or choose a schedule whose backward is whole, such as 1F1B.',
            setting,
            activation_checkpoint.mode,
        )


def check_same_weights(hf_model: PreTrainedModel) -> None:
    """Every rank brought a model of its own; sharding would make one of parts of several if they differed.

    One on the meta device has no weights yet.
    """
    if any(parameter.is_meta for parameter in hf_model.parameters()):
        return
    sums = [parameter.detach().double().sum().item() for parameter in hf_model.parameters()]
    if any(other != sums for other in gather_objects(sums)):
        raise ValueError(
            "The ranks hold models with different weights, and sharding would mix them. Load the same checkpoint "
            "on every rank, or call torch.manual_seed with the same seed before the model is built."
        )


def check_mixed_precision(hf_model: PreTrainedModel, param_dtype: torch.dtype | None) -> None:
    """Modules that a model keeps in fp32 are not told apart when parameters are cast."""
    kept = {*(hf_model._keep_in_fp32_modules or ()), *(hf_model._keep_in_fp32_modules_strict or ())}
    if param_dtype is not None and kept:
        raise ValueError(
            f"{type(hf_model).__name__} keeps {', '.join(sorted(kept))} in float32, which mixed precision here "
            'cannot: set training.mixed_precision_param = "float32".'
        )


def check_every_layer_runs(hf_model: PreTrainedModel, ranks: int) -> None:
    """Ranks exchange something in every layer, so that one that skips a layer would wait for the others forever."""
    if ranks > 1 and drops_layers(hf_model):
        raise ValueError(
            f"{type(hf_model).__name__}: config.layerdrop = {hf_model.config.layerdrop} skips layers at random, on "
            f"each of {ranks} ranks others, and they would wait for each other forever. Set layerdrop to 0."
        )


def proven_attention(attn_implementation: str | None) -> str | None:
    """Attention that the twin runs with on the CPU: kernels that need a GPU have Transformers' default instead."""
    return attn_implementation if attn_implementation in ("sdpa", "eager") else None


def choose_attention_order(
    hf_model: PreTrainedModel, decoder: Decoder, device: torch.device, dtype: torch.dtype, *, seq_len: int, degree: int
) -> AttentionChoice:
    """In which order torch tries its attention kernels, measured on this model's attention; for sdpa on a GPU only.

    degree: of tensor parallelism. Layers may differ in their heads: the most frequent decide.
    """
    costs = Counter(attention_costs(hf_model.config, len(decoder.layers)))
    if device.type != "cuda" or hf_model.config._attn_implementation != "sdpa" or not costs:
        return AttentionChoice()
    cost, _ = costs.most_common(1)[0]
    heads, key_heads = head_counts(hf_model.config, None)
    if cost.value_dim != cost.query_key_dim or heads % key_heads:  # nothing that the kernels are alike in
        return AttentionChoice()
    if heads % degree == key_heads % degree == 0:
        heads, key_heads = heads // degree, key_heads // degree
    return choose_attention(heads, key_heads, seq_len, cost.query_key_dim, device, dtype)


@dataclass(frozen=True)
class TensorParallelism:
    """How a model is split over its tensor-parallel ranks."""

    plan: TensorPlan
    recipe: Recipe
    """What the plan was made from: styles by pattern, whatever the sizes and the degree (`tensor_plan/`)."""
    sequence_parallel: bool
    """Whether the ranks share the sequence between regions."""
    sequence_parallel_because: str | None
    """Why they do not, where that was to be found out."""


def choose_tensor_parallelism(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    attn_implementation: str | None,
    mesh: DeviceMesh,
    parallelism: ParallelismConfig,
) -> TensorParallelism | None:
    """The plan for the ranks of `mesh`, the tensor-parallel one, tried on a twin over them; None for a single rank."""
    if mesh.size() == 1:
        return None
    proven = prove_tensor_plan(
        hf_model.config, type(hf_model), attn_implementation, mesh,
        sequence_parallel=parallelism.sequence_parallel, user_recipe=parallelism.tensor_parallel_plan,
    )  # fmt: skip
    plan = make_plan(hf_model, decoder, proven.recipe, mesh.size())
    reason = proven.no_sequence_parallel_because
    if proven.sequence_parallel:
        reason = why_not_random_shards(hf_model, plan)
    shares_sequence = proven.sequence_parallel and reason is None
    if parallelism.sequence_parallel == "always" and not shares_sequence:
        raise ValueError(f'parallelism.sequence_parallel = "always": {reason}. Set it to "auto".')
    _check_joined_dropout(hf_model, plan)
    if parallelism.enable_async_tensor_parallel and not shares_sequence:
        logger.warning(
            "parallelism.enable_async_tensor_parallel does nothing: only exchanges of sequence parallelism overlap."
        )
    return TensorParallelism(plan, proven.recipe, shares_sequence, reason)


def _check_joined_dropout(hf_model: PreTrainedModel, plan: TensorPlan) -> None:
    """Between features that are joined and cut again ranks compute alike, but draw random numbers of their own."""
    joined = [name for name, split in plan.splits.items() if split.is_joined]
    if joined and has_dropout(hf_model):
        raise ValueError(
            f"{type(hf_model).__name__}: every tensor-parallel rank computes with all features of {joined[0]}, and "
            "with dropout they would not drop the same. Set the dropout of the model's config to 0."
        )


def why_not_random_shards(hf_model: PreTrainedModel, plan: TensorPlan) -> str | None:
    """Why dropout, of which the twin has none, does not allow the ranks to share the sequence.

    Ranks that share it draw numbers of their own in all layers; nothing that they compute alike may depend on those.
    """
    whole = [name for name, region in plan.regions.items() if region.is_whole]
    if whole and has_dropout(hf_model):
        return f"every rank computes all of {whole[0]}, with dropout, which must then be the same on all of them"
    return None


def refuse_inner_outputs(hf_model: PreTrainedModel, *, sequence_parallel: bool) -> None:
    """Let calls fail that ask for what layers compute inside: a rank has its heads, or its part of the sequence, only.

    Transformers records attentions and hidden states of layers as they are, so that it would return parts of them.
    """

    def check_call(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if "targets" in kwargs:  # our own loss, which returns nothing else
            return
        config = hf_model.config
        defaults = {"output_attentions": config.output_attentions}
        if sequence_parallel:
            defaults["output_hidden_states"] = config.output_hidden_states
        for name, default in defaults.items():
            wanted = kwargs.get(name)
            if default if wanted is None else wanted:
                raise ValueError(
                    f"{name} = True: tensor-parallel ranks have only parts of what layers compute inside. Set it to "
                    "false here or in the model's config, or ask a model that is not split."
                )

    hf_model.register_forward_pre_hook(check_call, with_kwargs=True)


def without_wrong_compilation(
    compile: CompileConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    hf_model: PreTrainedModel,
    attn_implementation: str | None,
    device: torch.device,
    tensor_parallelism: TensorParallelism | None,
    context: SharedContext | None,
) -> CompileConfig:
    """`compile`, less "model" where the compiled layers of the twin do not compute what they should.

    The loss stays compiled. A ValueError where a memory budget would be lost with them.
    """
    if not (compile.enable and "model" in compile.components):
        return compile
    reason = _why_not_compile_forks(hf_model, tensor_parallelism) or why_not_compile(
        hf_model.config, type(hf_model), attn_implementation, compile.backend, device, activation_checkpoint
    )
    if reason is None and context is not None:
        proof = ContextProof.again(hf_model.config, type(hf_model), context)
        reason = proof.why_not_compile(compile.backend, activation_checkpoint)
    if reason is None:
        return compile
    if activation_checkpoint.mode == "memory_budget":
        raise ValueError(
            'activation_checkpoint.mode = "memory_budget": the compiler keeps the budget, and layers of '
            f'{type(hf_model).__name__} cannot be compiled: {reason}. Choose mode "selective" or "full".'
        )
    logger.warning("Layers are not compiled: %s", reason)
    return dataclasses.replace(compile, components=[name for name in compile.components if name != "model"])


def _why_not_compile_forks(hf_model: PreTrainedModel, tensor_parallelism: TensorParallelism | None) -> str | None:
    """Why dropout keeps layers from being compiled (see `parallelize/tensor_parallel/randomness.py`)."""
    if tensor_parallelism is None or tensor_parallelism.sequence_parallel or not has_dropout(hf_model):
        return None
    return (
        "tensor-parallel ranks that do not share the sequence change their random state within a layer, for "
        "dropout, which compiled code cannot. Set dropout to 0, or train without compiling."
    )
