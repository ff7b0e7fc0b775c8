"""What is tried on the twin before it is trusted on the real model.

`prove` runs at every start (milliseconds): is the model causal, is its own loss the mean cross-entropy, does its head
run chunk by chunk. `check_recomputation` and `why_not_compile` run when those are asked for: do the layers then still
compute what they did. What cannot be exact is refused, or done the slower exact way with a reason that is logged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.activation_checkpoint import apply_activation_checkpointing
from parallelize.compile import COMPILE_ERRORS, apply_compile, compiled_for_now
from parallelize.config import ActivationCheckpointConfig
from parallelize.tensor_parallel.vocabulary import VocabularyShard
from transformers_backend.decoder import describe_decoder
from transformers_backend.loss import LinearHead, count_targets, install_loss, shift_labels
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

# The twin computes in fp32; two orders of addition differ by rounding only.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Anything that a twin's construction or forward can raise when an architecture does not fit the twin's sizes.
MODEL_ERRORS = (
    AttributeError, IndexError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Proof:
    full_loss_because: str | None
    """Why the head cannot run in chunks, or None where the twin shows that it can."""


@torch.enable_grad()
def prove(hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str | None) -> Proof:
    """Try on the twin what the trainer relies on; raises a ValueError where the model cannot be trained exactly."""
    twin = _build(hf_config, model_class, attn_implementation)
    input_ids, labels = example_batch()
    _check_causal(twin, input_ids)
    own_loss = twin(input_ids=input_ids, labels=labels, use_cache=False).loss
    if own_loss is None:
        raise ValueError(
            f"{model_class.__name__}: it returns no loss for labels, so nothing can be compared; it is refused."
        )
    own_loss.backward()
    own = gradients(twin)
    full = loss_and_gradients(_build(hf_config, model_class, attn_implementation), input_ids, labels, chunked=False)
    if (reason := difference((own_loss.item(), own), full)) is not None:
        raise ValueError(
            f"{model_class.__name__}: the model's own loss is not the mean cross-entropy over target tokens "
            f"({reason}), so this trainer would train something else; it is refused."
        )
    try:
        chunked = loss_and_gradients(
            _build(hf_config, model_class, attn_implementation), input_ids, labels, chunked=True
        )
    except MODEL_ERRORS as error:
        return Proof(f"{model_class.__name__}'s head does not run on its own ({type(error).__name__}: {error})")
    reason = difference(full, chunked)
    return Proof(None if reason is None else f"{model_class.__name__}'s head differs in chunks ({reason})")


def _build(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str | None
) -> PreTrainedModel:
    try:
        return build_twin(hf_config, model_class, attn_implementation=attn_implementation)
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{model_class.__name__}: no small twin of this config could be built ({type(error).__name__}: {error}), "
            "so nothing about it can be proven and it is refused."
        ) from error


def example_batch(batch: int = 2, seq: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and labels (batch, seq), some labels ignored, different numbers of them in each row."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (batch, seq), generator=generator)
    labels = input_ids.clone()
    for row in range(batch):
        labels[row, : 2 + 3 * row] = -100
    return input_ids, labels


@torch.no_grad()
def _check_causal(twin: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Changing the last token must not change what is predicted before it."""
    changed = input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 7) % VOCABULARY_SIZE
    try:
        before = twin(input_ids=input_ids, use_cache=False).logits[:, :-1]
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{type(twin).__name__}: it does not run on input_ids alone ({type(error).__name__}: {error}), so this is "
            "not a decoder-only language model (encoder-decoder models are not supported); it is refused."
        ) from error
    after = twin(input_ids=changed, use_cache=False).logits[:, :-1]
    if (before - after).abs().max() > LOSS_TOLERANCE * before.abs().max():
        raise ValueError(
            f"{type(twin).__name__}: predictions depend on later tokens, so this is not a causal language model "
            "(an encoder such as BERT needs is_decoder = true in its config to be one); it is refused."
        )


