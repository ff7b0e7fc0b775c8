"""The one loss: summed cross-entropy over target tokens, chunked so that (batch x seq x vocabulary) logits never exist.

`install_loss` gives the causal LM's instance a second way to be called: `hf_model(..., targets=...)` returns
the summed loss, while a call without `targets` is Transformers' own forward, untouched. The body (everything up to
the last hidden states) runs once; the head then runs chunk by chunk over the tokens. The head is not re-implemented:
it is the causal LM's own forward with the body replaced by a module that hands over a chunk of hidden states, so
softcaps, logit scales, biases and dense layers before the head are whatever the model's own code does. Whether that
holds for an architecture is tried on its twin (`proof.py`); where it does not, the full logits are used.

With tensor parallelism each rank's head yields the logits of its part of the vocabulary, and the loss is computed from
those (`parallelize/tensor_parallel/vocabulary.py`); who calls the model without `targets` gets all logits.

Where the kernel of that name is enabled, and the head is proven to be a `LinearHead` (`head_kernel.py`), the loss is
computed without logits instead (`parallelize/kernels/linear_cross_entropy.py`).

Labels follow Transformers: aligned with the tokens, -100 ignored, shifted by `shift_labels` once, outside the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from parallelize.kernels.linear_cross_entropy import linear_cross_entropy
from parallelize.kernels.replace import replace_forward
from parallelize.mixed_precision import kept_parameter
from parallelize.tensor_parallel import vocabulary as vocabulary_parallel
from parallelize.tensor_parallel.collectives import enter
from parallelize.tensor_parallel.vocabulary import VocabularyShard, gather_logits
from transformers_backend.decoder import Decoder

IGNORE_INDEX = -100
# Logit elements of one chunk. Large enough for efficient matrix products, small enough to matter: in fp32 64 MiB on a
# CPU (near its caches) and 512 MiB on a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}

SumLoss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class LinearHead:
    """A head that is one matrix product: cap(scale * (hidden @ weight^T + bias)).

    cap(z) = softcap * tanh(z / softcap), or z where that is None.
    """

    scale: float
    softcap: float | None
    kernel: str = "linear_cross_entropy"

    def forward(
        self,
        head: nn.Linear,
        hidden_states: torch.Tensor,
        targets: torch.Tensor | None = None,
        vocabulary: VocabularyShard | None = None,
    ) -> torch.Tensor:
        """Logits, or without them the summed loss of targets (batch, seq); vocabulary: the part in the weight."""
        if targets is None:
            return type(head).forward(head, hidden_states)
        first, group = (0, None) if vocabulary is None else (vocabulary.first, vocabulary.group)
        return linear_cross_entropy(
            hidden_states.to(head.weight.dtype), head.weight, targets, head.bias, ignore_index=IGNORE_INDEX,
            scale=self.scale, softcap=self.softcap, first=first, group=group,
        )  # fmt: skip


def install_loss(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    *,
    chunked: bool,
    compile_backend: str | None = None,
    chunk_elements: int | None = None,
    vocabulary: VocabularyShard | None = None,
    linear_head: LinearHead | None = None,
) -> None:
    """Let `hf_model(input_ids=..., targets=...)` return the summed loss as an fp32 scalar.

    Call it once per model, before FSDP2 wraps it. chunked=False takes the model's own full logits, for heads that
    cannot be run in chunks. compile_backend: compile the chunk's head and cross-entropy, None runs them eagerly.
    chunk_elements: logit elements that one chunk may have; None is the device's default. vocabulary: the part of the
    vocabulary that the head module computes on this rank of its group, from the same hidden states on every rank; None
    is a head that computes all of it. The loss is then the same on every rank of the group. linear_head: what the head
    is proven to be, to compute the loss without logits; the three arguments on chunks have no effect then.
    """
    sum_loss, local_logits = sum_cross_entropy, contextlib.nullcontext
    if vocabulary is not None:
        sum_loss = functools.partial(
            vocabulary_parallel.sum_cross_entropy,
            first=vocabulary.first,
            group=vocabulary.group,
            ignore_index=IGNORE_INDEX,
        )
        local_logits = _SplitHead(hf_model.get_submodule(decoder.head), vocabulary).local_logits
    if linear_head is not None:
        _install_forward(hf_model, _linear_loss(hf_model, decoder, linear_head, vocabulary), local_logits)
    elif chunked:
        # Each chunk communicates, so the ranks must agree on how many there are: the largest part decides.
        columns = hf_model.get_submodule(decoder.head).weight.shape[0] if vocabulary is None else vocabulary.largest
        chunked_loss = _chunked_loss(hf_model, decoder, sum_loss, columns, compile_backend, chunk_elements)
        _install_forward(hf_model, chunked_loss, local_logits)
    else:
        _install_forward(hf_model, _full_loss(hf_model.forward, sum_loss), local_logits)


def _full_loss(plain_forward: Callable, sum_loss: SumLoss) -> SumLoss:
    def forward_loss(targets: torch.Tensor, **inputs) -> torch.Tensor:
        return sum_loss(plain_forward(**inputs, use_cache=False).logits, targets)

    return forward_loss


def _chunked_loss(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    sum_loss: SumLoss,
    columns: int,
    compile_backend: str | None,
    chunk_elements: int | None,
) -> SumLoss:
    """columns: logits of a token as the head computes them, with tensor parallelism those of the largest part."""
    body, head = hf_model.get_submodule(decoder.base), build_head(hf_model, decoder)

    def chunk_loss(hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden), (tokens,) -> scalar"""
        logits = head.forward(inputs_embeds=hidden_states[None], use_cache=False).logits
        return sum_loss(logits, targets)

    is_compiled = compile_backend is not None
    if is_compiled:
        chunk_loss = torch.compile(chunk_loss, backend=compile_backend)

    def forward_loss(targets: torch.Tensor, **inputs) -> torch.Tensor:
        hidden_states = body(**inputs, use_cache=False)[0]  # (batch, seq, hidden)
        chunks = count_chunks(targets.numel(), columns, targets.device.type, chunk_elements)
        # Looked up at every call: FSDP2 swaps sharded and gathered parameters in and out of the modules.
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return _chunked_sum_loss(hidden_states, targets, chunk_loss, parameters, chunks, is_compiled=is_compiled)

    return forward_loss


