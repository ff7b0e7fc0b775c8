"""What a pipeline needs to know about an architecture, found out on the tall twin, and the proof that it is exact.

The tall twin has tiny widths and as many layers as the real model, so that the very split of the real model is tried
on it, stage by stage in one process, against the unsplit twin: the loss and every gradient.

    `look_at_layers`   do the layers run once, in order; what do they return; which of them must stay together
    `prove_stages`     which stage needs the value of which weight outside the layers; is the split exact
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.proof import MODEL_ERRORS, difference, example_batch, gradients
from transformers_backend.stages import (
    Container,
    LocalStages,
    StageSplit,
    outer_parameters,
    replace_parameters,
    restore_parameters,
)
from transformers_backend.twin import build_twin


@dataclass(frozen=True)
class LayerFacts:
    """How the layers of an architecture are called."""

    containers: Mapping[str, Container | None]
    """By layer, in what it returns the hidden states; None for a plain tensor."""
    forbidden_cuts: frozenset[int]
    """Numbers of layers that cannot begin a stage: they, or later ones, get more from earlier layers than the hidden
    states (keys and values that layers share)."""


class TallTwin:
    """The twin with all layers of a model, its loss and gradients as plain Transformers computes them."""

    def __init__(
        self, hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str | None
    ) -> None:
        def build() -> PreTrainedModel:
            return build_twin(hf_config, model_class, attn_implementation=attn_implementation, all_layers=True)

        self._build = build
        self._name = model_class.__name__
        try:
            self._plain = build()
        except MODEL_ERRORS as error:
            raise self._unproven("be built", error) from error
        self.decoder = describe_decoder(self._plain)
        self._input_ids, self._labels = example_batch()

    def _unproven(self, what: str, error: Exception) -> ValueError:
        return ValueError(
            f"{self._name}: a small twin with all of its layers cannot {what} ({_in_a_line(error)}), so nothing about "
            "its stages can be proven and a pipeline is refused. Set parallelism.pipeline_parallel_degree = 1."
        )

    @torch.enable_grad()
    def look_at_layers(self) -> LayerFacts:
        """Run the unsplit twin once; a ValueError where its layers do not run one after the other."""
        layers = self.decoder.layers
        watch = _Watch(self._plain, layers)
        try:
            self._expected = _loss_and_gradients(self._plain, self._input_ids, self._labels)
        except MODEL_ERRORS as error:
            raise self._unproven("run", error) from error
        watch.remove()
        if watch.ran != list(range(len(layers))):
            raise ValueError(
                f"{self._name} does not run its layers once, one after the other ({_how(watch.ran, len(layers))}), "
                "so they cannot be stages of a pipeline. Set parallelism.pipeline_parallel_degree = 1."
            )
        if watch.shape[-3:-1] != self._input_ids.shape:
            raise ValueError(
                f"{self._name}: hidden states between its layers are {tuple(watch.shape)} for tokens "
                f"{tuple(self._input_ids.shape)}, where a pipeline sends (..., batch, seq, hidden). Set "
                "parallelism.pipeline_parallel_degree = 1."
            )
        return LayerFacts(
            containers=dict(zip(layers, watch.containers, strict=True)), forbidden_cuts=frozenset(watch.forbidden_cuts)
        )

    @torch.enable_grad()
    def prove_stages(self, stages: Sequence[Sequence[str]], facts: LayerFacts) -> StageSplit:
        """The split with what each stage holds; a ValueError where it does not compute what the whole model does."""
        twin = self._build()
        everything = frozenset(outer_parameters(twin, self.decoder))
        stages = tuple(tuple(stage) for stage in stages)
        of_all = StageSplit(stages, (everything,) * len(stages), facts.containers)
        try:
            for parameter in twin.parameters():  # also a table of sines that is never trained has a value (RoFormer's)
                parameter.requires_grad_(parameter.is_floating_point())
            needed = tuple(_outer_parameters_with_gradient(self._run(twin, of_all)))
            chosen = StageSplit(stages, needed, facts.containers)
            for split in (chosen, of_all):
                reason = self._difference(split)
                if reason is None:
                    return split
        except MODEL_ERRORS as error:
            reason = _in_a_line(error)
        raise ValueError(
            f"{self._name}: cut into {len(stages)} pipeline stages it computes something else ({reason}), so it is "
            "refused. Set parallelism.pipeline_parallel_degree = 1."
        )

    def _difference(self, split: StageSplit) -> str | None:
        """How the loss and the gradients of a split differ from those of the unsplit twin, or None."""
        run = self._run(self._build(), split)
        loss = run.forward()
        run.backward()
        return difference(self._expected, (loss, gradients(run.twin)))

    def _run(self, twin: PreTrainedModel, split: StageSplit) -> _Run:
        return _Run(twin, self.decoder, split, self._input_ids, self._labels)


def _how(ran: Sequence[int], layers: int) -> str:
    return f"it runs {len(ran)} for {layers}" if len(ran) != layers else "it runs them in another order, or some twice"


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")


def _loss_and_gradients(
    twin: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    install_loss(twin, describe_decoder(twin), chunked=False)
    loss = twin(input_ids=input_ids, targets=shift_labels(labels)) / count_targets(labels)
    loss.backward()
    return loss.item(), gradients(twin)


class _Run:
    """One forward and backward of a twin stage by stage, in one process.

    Weights that a stage does not hold are NaN while it runs, so that a value which is needed all the same shows. After
    each stage another micro-batch goes through it, as in a schedule, so that what a stage leaves behind for a later one
    beside the hidden states, which other ranks would not have, is of the wrong tokens.
    """

    def __init__(
        self, twin: PreTrainedModel, decoder: Decoder, split: StageSplit, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> None:
        install_loss(twin, decoder, chunked=False)
        self.twin, self.split = twin, split
        self.outer = outer_parameters(twin, decoder)
        self._stages = LocalStages(twin, decoder, split, range(len(split.stages)))
        self._stages.install()
        self._inputs = {"input_ids": input_ids, "targets": shift_labels(labels)}
        self._count = count_targets(labels)
        self.received: list[torch.Tensor | None] = []
        self.sent: list[torch.Tensor] = []

    def forward(self) -> float:
        hidden_states = None
        for stage in range(len(self.split.stages)):
            replaced = replace_parameters(
                self.twin, [name for name in self.outer if name not in self.split.held[stage]], value=float("nan")
            )
            output = self.twin(stage=stage, hidden_states=hidden_states, **self._inputs)
            self._run_another_micro_batch(stage, hidden_states)
            restore_parameters(replaced)
            self.received.append(hidden_states)
            self.sent.append(output)
            hidden_states = output.detach().requires_grad_()
        self.sent[-1] = output / self._count
        return self.sent[-1].item()

    @torch.no_grad()
    def _run_another_micro_batch(self, stage: int, hidden_states: torch.Tensor | None) -> None:
        other = {name: tensor.flip(1) for name, tensor in self._inputs.items()}
        received = None if hidden_states is None else hidden_states.flip(-2)
        self.twin(stage=stage, hidden_states=received, **other)

    def backward(self) -> None:
        gradient = None
        for received, sent in zip(reversed(self.received), reversed(self.sent), strict=True):
            sent.backward(gradient)
            gradient = None if received is None else received.grad


def _outer_parameters_with_gradient(run: _Run) -> list[frozenset[str]]:
    """For each stage, the parameters outside the layers that its output, and so the loss, depends on."""
    run.forward()
    parameters = dict(run.twin.named_parameters())
    found, gradient = [], None
    for received, sent in zip(reversed(run.received), reversed(run.sent), strict=True):
        inputs = [parameters[name] for name in run.outer] + ([] if received is None else [received])
        of_inputs = torch.autograd.grad(sent, inputs, gradient, allow_unused=True)
        gradient = of_inputs[-1]
        found.append(frozenset(name for name, of in zip(run.outer, of_inputs, strict=False) if of is not None))
    return found[::-1]


class _Watch:
    """Hooks on the layers of a model that see one forward."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.shape = torch.Size()
        """Of the hidden states that the last layer got."""
        self.ran: list[int] = []
        self.containers: list[Container | None] = []
        self.forbidden_cuts: set[int] = set()
        self._layer_of = {
            parameter: index
            for index, name in enumerate(layers)
            for parameter in model.get_submodule(name).parameters()
        }
        self._hooks = []
        for index, name in enumerate(layers):
            layer = model.get_submodule(name)
            self._hooks.append(layer.register_forward_pre_hook(self._before(index), with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(self._after(index)))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, index: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            self.ran.append(index)
            self.shape = (args[0] if args else kwargs["hidden_states"]).shape
            others = [*args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}]
            for tensor in _tensors_in(others):
                producer = self._producer(tensor)
                if producer is not None:
                    self.forbidden_cuts.update(range(producer + 1, index + 1))

        return hook

    def _after(self, index: int):
        def hook(layer: nn.Module, args: tuple, output) -> None:
            self.containers.append(None if isinstance(output, torch.Tensor) else (type(output), len(output)))

        return hook

    def _producer(self, tensor: torch.Tensor) -> int | None:
        """The last layer whose weights `tensor` depends on."""
        found, seen, waiting = None, set(), [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            layer = self._layer_of.get(getattr(node, "variable", None))  # of the nodes that end in a parameter
            if layer is not None and (found is None or layer > found):
                found = layer
            waiting.extend(next_node for next_node, _ in node.next_functions)
        return found


def _tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
