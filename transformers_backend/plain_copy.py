"""Copies of a model that trains here: plain Transformers models again, by `copy.deepcopy`, pickle and `torch.save`.

What was put on the model's instances (loss, kernels, recomputation, compiled layers) is bound to them: copied with the
rest, it would compute with the weights of the model that it was copied from. Linears in float8 are torch's again.
That goes for copies of its parts, too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import NoReturn

from torch import nn

from parallelize.float8 import is_float8

Forwards = Mapping[nn.Module, Callable]
"""The forwards that modules had on their instances before this project put others there."""


def own_forwards(model: nn.Module) -> Forwards:
    """A ValueError where this project put others there already: they would be taken for the model's own."""
    if "__deepcopy__" in vars(model):
        raise ValueError(
            f"{type(model).__name__}: an HFTransformerModel has changed this model already, to train it. Go on with "
            "that one, wrap a copy (copy.deepcopy), or make or load the model anew."
        )
    return {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}


def give_plain_copies(model: nn.Module, forwards: Forwards) -> None:
    """Let a model and its parts be copied as plain ones. It must be whole: on one rank, without FSDP2."""
    for module in model.modules():
        vars(module)["__deepcopy__"] = functools.partial(_deepcopied, module, forwards)
        vars(module)["__reduce_ex__"] = functools.partial(_reduced, module, forwards)


def refuse_copies(model: nn.Module) -> None:
    """Let a model of which ranks have parts not be copied, nor its modules."""

    def refuse(_: object) -> NoReturn:
        raise ValueError(
            f"{type(model).__name__}: parallelised over several ranks, or with cpu_offload, a model cannot be copied "
            "or pickled. Use save_pretrained and from_pretrained, or full_state_dict, of its HFTransformerModel."
        )

    for module in model.modules():
        vars(module)["__deepcopy__"] = vars(module)["__reduce_ex__"] = refuse


def _deepcopied(module: nn.Module, forwards: Forwards, memo: dict) -> nn.Module:
    return copy.deepcopy(_plain(module, forwards, {}), memo)


def _reduced(module: nn.Module, forwards: Forwards, protocol: int) -> tuple:
    return _plain(module, forwards, {}).__reduce_ex__(protocol)


def _plain(module: nn.Module, forwards: Forwards, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same parameters and buffers in modules of their own, with the forwards of their classes or of `forwards`."""
    if module not in done:
        kind = nn.Linear if is_float8(module) else type(module)
        clone = done[module] = kind.__new__(kind)
        own = vars(nn.Linear(1, 1, device="meta")) if is_float8(module) else vars(module)
        put_here = ("forward", "__deepcopy__", "__reduce_ex__")
        vars(clone).update({name: vars(module)[name] for name in own if name not in put_here})
        if module in forwards:
            clone.forward = forwards[module]
        children = module._modules.items()
        clone._modules = {name: None if child is None else _plain(child, forwards, done) for name, child in children}
    return done[module]
