"""What a run of the twin shows about its blocks: which modules run, what feeds what, and where a block ends.

A block is an attention or mlp module of a decoder layer (or the layer itself, for linears that it owns). `trace` runs
the twin once with hooks and follows the gradients' graph backwards; `block.py` derives from it how a block splits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

_REDUCTIONS = ("Mean", "Sum", "Std", "Var", "Norm", "Softmax", "Max", "Topk")  # names of nodes that go over features


@dataclass
class BlockTrace:
    """One block, as it ran (the last time that it ran with gradients)."""

    order: list[str] = field(default_factory=list)
    """Modules with parameters of their own, in the order in which they ran."""
    inputs: dict[str, torch.Size] = field(default_factory=dict)
    """Shape of each one's input."""
    feeders: dict[str, set[str]] = field(default_factory=dict)
    """For each one: those whose outputs reach its input without passing another one."""
    inside: set[str] = field(default_factory=set)
    """Parameters on which the input of the last matrix depends, or that are the last matrix's own."""
    bypasses: bool = False
    """Whether the block's input reaches its output on another way than through the last matrix."""
    reduces: bool = False
    """Whether features are summed up between the linears, outside of modules with parameters (a mean over all)."""
    joined_by: set[str] = field(default_factory=set)
    """Parameters elsewhere on which the input of the last matrix depends, beside the block's input."""
    is_called: bool = True
    """Whether its modules run inside its forward; one whose other methods are called has no entry to hook."""


@dataclass
class Trace:
    blocks: dict[str, BlockTrace]
    token_embeddings: list[str]
    """Embeddings that look up the token ids themselves."""
    direct: set[str]
    """Parameters that get a gradient although their module does not run: other code reads them."""


@dataclass
class _Run:
    name: str
    shape: torch.Size
    feeding: object
    output: object


@torch.enable_grad()
def trace(twin: PreTrainedModel, matrices: dict[str, list[str]], input_ids: torch.Tensor) -> Trace:
    """Run `twin` on `input_ids` (batch, seq). `matrices`: {block: the names of its linears}."""
    recorder = _Recorder(twin, matrices, input_ids)
    try:
        output = twin(input_ids=input_ids, use_cache=False).logits
    finally:
        for handle in recorder.handles:
            handle.remove()
    reached = _leaves(output.grad_fn, set())
    ran = recorder.ran
    return Trace(
        blocks={block: recorder.block(block, names) for block, names in matrices.items()},
        token_embeddings=recorder.token_embeddings,
        direct={
            name
            for name, parameter in twin.named_parameters()
            if id(parameter) in reached
            and is_leaf(twin, name.rpartition(".")[0])
            and name.rpartition(".")[0] not in ran
        },
    )


def is_leaf(model: nn.Module, name: str) -> bool:
    return next(model.get_submodule(name).children(), None) is None


class _Recorder:
    """Hooks on every block and on every module with parameters."""

    def __init__(self, twin: PreTrainedModel, matrices: dict[str, list[str]], input_ids: torch.Tensor) -> None:
        self.twin = twin
        self.input_ids = input_ids
        self.ran: set[str] = set()
        self.token_embeddings: list[str] = []
        self.handles: list = []
        self.open: dict[str, tuple[object, list[_Run]]] = {}  # blocks whose forward is running
        self.closed: dict[str, tuple[object, list[_Run], object]] = {}
        self.uncalled: set[str] = set()  # blocks whose modules ran outside of their forward
        self.block_of = {inner: block for block, names in matrices.items() for inner in names}
        for block in matrices:
            module = twin.get_submodule(block)
            if block not in matrices[block]:
                self.handles.append(module.register_forward_pre_hook(self._enter(block), with_kwargs=True))
                self.handles.append(module.register_forward_hook(self._leave(block)))
                self.block_of.update({f"{block}.{name}": block for name, _ in self._inner(block, matrices)})
        for name, module in twin.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                self.handles.append(module.register_forward_hook(self._run(name), with_kwargs=True))

    def _inner(self, block: str, matrices: dict[str, list[str]]) -> Iterable[tuple[str, nn.Module]]:
        """Modules that belong to `block` and not to another block within it (the layer itself can be one)."""
        for name, module in self.twin.get_submodule(block).named_modules():
            full = f"{block}.{name}"
            others = (other for other in matrices if other != block and other.startswith(f"{block}."))
            if name and not any(full == other or full.startswith(f"{other}.") for other in others):
                yield name, module

    def _enter(self, block: str):
        def hook(module, args, kwargs):
            first = args[0] if args else next(iter(kwargs.values()))
            self.open[block] = (first.grad_fn, [])

        return hook

    def _leave(self, block: str):
        def hook(module, args, output):
            entry, runs = self.open.pop(block)
            first = output if isinstance(output, torch.Tensor) else output[0]
            if first.requires_grad:
                self.closed[block] = (entry, runs, first.grad_fn)

        return hook

    def _run(self, name: str):
        def hook(module, args, kwargs, output):
            self.ran.add(name)
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if isinstance(module, nn.Embedding) and torch.equal(first, self.input_ids):
                self.token_embeddings.append(name)
            block = self.block_of.get(name)
            if block is None or block == name or first is None or not isinstance(output, torch.Tensor):
                return
            if block not in self.open:
                self.uncalled.add(block)
                return
            self.open[block][1].append(_Run(name, first.shape, first.grad_fn, output.grad_fn))

        return hook

    def block(self, block: str, matrices: list[str]) -> BlockTrace:
        if block in self.uncalled or block not in self.closed:
            return BlockTrace(is_called=False)
        entry, runs, output = self.closed[block]
        found = BlockTrace()
        outputs = {run.output: run.name for run in runs}
        for run in runs:
            found.order = [name for name in found.order if name != run.name] + [run.name]
            found.inputs[run.name] = run.shape
            found.feeders[run.name] = _reached(run.feeding, outputs, entry)
        last = next((run for run in reversed(runs) if run.name in matrices), None)
        if last is None:
            return BlockTrace(is_called=False)
        leaves = _leaves(last.feeding, {entry})
        names = {name for name, parameter in self.twin.named_parameters() if id(parameter) in leaves}
        found.joined_by = {name for name in names if not name.startswith(f"{block}.")}
        prefix = f"{last.name}."
        found.inside = names | {name for name, _ in self.twin.named_parameters() if name.startswith(prefix)}
        found.reduces = any(
            any(word in type(node).__name__ for word in _REDUCTIONS)
            for run in runs[1:]
            for node in _walk(run.feeding, lambda node: node in outputs or node is entry)
            if node not in outputs and node is not entry
        )
        found.bypasses = _meets(output, entry, {last.output})
        return found


def _walk(start, stop) -> Iterable:
    """Nodes of the gradients' graph from `start` towards the inputs; those for which `stop` holds are not passed."""
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            stack.extend(parent for parent, _ in node.next_functions)


def _reached(start, outputs: dict, entry) -> set[str]:
    nodes = _walk(start, lambda node: node in outputs or node is entry)
    return {outputs[node] for node in nodes if node in outputs}


def _leaves(start, stops: set) -> set[int]:
    """The ids of the parameters that a gradient arriving at `start` reaches."""
    nodes = _walk(start, lambda node: node in stops)
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def _meets(start, target, stops: set) -> bool:
    return any(node is target for node in _walk(start, lambda node: node in stops or node is target))
