"""Whether a model's head is one matrix product, a scale and a softcap, as `linear_cross_entropy` takes it to be.

    the head's own code around a small matrix -> how logits depend on the product -> `LinearHead`
    the twin -> loss and every gradient by the kernel against those by the head itself -> that, or why not

The first is done with the model's own config (MiniCPM3's scale depends on its sizes, which the twin does not have), the
second with the twin's. `kernel_plan.py` asks, `loss.py` uses the answer.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from parallelize.kernels.replace import has_hooks, has_own_forward
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.loss import LinearHead, build_head, shallow_copy
from transformers_backend.proof import MODEL_ERRORS, difference, example_batch, loss_and_gradients
from transformers_backend.twin import build_twin

_ENTRIES = 32  # of the vocabulary of the small matrix
_SIZES = (1e-3, 0.1, 1.0, 10.0, 100.0)  # of logits on which the formula found is tried
_TOLERANCE = 1e-6  # relative: heads may return fp32


class _Refused(Exception):
    """The sentence is the reason."""


def find_linear_head(hf_model: PreTrainedModel) -> LinearHead | str:
    """What the head of a whole model, possibly on the meta device, is, or why the kernel cannot compute it."""
    try:
        linear_head = _look_at(hf_model, describe_decoder(hf_model))
        _prove(hf_model)
    except _Refused as refusal:
        return str(refusal)
    return linear_head


@torch.no_grad()
def _look_at(hf_model: PreTrainedModel, decoder: Decoder) -> LinearHead:
    matrix = hf_model.get_submodule(decoder.head)
    if type(matrix).forward is not nn.Linear.forward:
        raise _Refused(f"its {type(matrix).__name__} is no nn.Linear")
    # Whoever changed or watches its output expects logits.
    if has_own_forward(matrix) or has_hooks(matrix):
        raise _Refused("it has hooks, or a forward that is not its class's")
    head = build_head(hf_model, decoder)
    ours = {id(parameter) for parameter in matrix.parameters()}
    # A tied matrix has the embedding's name first, and others are of other layers.
    others = [name for name, parameter in head.named_parameters() if id(parameter) not in ours]
    if others:
        raise _Refused(f"the head has more than its matrix: {', '.join(others)}")
    probe = _Probe(head, decoder.head, matrix)
    try:
        return probe.find()
    except MODEL_ERRORS as error:
        raise _Refused(f"the head does not run on its own ({type(error).__name__}: {error})") from error


class _Probe:
    """A head's own code with a small matrix in place of its own, in float64 on the CPU."""

    def __init__(self, head: nn.Module, name: str, matrix: nn.Linear) -> None:
        self._matrix = nn.Linear(matrix.in_features, _ENTRIES, matrix.bias is not None, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(7)
        *parents, last = name.split(".")
        owner = head
        for parent in parents:
            owner._modules[parent] = shallow_copy(owner._modules[parent])
            owner = owner._modules[parent]
        owner._modules[last] = self._matrix
        self._head = head

    def find(self) -> LinearHead:
        """From small products the scale, from huge ones the softcap; then the formula is tried on those between."""
        product, logits = self._run(1e-6)
        scale = _plain_number((logits / product).median().item())
        product, logits = self._run(1e9)
        largest = logits.abs().max().item()
        is_capped = largest < 1e-3 * (scale * product).abs().max().item()
        linear_head = LinearHead(scale=scale, softcap=_plain_number(largest) if is_capped else None)
        for size in _SIZES:
            product, logits = self._run(size / abs(scale) if scale else size)
            expected = scale * product
            if linear_head.softcap is not None:
                expected = linear_head.softcap * torch.tanh(expected / linear_head.softcap)
            if not (logits - expected).abs().max() <= _TOLERANCE * expected.abs().max():
                raise _Refused("its logits are not those of one matrix product, a scale and a softcap")
        return linear_head

    def _run(self, size: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Products (tokens, entries) of about this size, and the head's logits, both float64."""
        features = self._matrix.in_features
        for parameter in self._matrix.parameters():
            values = torch.randn(parameter.shape, generator=self._generator, dtype=torch.float64)
            parameter.copy_(values * (size / features**0.5 if parameter.dim() == 2 else size))
        hidden = torch.randn(1, 4, features, generator=self._generator, dtype=torch.float64)
        logits = self._head.forward(inputs_embeds=hidden, use_cache=False).logits
        return self._matrix(hidden), logits.double()


def _plain_number(value: float) -> float:
    """The number that a config had, where one of a few digits is as near as fp32 comes."""
    rounded = float(f"{value:.6g}")
    return rounded if abs(value - rounded) <= 1e-7 * abs(value) else value


@torch.enable_grad()
def _prove(hf_model: PreTrainedModel) -> None:
    """Loss and gradients of the twin by the kernel, against those by its own head."""
    twins = [build_twin(hf_model.config, type(hf_model)) for _ in range(2)]
    linear_head = _look_at(twins[0], describe_decoder(twins[0]))
    batch = example_batch()
    own = loss_and_gradients(twins[0], *batch, chunked=False)
    reason = difference(own, loss_and_gradients(twins[1], *batch, chunked=False, linear_head=linear_head))
    if reason is not None:
        raise _Refused(f"the kernel computes something else on the twin ({reason})")
