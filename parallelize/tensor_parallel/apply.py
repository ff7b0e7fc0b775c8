"""Carry a tensor-parallel plan out on a model, in place: parameters become DTensors, forwards compute locally.

`distribute.py` cuts the parameters, `local.py` lets a forward see this rank's part of them, `styles.py` has what
modules communicate. Here stands which module gets what.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from parallelize.tensor_parallel.distribute import distribute_parameters
from parallelize.tensor_parallel.local import (
    LocalValue,
    compute_locally,
    on_first_rank,
    own_heads,
    own_part,
    shared_heads,
    summed,
)
from parallelize.tensor_parallel.plan import Split, TensorPlan
from parallelize.tensor_parallel.randomness import ForkedRandomness
from parallelize.tensor_parallel.sequence import SequenceShards, Stack
from parallelize.tensor_parallel.styles import (
    enter_region,
    join_features,
    leave_region,
    look_up_vocabulary,
    norm_over_heads,
)


def apply_tensor_parallel(
    model: nn.Module,
    plan: TensorPlan,
    mesh: DeviceMesh,
    *,
    layers: Iterable[str],
    sequence_parallel: bool,
    has_dropout: bool = False,
    stacks: Sequence[Stack] = (),
) -> None:
    """Split `model` over the 1-D `mesh` as `plan` says, in place.

    layers: names of the decoder layers. stacks: which of them run one after another; none given means each list from
    its first to its last. Real parameters are cut where they are (every rank holds the same model); those on the meta
    device stay there. Tied parameters stay tied. has_dropout: whether random numbers are drawn in training, which then
    differ between ranks where their parts do. Raises a ValueError that names every parameter about which the plan says
    nothing.
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
        for stack in stacks or _whole_lists(layers):
            modules = [model.get_submodule(name) for name in stack.layers]
            sequence.install(modules, plan.sequence_arguments, is_handed_on=stack.is_handed_on)
            if randomness is not None:
                layer_list = stack.layers[0].rpartition(".")[0]
                randomness.leave_after(model.get_submodule(layer_list.rpartition(".")[0]))


def _whole_lists(layers: list[str]) -> list[Stack]:
    """Each list of layers is run from its first to its last layer."""
    lists: dict[str, list[str]] = {}
    for name in layers:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    return [Stack(tuple(names), is_handed_on=False) for names in lists.values()]


def check_complete(model: nn.Module, plan: TensorPlan) -> None:
    """Every parameter has a decision, the same one where modules share it, and every decision belongs to something."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones under each of their names
    undecided = [name for name in parameters if plan.split_of(name) is None]
    if undecided:
        raise ValueError(
            f"parallelism.tensor_parallel_plan: nothing is said about {', '.join(undecided[:5])}"
            f"{' ...' if len(undecided) > 5 else ''}. Every module with weights needs a style; add "
            f'"{undecided[0].rpartition(".")[0]}" = "replicate" if every rank may compute it whole.'
        )
    first_names: dict[int, str] = {}
    for name, parameter in parameters.items():
        first = first_names.setdefault(id(parameter), name)
        styles = [plan.split_of(tied).style for tied in (first, name)]
        if styles[0] != styles[1]:
            raise ValueError(
                f"parallelism.tensor_parallel_plan: {first} is {styles[0]} and {name} is {styles[1]}, but they are one "
                "parameter. Give both modules the same style."
            )
    modules = {name for name, _ in model.named_modules()}
    if unknown := sorted({*plan.splits, *plan.regions} - parameters.keys() - modules):
        raise ValueError(f"parallelism.tensor_parallel_plan: the model has no {', '.join(unknown[:5])}.")


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
            return shared_heads(split.segments, split.output_dim(name.rpartition(".")[2]), group)
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