def _linear_loss(
    hf_model: PreTrainedModel, decoder: Decoder, linear_head: LinearHead, vocabulary: VocabularyShard | None
) -> SumLoss:
    """The head module itself is called, with `targets`: then its hooks run, and its forward sees the parameters of that
    moment, which FSDP2 gathers and tensor parallelism takes a rank's part of."""
    body, head = hf_model.get_submodule(decoder.base), hf_model.get_submodule(decoder.head)
    replace_forward(head, linear_head)

    def forward_loss(targets: torch.Tensor, **inputs) -> torch.Tensor:
        return head(body(**inputs, use_cache=False)[0], targets=targets, vocabulary=vocabulary)

    return forward_loss


def count_chunks(tokens: int, vocabulary_size: int, device_type: str, chunk_elements: int | None = None) -> int:
    """In how many runs of the head the loss of `tokens` tokens is computed.

    All chunks have the same size where at most twice the fewest do: for chunks of two sizes the compiler makes code for
    any size, which is slower.
    """
    budget = chunk_elements or _CHUNK_ELEMENTS.get(device_type, _CHUNK_ELEMENTS["cpu"])
    fewest = max(1, min(tokens, math.ceil(tokens * vocabulary_size / budget)))
    return next((chunks for chunks in range(fewest, 2 * fewest + 1) if tokens % chunks == 0), fewest)


