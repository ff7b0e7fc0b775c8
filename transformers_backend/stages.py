"""The stages of a pipeline that one rank runs: an unmodified Transformers model of which only some layers are here.

There is one `hf_model` per rank, however many stages it runs. Layers of other ranks are *stand-ins*: the same class
with the same plain attributes, but without weights, whose forward passes the hidden states on in the layer's own return
convention. The lists of layers keep their length, so that parameter names stay Transformers' own. Running a stage is
one call of the model in which the layers of all other stages are stand-ins:

    stage k = 0:   tokens -> embedding -> layers 0, 1 -> stand-ins ...          layer 1's output is sent on
    stage k = 1:   tokens -> (no value) -> stand-ins -> layers 2, 3 -> ...      layer 2 gets what was received
    last stage:    tokens -> (no value) -> stand-ins ... -> layers n-2, n-1 -> norm -> head -> loss

Masks, positions and rotary embeddings follow from the tokens, which every stage has; only hidden states travel. Weights
outside the layers are held where their value is needed (`StageSplit.held`); elsewhere a tensor of zeros without memory
has their shape. What is held where, and that all this is exact, is found out on the twin (`stage_proof.py`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from parallelize.tensor_parallel import Stack
from transformers_backend.decoder import Decoder

Container = tuple[type, int]
"""A layer that returns a tuple or list: which of them, of how many values. The hidden states come first."""

_NO_STAGE = -1  # a run of the model with none of its layers


@dataclass(frozen=True)
class StageSplit:
    """Which stage of a model has what; the same on every rank."""

    stages: tuple[tuple[str, ...], ...]
    """The names of each stage's layers."""
    held: tuple[frozenset[str], ...]
    """For each stage, the parameters outside the layers whose value it needs."""
    containers: Mapping[str, Container | None]
    """By layer, in what it returns the hidden states; None for a plain tensor."""

    @property
    def last(self) -> int:
        return len(self.stages) - 1

    def stages_of(self, parameter: str) -> tuple[int, ...]:
        """The stages that hold a parameter (by the first of its names, where it is tied)."""
        return tuple(
            stage
            for stage, layers in enumerate(self.stages)
            if parameter in self.held[stage] or any(parameter.startswith(f"{layer}.") for layer in layers)
        )


