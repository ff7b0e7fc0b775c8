"""Finds attention modules that rotate queries and keys by a function that a kernel computes, and proves both.

    class's forward -> names in its code whose globals are functions of (q, k, cos, sin, ...)
        -> tried on random tensors of several shapes and dtypes: the RotaryForm that returns the same bits
        -> every module of the class on the twin, called as the twin calls it, with and without: equal outputs and
           gradients -> RotaryKernel

A forward that a decorator wraps is left alone: its code is the decorator's.
"""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from parallelize.kernels.replace import RotaryKernel, has_own_forward
from parallelize.kernels.rotary import RotaryForm, rotary_reference
from transformers_backend.proof import MODEL_ERRORS

_ARGUMENTS = ["q", "k", "cos", "sin"]
_TOKENS = 7
_SLACK = 1e-5  # of gradients in fp32, relative to the largest
_FORMS = [
    RotaryForm(interleaved, repeats, wide, casts_back)
    for (interleaved, repeats), wide, casts_back in itertools.product(
        ((False, False), (True, False), (True, True)), (False, True), (False, True)
    )
]


def rotary_kernels(
    hf_model: PreTrainedModel, twin: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, RotaryKernel | str]]:
    """The model's modules whose forward calls such a function: name, module, and kernel or why it has none."""
    found: dict[type, RotaryKernel | str] = {}
    called = None
    for name, module in hf_model.named_modules():
        kind = type(module)
        if not rotary_functions(kind):
            continue
        if kind not in found:
            called = _calls(twin) if called is None else called
            found[kind] = find_rotary_kernel(kind, [call for call in called if type(call[0]) is kind])
        is_changed = has_own_forward(module) and not isinstance(found[kind], str)
        yield name, module, "has a forward that is not its class's" if is_changed else found[kind]


def rotary_functions(kind: type[nn.Module]) -> list[str]:
    """Names of functions of (q, k, cos, sin, ...) in the code of a class's forward."""
    forward = kind.forward
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return []
    functions = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    return [
        name
        for name, function in functions.items()
        if isinstance(function, types.FunctionType) and list(inspect.signature(function).parameters)[:4] == _ARGUMENTS
    ]


def find_rotary_kernel(kind: type[nn.Module], calls: list[tuple[nn.Module, tuple, dict]]) -> RotaryKernel | str:
    """The kernel of a class's modules, of which `calls` has some with their arguments on the twin, or why not."""
    names = rotary_functions(kind)
    if len(names) != 1:
        return "rotates by several functions"
    kernel = find_rotary_form(names[0], kind.forward.__globals__[names[0]])
    if kernel is None:
        return "rotates in another way"
    if not calls:
        return "does not run on the small copy"
    try:
        proven = all(_computes_the_same(module, kernel, args, kwargs) for module, args, kwargs in calls)
    except MODEL_ERRORS:
        proven = False
    return kernel if proven else "computes something else with it"


def find_rotary_form(name: str, function: Callable) -> RotaryKernel | None:
    """What a model's function computes, by name; None if it is no form that the kernel has."""
    if not _accepts_unsqueeze(function):
        return None
    is_partial = _result(function, *_example(14, 6, torch.float32, torch.float32)) is not None
    for form in _FORMS:
        if all(
            _same(_result(function, *example), rotary_reference(*example, form))
            for dtypes in itertools.product((torch.float32, torch.bfloat16), repeat=2)
            for example in (
                _example(8, 8, *dtypes), _example(6, 6, *dtypes), *([_example(14, 6, *dtypes)] if is_partial else ()),
            )
        ):  # fmt: skip
            return RotaryKernel(name, form, is_partial)
    return None


def _accepts_unsqueeze(function: Callable) -> bool:
    parameters = list(inspect.signature(function).parameters.values())[4:]
    return [(one.name, one.default) for one in parameters] == [("unsqueeze_dim", 1)]


def _example(head_size: int, columns: int, dtype: torch.dtype, table_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, cos, sin; the tables are no cosines and sines, so that which entry is used where shows."""
    generator = torch.Generator().manual_seed(head_size)
    shapes = ((2, 4, _TOKENS, head_size), (2, 2, _TOKENS, head_size), *[(2, _TOKENS, columns)] * 2)
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in shapes)
    return q.to(dtype), k.to(dtype), cos.to(table_dtype), sin.to(table_dtype)


def _result(function: Callable, *example: torch.Tensor) -> object:
    try:
        return function(*example)
    except MODEL_ERRORS:
        return None


def _same(expected: object, found: object) -> bool:
    """Whether two results hold the same tensors, bit by bit."""
    expected, found = (
        [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)] for result in (expected, found)
    )
    return len(expected) == len(found) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, found, strict=True)
    )


def _calls(twin: PreTrainedModel) -> list[tuple[nn.Module, tuple, dict]]:
    """Calls of the twin's modules that rotate, with copies of their arguments."""
    calls, handles = [], []

    def keep(module, args, kwargs) -> None:
        calls.append((module, *tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))))

    for module in twin.modules():
        if rotary_functions(type(module)):
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            twin(input_ids=torch.arange(2 * _TOKENS).view(2, _TOKENS) % twin.config.vocab_size, use_cache=False)
    except MODEL_ERRORS:
        calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.enable_grad()
def _computes_the_same(module: nn.Module, kernel: RotaryKernel, args: tuple, kwargs: dict) -> bool:
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    leaves = [hidden_states.requires_grad_(), *(one for one in module.parameters() if one.requires_grad)]
    forward = type(module).forward
    expected = forward(module, *args, **kwargs)
    if not _same(expected, kernel.method(forward, rotary_reference)(module, *args, **kwargs)):
        return False
    ours = kernel.method(forward)(module, *args, **kwargs)
    wanted, found = (_gradients(result, leaves) for result in (expected, ours))
    return all(
        (a is None) == (b is None) and (a is None or (a - b).abs().max() <= _SLACK * a.abs().max())
        for a, b in zip(wanted, found, strict=True)
    )


def _gradients(result: object, leaves: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(6)
    grads = [torch.randn(out.shape, generator=generator) for out in outs]
    return torch.autograd.grad(outs, leaves, grads, allow_unused=True)