def _install_forward(
    hf_model: PreTrainedModel,
    forward_loss: SumLoss,
    local_logits: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    plain_forward = hf_model.forward

    @functools.wraps(plain_forward)  # generate() and others read the signature
    def forward(*args, targets: torch.Tensor | None = None, **kwargs):
        if targets is None:
            return plain_forward(*args, **kwargs)
        with local_logits():
            return forward_loss(targets, **kwargs)

    hf_model.forward = forward


class _SplitHead:
    """Hooks around a head module that computes a part of the vocabulary, so that the code around it need not know.

    They stand at the head module itself, and not at the end of the body: what a model has between them (ModernBERT a
    dense layer and a norm) computes the same on every rank and gets whole gradients, and what comes after the head in a
    plain call (softcap, Transformers' own loss) works on all logits.
    """

    def __init__(self, head: nn.Module, vocabulary: VocabularyShard) -> None:
        self._vocabulary = vocabulary
        self._gathers = True
        head.register_forward_pre_hook(self._enter)
        head.register_forward_hook(self._leave)

    def _enter(self, head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (enter(inputs[0], self._vocabulary.group),)

    def _leave(self, head: nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        return gather_logits(logits, self._vocabulary) if self._gathers else logits

    @contextlib.contextmanager
    def local_logits(self) -> Iterator[None]:
        """Within the block the head yields this rank's logits; elsewhere those of the whole vocabulary."""
        self._gathers = False
        try:
            yield
        finally:
            self._gathers = True


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
    head_model = owner = shallow_copy(hf_model)
    for name in parents:
        owner._modules[name] = shallow_copy(owner._modules[name])
        owner = owner._modules[name]
    owner._modules[body] = _HandOver()
    return head_model


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same parts; one of them can then be replaced."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def _add_gradients(
    chunk_loss: SumLoss, hidden: torch.Tensor, target: torch.Tensor, parameters: list, hidden_grad: torch.Tensor,
    sums: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The loss of a chunk; its gradients are put in `hidden_grad` and added to `sums`, and gone before the next one's
    are there."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        loss = chunk_loss(hidden, target)
    gradients = torch.autograd.grad(loss, [hidden, *parameters])
    hidden_grad.copy_(gradients[0])
    for total, gradient in zip(sums, gradients[1:], strict=True):
        _add(total, gradient)
    return loss.detach()


def _add(total: torch.Tensor, addend: torch.Tensor) -> None:
    """total += addend. On a CPU in parts: torch first copies into the dtype of the sum, which is several times slower
    where the copy has no place in the caches. (Not of a DTensor, the parts of which are copies.)"""
    if total.dtype == addend.dtype or total.device.type != "cpu" or total.dim() == 0 or isinstance(total, DTensor):
        total += addend
        return
    rows = max(1, 2**18 // max(1, math.prod(total.shape[1:])))
    for part, more in zip(total.split(rows), addend.split(rows), strict=True):
        part += more


class _ChunkedSumLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward, so that one chunk's logits are alive at a time.

    The loss is the root of the graph, so its gradients are known up to the scalar that arrives in the backward.
    Unlike checkpointing the chunks, that recomputes nothing. (The idea is that of Liger, arXiv 2410.10989, and of
    cut-cross-entropy, arXiv 2411.09009.)
    """

    @staticmethod
    def forward(ctx, chunk_loss: SumLoss, chunks: int, parameters: list, hidden_states, targets, *kept_parameters):
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
            total += _add_gradients(chunk_loss, hidden, target, parameters, grad, sums)
        ctx.save_for_backward(hidden_grad, *[s.to(p.dtype) for s, p in zip(sums, kept_parameters, strict=True)])
        return total

    @staticmethod
    def backward(ctx, grad_output):
        # Nearly always in place: these gradients exist for this backward only. Where the graph is kept there is another
        # one: zero-bubble schedules compute the gradients of inputs and of weights in two.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [gradient * grad_output if again else gradient.mul_(grad_output) for gradient in ctx.saved_tensors]
        return None, None, None, scaled[0], None, *scaled[1:]


def _chunked_sum_loss(
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    chunk_loss: SumLoss,
    parameters: list,
    chunks: int,
    *,
    is_compiled: bool,
) -> torch.Tensor:
    """Summed loss of hidden states (batch, seq, hidden) and targets (batch, seq), in `chunks` runs of the head."""
    hidden_states, targets = hidden_states.flatten(0, 1), targets.flatten()
    # Compiled code runs backward once only, which zero-bubble schedules do twice: there its backward runs inside.
    if (chunks > 1 or is_compiled) and torch.is_grad_enabled():
        # Sums in fp32 become gradients in fp32 of what is kept in fp32, also where the head computes with a cast of it.
        kept = map(kept_parameter, parameters)
        return _ChunkedSumLoss.apply(chunk_loss, chunks, parameters, hidden_states, targets, *kept)
    pieces = zip(hidden_states.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    return torch.stack([chunk_loss(hidden, target) for hidden, target in pieces]).sum()
