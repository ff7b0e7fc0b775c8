"""Finds modules that compute down(act(gate(x)) * up(x)), by what their children are given and return on the twin.

    module of the twin -> one run of it alone, its children's inputs and outputs kept
        -> which child's output (or half of one) times which activation of which other is what the next child is given
        -> GatedActivationKernel, proven: equal outputs in fp32 and bf16, in training and in evaluation, equal gradients

No list of class names: a module matches if its children are called as the kernel would call them, and nothing else that
it does shows in its output. What holds of a module of the twin holds of the model's modules of the same kind: the same
class, the same attributes except for sizes, the same activation.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from parallelize.kernels.gated_activation import ACTIVATIONS, activate, gated_activation_reference
from parallelize.kernels.replace import GatedActivationKernel, has_hooks, has_own_forward
from transformers_backend.proof import MODEL_ERRORS

_TOKENS = 7  # that the twin and its modules are tried on
_SLACK = 1e-5  # of gradients in fp32, relative to the largest
# Of inputs: where activations are nearly linear, bend, and are 0 or linear; and beyond what anybody clamps to.
_SIZES = (0.03, 1.0, 20.0, 1e4)


@dataclass(frozen=True, eq=False)
class _Call:
    child: str
    given: torch.Tensor
    returned: torch.Tensor


def gate_kernels(
    hf_model: PreTrainedModel, twin: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, GatedActivationKernel | str]]:
    """Every module of the model that has an activation as its child: its name, and its kernel or why it has none."""
    found: dict[tuple, GatedActivationKernel | str] = {}
    for module, width in _modules_of_one_tensor(twin):
        if kind := gate_kind(module):
            kernel = find_gate_kernel(module, width)
            # Two modules that seem of one kind and are not: then nothing is known of the kind.
            found[kind] = kernel if found.get(kind, kernel) == kernel else "computes now this, now that"
    classes = {kind[0] for kind in found}
    for name, module in hf_model.named_modules():
        if type(module) in classes and (kind := gate_kind(module)):
            kernel = found.get(kind, "is of a kind that its small copy lacks")
            if not isinstance(kernel, str) and _is_changed(module, kernel):
                kernel = "has hooks, or a forward that is not its class's"
            if not isinstance(kernel, str) or kind[-1]:
                yield name, module, kernel


def gate_kind(module: nn.Module) -> tuple | None:
    """What tells apart modules that compute differently; None for modules of fewer than two children."""
    children = dict(module.named_children())
    if len(children) < 2:
        return None
    sizes = {size * factor for parameter in module.parameters() for size in parameter.shape for factor in (1, 2)}
    sizes |= {size // 2 for size in sizes}
    leaves = [
        (name, type(child), _settings(child, sizes))
        for name, child in children.items()
        if not isinstance(child, nn.Dropout) and not list(child.children()) and not list(child.parameters())
    ]
    return type(module), _settings(module, sizes), tuple(children), tuple(leaves)


def _settings(module: nn.Module, sizes: set[int]) -> tuple:
    """Plain attributes without sizes, and which functions it holds."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str))
        and not (type(value) is int and value in sizes)
        and key != "training"  # tried both ways
    }
    functions = {
        key: _identity(value) for key, value in vars(module).items() if key != "forward" and _is_function(value)
    }
    return tuple(sorted((key, repr(value)) for key, value in (plain | functions).items()))


def _is_function(value: object) -> bool:
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial))


def _identity(function: Callable) -> tuple:
    if isinstance(function, functools.partial):
        return (*_identity(function.func), repr(function.args), repr(function.keywords))
    return (function.__module__, function.__qualname__)


def _is_changed(module: nn.Module, kernel: GatedActivationKernel) -> bool:
    """Whether its forward, or the child that the kernel does not call any more, was given something else to do."""
    skipped = [module.get_submodule(kernel.skipped)] if kernel.skipped else []
    return any(map(has_own_forward, (module, *skipped))) or any(map(has_hooks, skipped))


