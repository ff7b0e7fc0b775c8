"""The one loss: summed cross-entropy over target tokens, chunked so that (batch x seq x vocabulary) logits never exist.

`install_loss` gives the causal LM's instance a second way to be called: `hf_model(..., targets=...)` returns
the summed loss, while a call without `targets` is Transformers' own forward, untouched. The body (everything up to
the last hidden states) runs once; the head then runs chunk by chunk over the tokens. The head is not re-implemented:
it is the causal LM's own forward with the body replaced by a module that hands over a chunk of hidden states, so
softcaps, logit scales, biases and dense layers before the head are whatever the model's own code does. Whether that
holds for an architecture is tried on its twin (`proof.py`); where it does not, the full logits are used.

Labels follow Transformers: aligned with the tokens, -100 ignored, shifted by `shift_labels` once, outside the model.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from transformers_backend.decoder import Decoder

IGNORE_INDEX = -100
# Logit elements of one chunk. Large enough for efficient matrix products, small enough to matter: in fp32 64 MiB on a
# CPU (near its caches) and 512 MiB on a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}

SumLoss = Callable[..., torch.Tensor]


def install_loss(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    *,
    chunked: bool,
    compile_backend: str | None = None,
    chunk_elements: int | None = None,
) -> None:
    """Let `hf_model(input_ids=..., targets=...)` return the summed loss as an fp32 scalar.

    Call it once per model, before FSDP2 wraps it. chunked=False takes the model's own full logits, for heads that
    cannot be run in chunks. compile_backend: compile the chunk's head and cross-entropy, None runs them eagerly.
    chunk_elements: logit elements that one chunk may have; None is the device's default.
    """
    if chunked:
        _install_forward(hf_model, _chunked_loss(hf_model, decoder, compile_backend, chunk_elements))
    else:
        _install_forward(hf_model, _full_loss(hf_model.forward))


def _full_loss(plain_forward: Callable) -> SumLoss:
    def forward_loss(targets: torch.Tensor, **inputs) -> torch.Tensor:
        return sum_cross_entropy(plain_forward(**inputs, use_cache=False).logits, targets)

    return forward_loss


def _chunked_loss(
    hf_model: PreTrainedModel, decoder: Decoder, compile_backend: str | None, chunk_elements: int | None
) -> SumLoss:
    body, head = hf_model.get_submodule(decoder.base), build_head(hf_model, decoder)
    vocabulary_size = hf_model.get_submodule(decoder.head).weight.shape[0]

    def chunk_loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden), (tokens,) -> scalar"""
        logits = head.forward(inputs_embeds=hidden_states[None], use_cache=False).logits
        return sum_cross_entropy(logits, targets)

    if compile_backend is not None:
        chunk_loss = torch.compile(chunk_loss, backend=compile_backend)

    def forward_loss(targets: torch.Tensor, **inputs) -> torch.Tensor:
        hidden_states = body(**inputs, use_cache=False)[0]  # (batch, seq, hidden)
        chunks = count_chunks(targets.numel(), vocabulary_size, targets.device.type, chunk_elements)
        # Looked up at every call: FSDP2 swaps sharded and gathered parameters in and out of the modules.
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return _chunked_sum_loss(hidden_states, targets, chunk_loss, parameters, chunks)

    return forward_loss


def count_chunks(tokens: int, vocabulary_size: int, device_type: str, chunk_elements: int | None = None) -> int:
    """In how many runs of the head the loss of `tokens` tokens is computed."""
    budget = chunk_elements or _CHUNK_ELEMENTS.get(device_type, _CHUNK_ELEMENTS["cpu"])
    return max(1, min(tokens, math.ceil(tokens * vocabulary_size / budget)))


def _install_forward(hf_model: PreTrainedModel, forward_loss: SumLoss) -> None:
    plain_forward = hf_model.forward

    @functools.wraps(plain_forward)  # generate() and others read the signature
    def forward(*args, targets: torch.Tensor | None = None, **kwargs):
        return plain_forward(*args, **kwargs) if targets is None else forward_loss(targets, **kwargs)

    hf_model.forward = forward


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Targets of next-token prediction: labels (batch, seq) moved left by one, the last position ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Number of target tokens of labels (batch, seq) in Transformers' convention, as an int64 scalar tensor."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def sum_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed fp32 cross-entropy of logits (..., vocabulary) and targets (...), as Transformers computes it."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class _BodyOutput:
    """What a body returned: hidden states, and None for everything else that a head may ask for (caches, states)."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.last_hidden_state = hidden_states

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _HandOver(nn.Module):
    """Stands where the body was and returns the hidden states it is given."""

    def forward(self, *args, inputs_embeds: torch.Tensor | None = None, **kwargs) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)


def build_head(hf_model: PreTrainedModel, decoder: Decoder) -> nn.Module:
    """Return the head of a causal LM: `head.forward(inputs_embeds=hidden_states)` -> an output with `.logits`.

    The head is a shallow copy of the causal LM that shares every module with it, except that the body is a
    `_HandOver`.
    """
    *parents, body = decoder.base.split(".")
    head_model = owner = _shallow_copy(hf_model)
    for name in parents:
        owner._modules[name] = _shallow_copy(owner._modules[name])
        owner = owner._modules[name]
    owner._modules[body] = _HandOver()
    return head_model


def _shallow_copy(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


class _ChunkedSumLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward, so that one chunk's logits are alive at a time.

    The loss is the root of the graph, so its gradients are known up to the scalar that arrives in the backward.
    Unlike checkpointing the chunks, that recomputes nothing. (The idea is that of Liger, arXiv 2410.10989, and of
    cut-cross-entropy, arXiv 2411.09009.)
    """

    @staticmethod
    def forward(ctx, chunk_loss: SumLoss, chunks: int, hidden_states, targets, *parameters):
        hidden_grad = torch.empty_like(hidden_states)  # (tokens, hidden)
        # Sums over chunks are kept in fp32: adding many bf16 gradients one by one would lose their low bits.
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        total = hidden_states.new_zeros((), dtype=torch.float32)
        for hidden, grad, target in zip(
            hidden_states.tensor_split(chunks),
            hidden_grad.tensor_split(chunks),
            targets.tensor_split(chunks),
            strict=True,
        ):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                loss = chunk_loss(hidden, target)
            gradients = torch.autograd.grad(loss, [hidden, *parameters])
            grad.copy_(gradients[0])
            for accumulated, gradient in zip(sums, gradients[1:], strict=True):
                accumulated += gradient
            total += loss.detach()
        ctx.save_for_backward(hidden_grad, *[s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)])
        return total

    @staticmethod
    def backward(ctx, grad_output):
        # In place: these gradients exist for this backward only, and a second one would raise.
        scaled = [gradient.mul_(grad_output) for gradient in ctx.saved_tensors]
        return None, None, scaled[0], None, *scaled[1:]


def _chunked_sum_loss(
    hidden_states: torch.Tensor, targets: torch.Tensor, chunk_loss: SumLoss, parameters: list, chunks: int
) -> torch.Tensor:
    """Summed loss of hidden states (batch, seq, hidden) and targets (batch, seq), in `chunks` runs of the head."""
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
    if chunks > 1 and torch.is_grad_enabled():
        return _ChunkedSumLoss.apply(chunk_loss, chunks, hidden_states, targets, *parameters)
    pieces = zip(hidden_states.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return torch.stack([chunk_loss(hidden, target) for hidden, target in pieces]).sum()
