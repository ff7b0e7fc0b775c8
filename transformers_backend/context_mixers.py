"""Token-mixing modules that run on the whole sequence, for models to which the ring is closed.

Some models do not attend through Transformers' attention interface, make masks or positions of their own, or mix
tokens by a recurrence or a convolution. They are called with the whole sequence, so that everything that they make of
it (masks, positions, rotary tables) is what it always is. Only the hidden states in and between the layers are cut:

    tokens -> embedding -> own part -> norm -> gather -> mixer -> own part -> MLP -> ... -> spread -> norm -> own part
     whole      whole        part      part    whole     whole      part     part            whole    whole    part

Every rank computes the mixer for all tokens, and of its result keeps its own: exact for any mixer, but neither the work
nor the memory of these modules is divided among the ranks. A weight's gradient on one rank is what comes through its
own part of the output, so that the sum over ranks, which FSDP2 takes, is the gradient.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from parallelize.context_parallel.layout import SequenceLayout
from parallelize.context_parallel.whole import gather_sequence, own_part, spread
from transformers_backend.decoder import Decoder

_PERTURBED = 3  # the token that is changed to see what else changes
_MIXED = 1e-6  # change of another token's output, relative to the largest value, from which tokens are mixed


class GatheredMixers:
    """The mixers of one model, whose layers have parts of sequences."""

    def __init__(
        self, hf_model: PreTrainedModel, decoder: Decoder, names: Sequence[str], group: dist.ProcessGroup
    ) -> None:
        """Change the mixers, before anything else wraps them; outside `sharing` they run as before."""
        self.names = tuple(names)
        self._model, self._decoder = hf_model, decoder
        self._group, self._rank = group, dist.get_rank(group)
        self._layout: SequenceLayout | None = None
        self._shape: torch.Size | None = None  # of the hidden states in the layers now
        for name in self.names:
            self._gather(name, hf_model.get_submodule(name))

    def install(self) -> None:
        """Cut the hidden states before the first layer; call it once, after all else that wraps or hooks on layers.

        After the last layer they get their whole length back, which some models rely on, and the base's output is cut.
        """
        first, last = (self._model.get_submodule(self._decoder.layers[place]) for place in (0, -1))
        first.register_forward_pre_hook(self._before_first, with_kwargs=True, prepend=True)
        last.register_forward_hook(self._after_last)
        self._model.get_submodule(self._decoder.base).register_forward_hook(self._after_base)

    @contextlib.contextmanager
    def sharing(self, layout: SequenceLayout) -> Iterator[None]:
        """Within the block the model runs on whole sequences, and its layers on parts of them."""
        self._layout = layout
        try:
            yield
        finally:
            self._layout = None

    def _gather(self, name: str, mixer: nn.Module) -> None:
        plain_forward = mixer.forward

        @functools.wraps(plain_forward)
        def forward(*args, **kwargs):
            if self._layout is None:
                return plain_forward(*args, **kwargs)
            if not any(map(self._is_part, tree_leaves((args, kwargs)))):
                raise ValueError(f"{name} is given no hidden states of this rank's part of the sequence")
            args, kwargs = tree_map_only(torch.Tensor, self._whole, (args, kwargs))
            return _change_first(plain_forward(*args, **kwargs), self._own)

        mixer.forward = forward

    def _is_part(self, argument: object) -> bool:
        """Whether an argument goes with the hidden states; all others are of the whole sequence, or of no sequence."""
        return isinstance(argument, torch.Tensor) and argument.is_floating_point() and argument.shape == self._shape

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather_sequence(tensor, self._layout, self._group) if self._is_part(tensor) else tensor

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        return own_part(whole, self._layout, self._rank)

    def _before_first(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._layout is None:
            return None
        whole = args[0] if args else kwargs["hidden_states"]
        if whole.dim() != 3 or whole.shape[1] != self._layout.length:
            raise ValueError(
                f"{type(self._model).__name__} calls its layers with hidden states of shape {tuple(whole.shape)} for "
                f"sequences of {self._layout.length} tokens, which context parallelism cannot cut"
            )
        part = self._own(whole)
        self._shape = part.shape
        return ((part, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": part})

    def _after_last(self, layer: nn.Module, args: tuple, output):
        if self._layout is None:
            return None
        return _change_first(output, lambda part: spread(part, self._layout, self._rank))

    def _after_base(self, base: nn.Module, args: tuple, output):
        if self._layout is None:
            return None
        if isinstance(output, (tuple, list)):
            return _change_first(output, self._own)
        return type(output)(**{**output, "last_hidden_state": self._own(output.last_hidden_state)})


def _change_first(output, change):
    """What a module returned, with its hidden states changed: the output itself, or the first of several."""
    if isinstance(output, torch.Tensor):
        return change(output)
    return type(output)([change(output[0]), *output[1:]])  # a tuple or a list, by the model's convention


@torch.no_grad()
def find_mixers(twin: PreTrainedModel, decoder: Decoder, input_ids: torch.Tensor) -> tuple[str, ...]:
    """Names of the outermost modules within the layers of a twin that mix tokens; of layers that do so themselves, too.

    Found by changing one token of what enters a layer: a mixer is a module in whose input only this token changes, and
    in whose output others do.
    """
    calls: dict[str, tuple[tuple, dict]] = {}

    def remember(name: str, args: tuple, kwargs: dict) -> None:
        calls[name] = (args, kwargs) if args else ((kwargs.pop("hidden_states"),), kwargs)

    hooks = [
        twin.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: remember(name, args, dict(kwargs)), with_kwargs=True
        )
        for name in decoder.layers
    ]
    try:
        twin(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, ((hidden_states, *args), kwargs) in calls.items():
        changed = hidden_states.clone()
        changed[:, _PERTURBED] += torch.linspace(-1, 1, changed.shape[-1])  # no constant: a LayerNorm takes it away
        layer = twin.get_submodule(name)
        # Copies, because some layers (ctrl's) change their input in place.
        before = _record(layer, hidden_states.clone(), args, kwargs)
        after = _record(layer, changed, args, kwargs)
        found += [f"{name}.{inner}" if inner else name for inner in _mixing(before, after, hidden_states.shape[1])]
    return tuple(found)


Record = dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]
"""By name of a module within a layer ("" is the layer), the tensors that it got and those that it returned."""


def _record(layer: nn.Module, hidden_states: torch.Tensor, args: Sequence, kwargs: dict) -> Record:
    inputs, record = {}, {}

    def begin(name: str, *given: object) -> None:
        inputs[name] = _copies(given)

    def end(name: str, output: object) -> None:
        record[name] = (inputs[name], _copies(output))

    hooks = []
    for name, module in layer.named_modules():
        hooks += [
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: begin(name, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(lambda module, args, output, name=name: end(name, output)),
        ]
    try:
        layer(hidden_states, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return record


def _copies(tree: object) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _mixing(before: Record, after: Record, length: int) -> list[str]:
    """The outermost modules in a layer that mix tokens, or the layer itself where only its own forward does."""
    mixing: list[str] = []
    for name in sorted(before, key=lambda name: name.count(".")):  # outer ones first
        if not name or _is_within(name, mixing) or name not in after:
            continue
        (given, returned), (given_after, returned_after) = before[name], after[name]
        is_mixed = [_changes_elsewhere(*pair, length) for pair in zip(given, given_after, strict=True)]
        if not any(is_mixed) and any(
            tensor.dim() == 3 and _changes_elsewhere(tensor, other, length)
            for tensor, other in zip(returned, returned_after, strict=True)
        ):
            mixing.append(name)
    if mixing:
        return mixing
    (_, (output, *_)), (_, (output_after, *_)) = before[""], after[""]
    return [""] if _changes_elsewhere(output, output_after, length) else []


def _is_within(name: str, outer: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in outer)


def _changes_elsewhere(before: torch.Tensor, after: torch.Tensor, length: int) -> bool:
    """Whether two tensors differ at another token than the perturbed one; what has no token for each place, at all."""
    if not before.is_floating_point() or not before.numel():
        return not torch.equal(before, after)
    change = (after - before).abs().nan_to_num()
    if before.dim() == 3 and before.shape[1] == length:
        change = torch.cat([change[:, :_PERTURBED], change[:, _PERTURBED + 1 :]], 1)
    return bool(change.max() > _MIXED * before.nan_to_num().abs().max())
