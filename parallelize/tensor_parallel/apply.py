"""Carry a tensor-parallel plan out on a model, in place: parameters become DTensors, forwards compute locally.

One function a style; each says what it communicates, forward and backward. Shapes are those of one rank; T ranks share
a model with hidden size H, `features` of an attention or mlp, and vocabulary V. `b` is the batch, `s` the sequence.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallelize.tensor_parallel.collectives import cut, enter, gather_and_enter, join, leave
from parallelize.tensor_parallel.local import (
    LocalValue,
    compute_locally,
    on_first_rank,
    own_heads,
    own_part,
    shared_heads,
    summed,
)
from parallelize.tensor_parallel.packing import Packing, set_packing
from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan
from parallelize.tensor_parallel.randomness import ForkedRandomness
from parallelize.tensor_parallel.sequence import SequenceShards
from parallelize.tensor_parallel.vocabulary import VocabularyShard, embed, local_padding_index


def apply_tensor_parallel(
    model: nn.Module,
    plan: TensorPlan,
    mesh: DeviceMesh,
    *,
    layers: Iterable[str],
    sequence_parallel: bool,
    has_dropout: bool = False,
) -> None:
    """Split `model` over the 1-D `mesh` as `plan` says, in place.

    layers: names of the decoder layers. Real parameters are cut where
    they are (every rank holds the same model); those on the meta device stay there. Tied parameters stay tied.
    has_dropout: whether random numbers are drawn in training, which then differ between ranks where their parts do.
    Raises a ValueError that names every parameter about which the plan says nothing.
    """
    check_complete(model, plan)
    layers = list(layers)
    group = mesh.get_group()
    randomness = ForkedRandomness(mesh.get_local_rank(), mesh.device_type) if has_dropout else None
    sequence = SequenceShards(group, randomness) if sequence_parallel else None
    of_regions = None if sequence_parallel else randomness
    distribute_parameters(model, plan, mesh)
    for name, module in list(model.named_modules()):
        values = {
            own: _local_value(f"{name}.{own}" if name else own, plan, group, layers=layers, sequence=sequence)
            for own, parameter in module._parameters.items()
            if parameter is not None and not plan.split_of(f"{name}.{own}" if name else own).is_direct
        }
        if values:
            _compute(module, values, plan.splits.get(name), group, sequence, of_regions)
    for name, region in plan.regions.items():
        enter_region(model.get_submodule(name), region, group, sequence, of_regions)
    for layer in layers:
        direct = {
            name: _local_value(f"{layer}.{name}", plan, group, layers=layers, sequence=sequence)
            for name, _ in model.get_submodule(layer).named_parameters()
            if plan.split_of(f"{layer}.{name}").is_direct
        }
        if direct:
            compute_locally(model.get_submodule(layer), direct)
    if of_regions is not None:
        for layer in layers:
            of_regions.leave_after(model.get_submodule(layer))
    if sequence is not None:
        for layer_list, names in _stacks(layers).items():
            sequence.install([model.get_submodule(name) for name in names], plan.sequence_arguments)
            if randomness is not None:
                randomness.leave_after(model.get_submodule(layer_list.rpartition(".")[0]))


def _stacks(layers: list[str]) -> dict[str, list[str]]:
    """{list of layers: its layers}; each list is run from its first to its last layer."""
    stacks: dict[str, list[str]] = {}
    for name in layers:
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    return stacks


def check_complete(model: nn.Module, plan: TensorPlan) -> None:
    """Every parameter has a decision, the same one where modules share it, and every decision belongs to something."""
    own = [
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]  # tied ones under each of their names
    undecided = [name for name, _ in own if plan.split_of(name) is None]
    if undecided:
        raise ValueError(
            f"parallelism.tensor_parallel_plan: nothing is said about {', '.join(undecided[:5])}"
            f"{' ...' if len(undecided) > 5 else ''}. Every module with weights needs a style; add "
            f'"{undecided[0].rpartition(".")[0]}" = "replicate" if every rank may compute it whole.'
        )
    first_names: dict[int, str] = {}
    for name, parameter in own:
        first = first_names.setdefault(id(parameter), name)
        styles = [plan.split_of(tied).style for tied in (first, name)]
        if styles[0] != styles[1]:
            raise ValueError(
                f"parallelism.tensor_parallel_plan: {first} is {styles[0]} and {name} is {styles[1]}, but they are one "
                "parameter. Give both modules the same style."
            )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    modules = {name for name, _ in model.named_modules()}
    if unknown := sorted({*plan.splits, *plan.regions} - parameters - modules):
        raise ValueError(f"parallelism.tensor_parallel_plan: the model has no {', '.join(unknown[:5])}.")


# -- where parameters are -------------------------------------------------------------------------------------------


def distribute_parameters(model: nn.Module, plan: TensorPlan, mesh: DeviceMesh) -> None:
    """Replace every parameter by a DTensor on `mesh` that holds this rank's part; no rank sends anything."""
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            split = plan.split_of(f"{prefix}.{name}" if prefix else name)
            if id(parameter) not in done:
                done[id(parameter)] = _distributed(parameter, name, split, mesh)
            module._parameters[name] = done[id(parameter)]
            if (packing := _packing(split, name, mesh.size())) is not None:
                set_packing(module, name, packing)