def loss_and_gradients(
    twin: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    chunked: bool,
    vocabulary: VocabularyShard | None = None,
    linear_head: LinearHead | None = None,
    before_run: Callable[[], None] | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Our loss of a twin, with the head in three chunks or on full logits, and every gradient.

    vocabulary: what a rank's head computes of it. linear_head: for a loss without logits.
    before_run: called when the loss is installed.
    """
    columns = VOCABULARY_SIZE if vocabulary is None else vocabulary.largest
    chunk_elements = input_ids.numel() * columns // 3 + 1
    install_loss(
        twin, describe_decoder(twin),
        chunked=chunked, chunk_elements=chunk_elements, vocabulary=vocabulary, linear_head=linear_head,
    )  # fmt: skip
    if before_run is not None:
        before_run()
    loss = twin(input_ids=input_ids, targets=shift_labels(labels)) / count_targets(labels)
    loss.backward()
    return loss.item(), gradients(twin)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_errors(reference: dict[str, torch.Tensor], value: dict[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of the reference, in float64, for every gradient.

    Some gradients are zero by construction and rounding in practice (a key bias, by which softmax is unchanged), so
    no gradient counts as smaller than a thousandth of the model's typical one. A missing gradient counts as zero.
    """
    typical = _root_mean_square(torch.cat([gradient.double().flatten() for gradient in reference.values()]))
    errors = {}
    for name, gradient in reference.items():
        other = value[name].double() if name in value else torch.zeros_like(gradient, dtype=torch.float64)
        scale = max(_root_mean_square(gradient.double()), 1e-3 * typical)
        errors[name] = _root_mean_square(other - gradient.double()) / scale
    for name in value.keys() - reference.keys():  # right only where it is zero
        errors[name] = _root_mean_square(value[name].double()) / typical
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


def _root_mean_square(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def difference(
    reference: tuple[float, dict[str, torch.Tensor]], value: tuple[float, dict[str, torch.Tensor]]
) -> str | None:
    """A sentence on the loss or the worst gradient if they differ by more than rounding, or None."""
    if not abs(reference[0] - value[0]) <= LOSS_TOLERANCE * max(1.0, abs(reference[0])):
        return f"loss {value[0]:.6f} instead of {reference[0]:.6f}"
    errors = relative_errors(reference[1], value[1])
    worst = max(errors, key=errors.get)
    if not errors[worst] <= GRADIENT_TOLERANCE:
        return f"gradient of {worst} off by {errors[worst]:.1e} relative"
    return None


def why_not_compile(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    attn_implementation: str | None,
    backend: str,
    device: torch.device,
    activation_checkpoint: ActivationCheckpointConfig | None = None,
) -> str | None:
    """Compile the twin's layers, recomputation included, on `device`; returns why they are wrong then, or None."""
    activation_checkpoint = activation_checkpoint or ActivationCheckpointConfig()

    def change(layers: list[nn.Module]) -> None:
        recompute(layers, activation_checkpoint)
        apply_compile(layers, backend=backend, memory_budget=activation_checkpoint.compilers_budget)

    try:
        with compiled_for_now(), warnings.catch_warnings():
            # The compiler itself reads that attribute; where warnings are errors it would take this for a failure.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            reason = _difference_after(change, hf_config, model_class, attn_implementation, device)
    except COMPILE_ERRORS as error:
        return f"{model_class.__name__} does not compile with {backend} ({str(error).splitlines()[0]})"
    return None if reason is None else f"{model_class.__name__} compiled with {backend} is wrong: {reason}"


def check_recomputation(
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    attn_implementation: str | None,
    activation_checkpoint: ActivationCheckpointConfig,
) -> None:
    """Recompute activations in the twin's layers as asked for; a ValueError where the gradients are then wrong.

    That happens: gemma3n changes in place what the per-op recomputation keeps, which raises no error.
    """
    if activation_checkpoint.mode in ("none", "memory_budget"):  # the latter `why_not_compile` tries
        return
    option = str(activation_checkpoint.selective_ac_option)
    reason = _difference_after(
        lambda layers: recompute(layers, activation_checkpoint),
        hf_config, model_class, attn_implementation, torch.device("cpu"),
    )  # fmt: skip
    if reason is not None:
        raise ValueError(
            f'activation_checkpoint.mode = "{activation_checkpoint.mode}", selective_ac_option = "{option}": with it '
            f'{model_class.__name__} computes something else ({reason}). Set mode to "full" or "none", or '
            'selective_ac_option to "2".'
        )


def recompute(layers: list[nn.Module], activation_checkpoint: ActivationCheckpointConfig) -> None:
    """Make layers recompute their activations in the backward, in place."""
    apply_activation_checkpointing(
        layers,
        mode=activation_checkpoint.mode,
        selective_option=str(activation_checkpoint.selective_ac_option),
        preserve_rng_state=activation_checkpoint.preserve_rng_state,
    )


@torch.enable_grad()
def _difference_after(
    change: Callable[[list[nn.Module]], None],
    hf_config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    attn_implementation: str | None,
    device: torch.device,
) -> str | None:
    """How the twin's loss and gradients differ after `change(layers)` from what they were before, or None."""
    input_ids, labels = (tensor.to(device) for tensor in example_batch())
    before, after = (_build(hf_config, model_class, attn_implementation).to(device) for _ in range(2))
    reference = loss_and_gradients(before, input_ids, labels, chunked=False)
    change([after.get_submodule(name) for name in describe_decoder(after).layers])
    return difference(reference, loss_and_gradients(after, input_ids, labels, chunked=False))
