"""What `parallelize/costs.py` needs to know about a model to estimate the memory of a rank before the first step.

With tensor parallelism the placements of the parameters say what is split. A linear's input that enters a region is
whole on every rank, and kept once for the linears that share it; what is computed inside the region is split; what a
region gives back and what lies between regions is whole, or with sequence parallelism split too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parallelize.costs import LayerWidths, MemoryEstimate, activation_bytes_per_token
from transformers_backend.decoder import Decoder, is_norm
from transformers_backend.flops import attention_costs
from transformers_backend.loss import count_chunks
from transformers_backend.weights import local_part


def estimate_memory(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    *,
    optimizers: Sequence[torch.optim.Optimizer],
    computes_in: torch.dtype,
    is_sharded: bool,
    reshards: bool,
    recompute: str,
    memory_budget: float = 1.0,
    batch_size: int,
    seq_len: int,
    loss_is_chunked: bool,
    accumulates: bool,
    offloaded: bool,
    device_type: str,
    sequence_parallel: bool = False,
    stages: Sequence[Sequence[str]] | None = None,
    most_at_once: Callable[[Sequence[float]], float] = sum,
) -> MemoryEstimate:
    """Estimate what training takes on this rank, whose shards are as they are in `hf_model`.

    is_sharded: whether FSDP2 gathers the parameters; reshards: and frees a layer again after its forward. recompute,
    memory_budget: as in `activation_bytes_per_token`. batch_size, seq_len: of one micro-batch. accumulates: whether
    there are several in a step. offloaded: parameters, gradients and optimizer state are kept in other memory.
    sequence_parallel: whether tensor-parallel ranks share the sequence between regions. stages: in a pipeline the names
    of the layers of each stage of this rank. most_at_once: from what a micro-batch keeps in each of them to the most
    that is kept at one time. Left out: the CUDA context, buffers of the communication library, and what the allocator
    cannot use.
    """
    in_pipeline, stages = stages is not None, [decoder.layers] if stages is None else stages
    layers = [layer for stage in stages for layer in stage]
    parameters = list(hf_model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    itemsize, tokens = computes_in.itemsize, batch_size * seq_len
    vocabulary_size, *_ = _split_shape(hf_model.get_submodule(decoder.head).weight)
    chunks = count_chunks(tokens, vocabulary_size, device_type) if loss_is_chunked else 1
    activations = [
        activation_bytes_per_token(
            layer_widths(hf_model, decoder, sequence_parallel, layers=stage),
            itemsize=itemsize, seq_len=seq_len, recompute=recompute, memory_budget=memory_budget,
        )
        for stage in stages
    ]  # fmt: skip
    head = sum(map(_numbers, hf_model.get_submodule(decoder.head).parameters()))
    # Logits, their log-softmax and its gradient in fp32; over several chunks the head's gradient is summed in fp32.
    logits = (tokens / chunks) * vocabulary_size * (itemsize + 8) + (head * (4 + itemsize) if chunks > 1 else 0)
    return MemoryEstimate(
        parameters=sum(map(local_bytes, parameters)),
        gradients=sum(map(local_bytes, trained)),
        optimizer=sum(map(_state_bytes, optimizers)),
        working=_working_bytes(
            hf_model,
            decoder,
            layers,
            itemsize=itemsize,
            is_sharded=is_sharded,
            reshards=reshards,
            sums_gradients=in_pipeline,
        ),
        activations=tokens
        * (most_at_once([stage.kept for stage in activations]) + max(stage.recomputed for stage in activations)),
        logits=logits if decoder.layers[-1] in layers else 0,
        accumulates=accumulates,
        offloaded=offloaded,
    )


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the part of a tensor that this rank keeps."""
    return local_part(tensor).nbytes


def layer_widths(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    sequence_parallel: bool = False,
    *,
    layers: Sequence[str] | None = None,
) -> list[LayerWidths]:
    """The widths of every decoder layer on one tensor-parallel rank, or of some by name, read from their weights."""
    hidden = hf_model.get_submodule(decoder.embedding).weight.shape[1]
    eager = hf_model.config._attn_implementation == "eager"
    heads = attention_costs(hf_model.config, 1)[0].heads if eager else 0
    return [
        _widths(hf_model.get_submodule(name), hidden, heads, sequence_parallel) for name in layers or decoder.layers
    ]


def _widths(layer: nn.Module, hidden: int, score_heads: int, sequence_parallel: bool) -> LayerWidths:
    degree = max(map(_tensor_parallel_degree, layer.parameters()), default=1)
    between = _ceil_divide(hidden, degree) if sequence_parallel else hidden  # of a token, as all ranks share them
    matrices = [sizes for module in layer.modules() for sizes in _matrices(module, sequence_parallel)]
    norms = [
        _norm_width(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module, hidden, between)
        for name, module in layer.named_modules()
        if is_norm(module)
    ]
    return LayerWidths(
        hidden=between,
        matrices=tuple(matrices),
        norms=tuple(norms),
        score_heads=_ceil_divide(score_heads, degree),
    )