def _distributed(parameter: nn.Parameter, name: str, split: Split, mesh: DeviceMesh) -> nn.Parameter:
    placement = _placement(split, name, mesh.size())
    full = parameter.detach()
    packing = _packing(split, name, mesh.size())
    if packing is not None:
        full = packing.to_stored(full)
    local = full
    if isinstance(placement, Shard):
        parts = full.tensor_split(_chunk_ends(full.shape[placement.dim], mesh.size()), placement.dim)
        local = parts[mesh.get_local_rank()].clone()  # not a view, which would keep the whole in memory
    if not local.is_meta:
        local = local.to(mesh.device_type)
    distributed = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def _chunk_ends(size: int, ranks: int) -> list[int]:
    """Where DTensor cuts an uneven dimension: chunks of equal size but for the last ones, which may be empty."""
    chunk = -(-size // ranks)
    return [min(rank * chunk, size) for rank in range(1, ranks)]


def _placement(split: Split, name: str, degree: int) -> Placement:
    """Where the parameter `name` of a module with this split is cut."""
    output_dim = 1 if split.is_transposed and name == "weight" else 0
    if split.style == "vocabulary":
        return Shard(0)
    if split.style == "split":
        return Replicate() if split.segments[0].is_shared(degree) else Shard(0)
    if split.style == "colwise":
        return Shard(output_dim)
    if split.style == "rowwise" and name == "weight":
        return Shard(1 - output_dim)
    return Replicate()


def _packing(split: Split, name: str, degree: int) -> Packing | None:
    if split.style not in ("colwise", "rowwise") or len(split.segments) < 2:
        return None
    placement = _placement(split, name, degree)
    if not isinstance(placement, Shard):  # the bias of a rowwise linear
        return None
    return Packing(dim=placement.dim, segments=tuple(segment.size for segment in split.segments), degree=degree)


# -- what modules compute -------------------------------------------------------------------------------------------


def _local_value(
    name: str, plan: TensorPlan, group: dist.ProcessGroup, *, layers: list[str], sequence: SequenceShards | None
) -> LocalValue:
    """How the parameter `name` enters its module's computation, and where its gradient is summed."""
    split, degree = plan.split_of(name), dist.get_world_size(group)
    if split.style == "vocabulary":
        return own_part
    if split.style == "split":
        return own_heads(split.segments[0], group) if split.segments[0].is_shared(degree) else own_part
    if split.style == "colwise":
        if any(segment.is_shared(degree) for segment in split.segments):
            dim = 1 if split.is_transposed and name.endswith(".weight") else 0
            return shared_heads(split.segments, dim, group)
        return own_part
    if split.style == "rowwise":
        return own_part if name.endswith(".weight") else on_first_rank(group)
    if split.style in ("norm_over_heads", "whole"):  # computed whole, with the whole gradient
        return own_part
    in_layer = any(name.startswith(f"{layer}.") for layer in layers)
    in_region = plan.region_of(name) is not None and split.style != "outside"
    partial = in_region or (in_layer and sequence is not None)
    return summed(group) if partial else own_part


def _compute(
    module: nn.Module,
    values: dict[str, LocalValue],
    split: Split | None,
    group: dist.ProcessGroup,
    sequence: SequenceShards | None,
    randomness: ForkedRandomness | None,
) -> None:
    style = split.style if split is not None else "replicate"
    for attribute, value in split.attributes.items() if split is not None else ():
        setattr(module, attribute, value)
    if style == "vocabulary" and isinstance(module, nn.Embedding):
        look_up_vocabulary(module, values, group)
        return
    compute_locally(module, values)
    if style == "rowwise":
        leave_region(module, group, sequence, randomness, is_joined=split.is_joined)
    elif style == "colwise" and (split.is_joined or split.is_gathered):
        join_features(module, split, group)
    elif style == "norm_over_heads":
        norm_over_heads(module, split.segments[0], group)


def leave_region(
    module: nn.Module,
    group: dist.ProcessGroup,
    sequence: SequenceShards | None,
    randomness: ForkedRandomness | None,
    *,
    is_joined: bool = False,
) -> None:
    """Rowwise linear: input (b, s, features / T), weight (H, features / T); the output is one term of a sum.

    With `is_joined` the input is (b, s, features) on every rank, which takes its part (backward: all-gather).

    Forward: all-reduce of (b, s, H), or with sequence parallelism reduce-scatter to (b, s / T, H). Backward: nothing,
    or all-gather of the gradient. "colwise" linears, whose output (b, s, features / T) is a shard, communicate nothing.
    randomness: what was forked at the region's entry; what the module does after its exit is the same on every rank.
    """
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(features: torch.Tensor) -> torch.Tensor:
        term = plain_forward(cut(features, features.dim() - 1, group) if is_joined else features)
        if randomness is not None:
            randomness.leave()
        return leave(term, group) if sequence is None else sequence.leave_region(term)

    module.forward = forward


def enter_region(
    module: nn.Module,
    region: Region,
    group: dist.ProcessGroup,
    sequence: SequenceShards | None,
    randomness: ForkedRandomness | None,
) -> None:
    """Attention, mlp, or first linear: hidden states (b, s, H) come in whole and every rank computes with its part.

    Forward: nothing, or with sequence parallelism all-gather of (b, s / T, H). Backward: all-reduce of the gradient's
    terms (b, s, H), or reduce-scatter. randomness: forked here in training, so that ranks drop numbers of their own.
    """
    if region.is_whole:
        if sequence is not None:
            sequence.compute_whole(module)
        return
    for name, value in region.attributes.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, value)
    if region.config:
        module.config = copy.copy(module.config)
        for name, value in region.config.items():
            setattr(module.config, name, value)
    plain_forward = module.forward
    order = list(inspect.signature(plain_forward).parameters)

    @functools.wraps(plain_forward)
    def forward(*args, **kwargs):
        arguments = {**dict(zip(order, args, strict=False)), **kwargs}
        whole = arguments[order[0]]
        entered = enter(whole, group) if sequence is None else sequence.enter_region(whole)
        if randomness is not None and module.training:
            randomness.enter()

        def own(name: str, value):
            if value is whole:  # CTRL passes its input three times, as queries, keys and values
                return entered
            if name in region.head_arguments and isinstance(value, torch.Tensor):
                return own_heads_of(value, region.head_arguments[name], group)
            return value

        positional = [own(name, value) for name, value in zip(order, args, strict=False)]
        return plain_forward(
            *positional, *args[len(order) :], **{name: own(name, value) for name, value in kwargs.items()}
        )

    module.forward = forward