def _modules_of_one_tensor(twin: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Modules that are called with hidden states alone, and the width of those."""
    seen: dict[nn.Module, int] = {}

    def keep(module, args, kwargs) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            seen[module] = args[0].shape[-1]

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in twin.modules()]
    try:
        with torch.no_grad():
            twin(input_ids=torch.arange(2 * _TOKENS).view(2, _TOKENS) % twin.config.vocab_size, use_cache=False)
    except MODEL_ERRORS:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.items())


def find_gate_kernel(module: nn.Module, width: int) -> GatedActivationKernel | str:
    """The kernel of a small module on the CPU whose input has `width` columns, or why it has none.

    The module is left as it is.
    """
    if any(True for _ in module.buffers(recurse=False)):
        return "has a buffer of its own"  # whose values in the model nobody knows
    one = copy.deepcopy(module)
    x = torch.randn(2, _TOKENS, width, generator=torch.Generator().manual_seed(3))
    try:
        with torch.no_grad():
            returned, calls = _children_calls(one, x)
            for kernel in _candidates(x, returned, calls):
                return (
                    kernel
                    if _computes_the_same(one, kernel, width)
                    else "does more than its children, a dropout for example"
                )
    except MODEL_ERRORS:
        pass
    return "is no gated activation"


def _children_calls(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[_Call]]:
    """What the module returns, and the calls of its children in the order in which they ended."""
    calls, handles = [], []
    for name, child in module.named_children():

        def keep(child, args, returned, name=name) -> None:
            calls.append(_Call(name, args[0].clone(), returned.clone()))

        handles.append(child.register_forward_hook(keep))
    try:
        return module(x), calls
    finally:
        for handle in handles:
            handle.remove()


def _candidates(x: torch.Tensor, returned: torch.Tensor, calls: Sequence[_Call]) -> Iterator[GatedActivationKernel]:
    if len({call.child for call in calls}) < len(calls):
        return
    producers = [call for call in calls if torch.equal(call.given, x)]
    rest = [call for call in calls if not torch.equal(call.given, x)]
    forms = {1: ("gate up", "up gate", "gate"), 2: ("gate up", "up gate")}.get(len(producers), ())
    for form in forms:
        # Without up, torch computes all but the squared ReLU by one kernel itself.
        for activation in ("relu2",) if form == "gate" else ACTIVATIONS:
            names = tuple(call.child for call in producers)
            kernel = GatedActivationKernel(activation, names, form, (), None)
            gate, up = kernel.gate_and_up([call.returned for call in producers])
            if up is not None and gate.shape != up.shape:
                continue
            product = gated_activation_reference(gate, up, activation)
            activated = activate(gate, activation)
            skipped = [call for call in rest if torch.equal(call.given, gate) and torch.equal(call.returned, activated)]
            chain = [call for call in rest if call not in skipped]
            if len(skipped) <= 1 and chain and _is_chain(product, chain, returned):
                child = skipped[0].child if skipped else None
                yield GatedActivationKernel(activation, names, form, tuple(call.child for call in chain), child)


def _is_chain(value: torch.Tensor, chain: Sequence[_Call], returned: torch.Tensor) -> bool:
    """Whether the calls hand `value` on from one to the next, and the last one's output is what is returned."""
    for call in chain:
        if not torch.equal(value, call.given):
            return False
        value = call.returned
    return torch.equal(value, returned)


@torch.enable_grad()
def _computes_the_same(module: nn.Module, kernel: GatedActivationKernel, width: int) -> bool:
    for dtype, training in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        one = copy.deepcopy(module).to(dtype).train(training)
        generator = torch.Generator().manual_seed(4)
        for size in _SIZES:
            x = (torch.randn(2, _TOKENS, width, generator=generator) * size).to(dtype).requires_grad_()
            with _NoDropout(one) as functions:
                expected = one(x)
            found = kernel.reference(one, x)
            if functions.has_dropout or found.dtype != expected.dtype or not torch.equal(found, expected):
                return False
            if dtype == torch.float32 and not _same_gradients(one, kernel, x, expected, generator):
                return False
    return True


def _same_gradients(module, kernel, x, expected, generator) -> bool:
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    grad_out = torch.randn(expected.shape, generator=generator)
    wanted = torch.autograd.grad(expected, leaves, grad_out, allow_unused=True)
    ours = torch.autograd.grad(kernel.forward(module, x), leaves, grad_out, allow_unused=True)
    for a, b in zip(wanted, ours, strict=True):
        if (a is None) != (b is None) or (a is not None and (a - b).abs().max() > _SLACK * a.abs().max()):
            return False
    return True


class _NoDropout(TorchFunctionMode):
    """Sees a dropout of the module's own, which does nothing on the twin, where probabilities are 0."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.has_dropout = False
        self._inside = 0
        self._module, self._handles = module, []

    def __enter__(self):
        for child in self._module.children():
            self._handles.append(child.register_forward_pre_hook(lambda *_: self._step(1)))
            self._handles.append(child.register_forward_hook(lambda *_: self._step(-1)))
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def _step(self, by: int) -> None:
        self._inside += by

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self._inside and "dropout" in str(getattr(function, "__name__", function)):
            self.has_dropout = True
        return function(*args, **(kwargs or {}))