def _matrices(parent: nn.Module, sequence_parallel: bool) -> list[tuple[int, int]]:
    """The two widths, outputs first, that each weight matrix of a module and of its linears stands for on this rank.

    Of linears side by side that are split along their outputs the first keeps the whole input, which they share. The
    others count it too, in place of what attention and activation functions keep; that is split.
    """
    found, input_is_kept = [], False
    for name, parameter in parent.named_parameters(recurse=False):
        if parameter.ndim == 2 and name != "weight":
            found.append(_split_shape(parameter))
    for child in parent.children():
        weight = child._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        degree, dimension = _tensor_parallel_degree(weight), _split_dimension(weight)
        output_dimension = 1 if isinstance(child, Conv1D) else 0
        outputs, inputs = _split_shape(weight)[output_dimension], _split_shape(weight)[1 - output_dimension]
        if dimension == output_dimension:
            inputs = _ceil_divide(inputs, degree) if input_is_kept else inputs
            input_is_kept = True
        elif dimension is not None and sequence_parallel:
            outputs = _ceil_divide(outputs, degree)
        found.append((outputs, inputs))
    return found


def _norm_width(parent: nn.Module, name: str, norm: nn.Module, hidden: int, between: int) -> int:
    """A norm of queries or keys has the weight of one head: what it normalises is the projection beside it."""
    stem = f"{name.split('_')[0]}_"
    beside = [(child.weight.shape[0], _split_shape(child.weight)[0]) for key, child in parent.named_children()
              if key.startswith(stem) and key != name and isinstance(child, nn.Linear)]  # fmt: skip
    own, own_here = max(((p.numel(), _numbers(p)) for p in norm.parameters(recurse=False)), default=(hidden, between))
    if beside and (own < hidden or own_here < own):
        return max(beside)[1]
    return between if own == hidden and own_here == own else own_here


def _split_dimension(tensor: torch.Tensor) -> int | None:
    """The dimension along which tensor-parallel ranks share a parameter; None where each has all of it."""
    if not isinstance(tensor, DTensor) or "tp" not in (names := tensor.device_mesh.mesh_dim_names or ()):
        return None
    placement = tensor.placements[names.index("tp")]
    return None if placement.is_replicate() else placement.dim


def _tensor_parallel_degree(tensor: torch.Tensor) -> int:
    """How many tensor-parallel ranks share a parameter; 1 where each has all of it."""
    if _split_dimension(tensor) is None:
        return 1
    return tensor.device_mesh.size(tensor.device_mesh.mesh_dim_names.index("tp"))


def _split_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the largest part that a tensor-parallel rank has of a parameter, as FSDP2 gathers it."""
    dimension, degree = _split_dimension(tensor), _tensor_parallel_degree(tensor)
    return tuple(_ceil_divide(size, degree) if n == dimension else size for n, size in enumerate(tensor.shape))


def _numbers(tensor: torch.Tensor) -> int:
    return math.prod(_split_shape(tensor))


def _ceil_divide(size: int, parts: int) -> int:
    return -(-size // parts)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """AdamW keeps two numbers a parameter, Muon one, in the parameter's dtype."""
    copies = 1 if isinstance(optimizer, torch.optim.Muon) else 2
    return copies * sum(local_bytes(p) for group in optimizer.param_groups for p in group["params"])


def _working_bytes(
    hf_model: PreTrainedModel, decoder: Decoder, names: Sequence[str], *, itemsize: int, is_sharded: bool,
    reshards: bool, sums_gradients: bool,
) -> int:  # fmt: skip
    """names: of the layers here. sums_gradients: whether whole gradients add up until the end of a batch, in fp32."""
    total = sum(map(_numbers, hf_model.parameters()))
    own_itemsize = next(hf_model.parameters()).dtype.itemsize
    if not is_sharded:
        return total * itemsize if itemsize != own_itemsize else 0
    layers = [sum(map(_numbers, hf_model.get_submodule(name).parameters())) for name in names]
    root, largest = total - sum(layers), max(layers)
    if not decoder.embedding_is_tied:  # it is a unit of its own, gathered only while it is needed
        root -= sum(map(_numbers, hf_model.get_submodule(decoder.embedding).parameters()))
    # Gathered: the root unit throughout, a layer and the one that comes next; and a layer's gradients, once as they
    # come from the backward, once in fp32 for the sum over ranks.
    gathered = root + (2 * largest if reshards else sum(layers))
    return gathered * itemsize + largest * (itemsize + 4) + (4 * total if sums_gradients else 0)