def own_heads_of(argument: torch.Tensor, heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's heads of a mask or bias (..., heads or batch x heads, queries, keys), or all of one without heads."""
    dim = argument.dim() - 3
    if dim < 0 or argument.shape[dim] % heads:
        return argument
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    by_head = argument.unflatten(dim, (-1, heads))
    return by_head.narrow(dim + 1, rank * (heads // degree), heads // degree).flatten(dim, dim + 1)


def join_features(module: nn.Module, split: Split, group: dist.ProcessGroup) -> None:
    """Colwise linear whose output features (b, s, features) are used together, by statistics over all of them.

    Forward: all-gather of (b, s, features / T). With `is_joined` every rank then computes alike until a rowwise linear
    cuts; backward: own part of the gradient, which is whole. With `is_gathered` every rank goes on with its part of
    another linear; backward: reduce-scatter of the gradient's terms.
    """
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        features = plain_forward(hidden_states)
        return (join if split.is_joined else gather_and_enter)(features, features.dim() - 1, group)

    module.forward = forward


def norm_over_heads(module: nn.Module, segment: Segment, group: dist.ProcessGroup) -> None:
    """A norm over the features of all heads (OLMo 2's of queries and keys): (b, s, features / T) in and out.

    Forward: all-gather of the features, the norm on every rank, own features. Backward: all-gather of the gradient.
    Where ranks share heads, each head counts once in the norm, and gets the gradients of all that share it.
    """
    degree = dist.get_world_size(group)
    sharing = degree // segment.heads if segment.is_shared(degree) else 1
    plain_forward = module.forward

    @functools.wraps(plain_forward)
    def forward(features: torch.Tensor) -> torch.Tensor:
        dim = features.dim() - 1
        whole = join(features, dim, group)
        if sharing == 1:
            return cut(plain_forward(whole), dim, group)
        distinct = whole.unflatten(dim, (segment.heads, sharing, -1)).select(dim + 1, 0).flatten(dim)
        by_head = plain_forward(distinct).unflatten(dim, (segment.heads, -1))
        return cut(by_head.repeat_interleave(sharing, dim).flatten(dim), dim, group)

    module.forward = forward


def look_up_vocabulary(module: nn.Embedding, values: dict[str, LocalValue], group: dist.ProcessGroup) -> None:
    """Embedding whose rows (V / T, H) are this rank's part of the vocabulary; token ids (b, s) are whole.

    Forward: all-reduce of (b, s, H), of which a rank contributes the tokens of its rows. Backward: nothing.
    """
    vocabulary = VocabularyShard.of(module.weight.shape[0], group)
    module.padding_idx = local_padding_index(module.padding_idx, first=vocabulary.first, rows=vocabulary.size)
    plain_forward = module.forward
    # Inside, `module.weight` is the local one.
    module.forward = lambda input_ids: embed(plain_forward, input_ids, first=vocabulary.first, weight=module.weight)
    compute_locally(module, values)
    local_forward = module.forward

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        # Every rank would take such an id for another's and add zeros. Raises at once on a CPU, later on CUDA.
        is_known = (input_ids >= 0) & (input_ids < vocabulary.total)
        torch._assert_async(is_known.all(), f"a token id is outside of the vocabulary of {vocabulary.total}")
        return leave(local_forward(input_ids), group)

    module.forward = forward