class LocalStages:
    """Cuts a model down to the stages of one rank, and runs one of them at a time."""

    def __init__(self, hf_model: PreTrainedModel, decoder: Decoder, split: StageSplit, local: Sequence[int]) -> None:
        """local: the numbers of this rank's stages. Changes nothing yet."""
        self._model, self._decoder, self.split, self.local = hf_model, decoder, split, tuple(local)
        self._name = type(hf_model).__name__
        self._layers = {name: hf_model.get_submodule(name) for name in decoder.layers}
        self._stand_ins = {name: self._stand_in(name) for name in decoder.layers}
        self._received: torch.Tensor | None = None
        self._captured: torch.Tensor | None = None
        # What the model gave to the stage's first layer, till it is handed out.
        self._entered: torch.Tensor | None = None
        self._passed: torch.Tensor | None = None  # what the latest stand-in got
        self._replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    @property
    def has_last(self) -> bool:
        return self.split.last in self.local

    @property
    def stacks(self) -> list[Stack]:
        return [Stack(self.split.stages[stage], is_handed_on=stage < self.split.last) for stage in sorted(self.local)]

    @property
    def layers(self) -> list[str]:
        """The names of all layers that this rank runs, in order."""
        return [name for stage in sorted(self.local) for name in self.split.stages[stage]]

    # -- cutting --------------------------------------------------------------------------------------------------

    def drop_the_rest(self) -> None:
        """Let the layers and weights of other ranks go, for good."""
        here = set(self.layers)
        for name in self._decoder.layers:
            if name not in here:
                self._put(name, self._stand_ins[name])
                self._layers[name] = self._stand_ins[name]
        held = frozenset().union(*(self.split.held[stage] for stage in self.local))
        outer = outer_parameters(self._model, self._decoder)
        self._replaced = replace_parameters(self._model, [name for name in outer if name not in held])

    def place_stand_ins(self, device: torch.device, dtype: torch.dtype) -> None:
        """Where weights of other ranks stood, put zeros on the device and of the dtype that the model computes with."""
        for module, name, parameter in self._replaced:
            vars(module)[name] = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
        self._replaced = []

    def _stand_in(self, name: str) -> nn.Module:
        stand_in = _without_weights(self._layers[name])
        container = self.split.containers[name]

        def forward(hidden_states: torch.Tensor, *args, **kwargs):
            self._passed = hidden_states
            if self._entered is not None:  # the stage's last layer has run just before
                hidden_states = self._hand_out(hidden_states)
            if container is None:
                return hidden_states
            kind, length = container
            return kind([hidden_states, *[None] * (length - 1)])

        stand_in.forward = forward
        return stand_in

    def _put(self, name: str, layer: nn.Module) -> None:
        layer_list, _, key = name.rpartition(".")
        self._model.get_submodule(layer_list)._modules[key] = layer

    # -- running --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Let `hf_model(stage=..., hidden_states=..., **inputs)` run one stage; the last yields logits without targets.

        Call it once, after everything else that wraps layers or changes what they get: the first layer of a stage gets
        what was received, whatever earlier hooks made of what stood there (`refuse_early_hooks`). What is sent on is
        what the layer after the last one would have got.
        """
        for stage in self.local:
            layers = self.split.stages[stage]
            if stage > 0:
                self._layers[layers[0]].register_forward_pre_hook(self._hand_in, with_kwargs=True)
            if stage < self.split.last:
                self._layers[layers[0]].register_forward_pre_hook(self._remember, with_kwargs=True, prepend=True)
        plain_forward = self._model.forward
        body = self._model.get_submodule(self._decoder.base)

        def forward(*args, stage: int | None = None, hidden_states: torch.Tensor | None = None, **inputs):
            if stage is None:
                self._refuse("the model cannot be called by itself, nor generate. Call forward_backward or evaluate")
            self._received = hidden_states
            try:
                with self._in_place(stage):
                    if stage == self.split.last:
                        if "targets" in inputs:
                            return plain_forward(*args, **inputs)
                        return plain_forward(*args, **inputs, use_cache=False).logits
                    inputs.pop("targets", None)
                    body(*args, **inputs, use_cache=False)
                return self._passed if stage == _NO_STAGE else self._captured
            finally:
                self._received = self._passed = self._captured = self._entered = None

        self._model.forward = forward
        self._model.save_pretrained = lambda *_, **__: self._refuse("it cannot save itself. Call save_pretrained")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self._name}: with pipeline_parallel_degree > 1 this rank has only some of its layers, so {what} of the "
            "HFTransformerModel, on every rank. What its save_pretrained writes loads and works anywhere."
        )

    @contextlib.contextmanager
    def _in_place(self, stage: int) -> Iterator[None]:
        """Within the block the layers of all other stages are stand-ins."""
        here = set(self.split.stages[stage]) if stage != _NO_STAGE else set()
        others = [name for name in self._layers if name not in here]
        for name in others:
            self._put(name, self._stand_ins[name])
        try:
            yield
        finally:
            for name in others:
                self._put(name, self._layers[name])

    def _hand_in(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert self._received is not None
        # A copy, because some layers (ctrl's) change their input in place, and what was received is a leaf.
        received = self._received.clone()
        if args:
            return (received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": received}

    def _remember(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._entered = args[0] if args else kwargs["hidden_states"]

    def _hand_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keep what is sent on; the rest of the model, whose result nobody uses, goes on with what entered the layers.

        That has the shape that the model expects, where what is sent on may be this rank's part of the sequence.
        """
        self._captured, entered, self._entered = hidden_states, self._entered.detach(), None
        return entered

    def hidden_states_like(self, **inputs) -> torch.Tensor:
        """Hidden states as they enter the layers, for their shape and dtype; runs the model without its layers."""
        with torch.no_grad():
            return self._model(stage=_NO_STAGE, **inputs)


def outer_parameters(hf_model: PreTrainedModel, decoder: Decoder) -> list[str]:
    """Names of the parameters outside the layers, tied ones under the first of their names."""
    in_layers = tuple(f"{layer}." for layer in decoder.layers)
    return [name for name, _ in hf_model.named_parameters() if not name.startswith(in_layers)]


def replace_parameters(
    hf_model: PreTrainedModel, names: Collection[str], *, value: float = 0.0
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put a tensor of one `value` and no memory in the place of parameters; returns what stood where.

    names: tied parameters by the first of their names, all places of theirs are changed. The tensor is no parameter:
    it is neither trained, sharded nor saved.
    """
    chosen = {id(parameter) for name, parameter in hf_model.named_parameters() if name in set(names)}
    replaced = []
    for module in hf_model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in chosen:
                replaced.append((module, name, parameter))
                del module._parameters[name]
                stand_in = torch.full((), value, dtype=parameter.dtype, device=parameter.device)
                vars(module)[name] = stand_in.expand(parameter.shape)
    return replaced


def restore_parameters(replaced: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, name, parameter in replaced:
        del vars(module)[name]
        module._parameters[name] = parameter


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module and all within it that shares plain attributes, and has no parameters, buffers and hooks."""
    clone = copy.copy(module)
    clone._parameters = dict.fromkeys(module._parameters)
    clone._buffers = dict.fromkeys(module._buffers)
    clone._modules = {name: child and _without_weights(child) for name, child in module._modules.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(clone, hooks, type(getattr(clone, hooks))())
    return clone
