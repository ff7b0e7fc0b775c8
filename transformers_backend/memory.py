"""What `parallelize/costs.py` needs to know about a model to estimate the memory of a rank before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from parallelize.costs import LayerWidths, MemoryEstimate, activation_bytes_per_token
from transformers_backend.decoder import Decoder, is_norm
from transformers_backend.flops import attention_costs
from transformers_backend.loss import count_chunks


def estimate_memory(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    *,
    optimizers: Sequence[torch.optim.Optimizer],
    computes_in: torch.dtype,
    is_sharded: bool,
    reshards: bool,
    recompute: str,
    batch_size: int,
    seq_len: int,
    loss_is_chunked: bool,
    accumulates: bool,
    offloaded: bool,
    device_type: str,
) -> MemoryEstimate:
    """Estimate what training takes on this rank, whose shards are as they are in `hf_model`.

    is_sharded: whether FSDP2 gathers the parameters; reshards: and frees a layer again after its forward. recompute:
    as in `activation_bytes_per_token`. batch_size, seq_len: of one micro-batch. accumulates: whether there are several
    in a step. offloaded: parameters, gradients and optimizer state are kept in other memory. Left out: the CUDA
    context, buffers of the communication library, and what the allocator cannot use.
    """
    parameters = list(hf_model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    itemsize, tokens = computes_in.itemsize, batch_size * seq_len
    vocabulary_size, *_ = hf_model.get_submodule(decoder.head).weight.shape
    chunks = count_chunks(tokens, vocabulary_size, device_type) if loss_is_chunked else 1
    head = sum(parameter.numel() for parameter in hf_model.get_submodule(decoder.head).parameters())
    return MemoryEstimate(
        parameters=sum(map(local_bytes, parameters)),
        gradients=sum(map(local_bytes, trained)),
        optimizer=sum(map(_state_bytes, optimizers)),
        working=_working_bytes(hf_model, decoder, itemsize=itemsize, is_sharded=is_sharded, reshards=reshards),
        activations=tokens
        * activation_bytes_per_token(
            layer_widths(hf_model, decoder), itemsize=itemsize, seq_len=seq_len, recompute=recompute
        ),
        # Logits, their log-softmax and its gradient in fp32; over several chunks the head's gradient is summed in fp32.
        logits=(tokens / chunks) * vocabulary_size * (itemsize + 8) + (head * (4 + itemsize) if chunks > 1 else 0),
        accumulates=accumulates,
        offloaded=offloaded,
    )


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the part of a tensor that this rank keeps."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def layer_widths(hf_model: PreTrainedModel, decoder: Decoder) -> list[LayerWidths]:
    """The widths of every decoder layer, read from the (full) shapes of its weights."""
    hidden = hf_model.get_submodule(decoder.embedding).weight.shape[1]
    eager = hf_model.config._attn_implementation == "eager"
    heads = attention_costs(hf_model.config, 1)[0].heads if eager else 0
    return [_widths(hf_model.get_submodule(name), hidden, heads) for name in decoder.layers]


def _widths(layer: nn.Module, hidden: int, score_heads: int) -> LayerWidths:
    matrices = [tuple(p.shape) for p in layer.parameters() if p.ndim == 2]
    norms = [
        _norm_width(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module, hidden)
        for name, module in layer.named_modules()
        if is_norm(module)
    ]
    return LayerWidths(hidden=hidden, matrices=tuple(matrices), norms=tuple(norms), score_heads=score_heads)


def _norm_width(parent: nn.Module, name: str, norm: nn.Module, hidden: int) -> int:
    """A norm of queries or keys has the weight of one head: what it normalises is the projection beside it."""
    stem = f"{name.split('_')[0]}_"
    beside = [child.weight.shape[0] for key, child in parent.named_children() if key.startswith(stem) and key != name
              and isinstance(child, nn.Linear)]  # fmt: skip
    own = max((p.numel() for p in norm.parameters(recurse=False)), default=hidden)
    return max(beside) if own < hidden and beside else own


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """AdamW keeps two numbers a parameter, Muon one, in the parameter's dtype."""
    copies = 1 if isinstance(optimizer, torch.optim.Muon) else 2
    return copies * sum(local_bytes(p) for group in optimizer.param_groups for p in group["params"])


def _working_bytes(
    hf_model: PreTrainedModel, decoder: Decoder, *, itemsize: int, is_sharded: bool, reshards: bool
) -> int:
    total = sum(parameter.numel() for parameter in hf_model.parameters())
    own_itemsize = next(hf_model.parameters()).dtype.itemsize
    if not is_sharded:
        return total * itemsize if itemsize != own_itemsize else 0
    layers = [sum(p.numel() for p in hf_model.get_submodule(name).parameters()) for name in decoder.layers]
    root, largest = total - sum(layers), max(layers)
    if not decoder.embedding_is_tied:  # it is a unit of its own, gathered only while it is needed
        root -= hf_model.get_submodule(decoder.embedding).weight.numel()
    # Gathered: the root unit throughout, a layer and the one that comes next; and a layer's gradients, once as they
    # come from the backward, once in fp32 for the sum over ranks.
    gathered = root + (2 * largest if reshards else sum(layers))
    return gathered * itemsize + largest * (itemsize + 4)
