"""From the meta device to initialised weights, without ever holding the full model.

A `blueprint` (the same model, unsharded, on the meta device) is initialised by Transformers' own `_init_weights`,
one group of parameters after another: the group's parameters are made real, everything else stays meta (where
initialisation costs nothing), and each rank keeps its own part of the result. Every group has a seed of its own, so
the weights depend on the seed and the device type only, not on the number of ranks.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from parallelize.tensor_parallel.packing import packing_of
from transformers_backend.decoder import Decoder
from transformers_backend.weights.shards import fill_local, named_tensors

logger = logging.getLogger(__name__)


def allocate(model: nn.Module, device: torch.device, *, buffer_device: torch.device) -> None:
    """Give every meta parameter and buffer of `model` uninitialised memory; tied ones stay tied.

    device: where parameters are kept (the host under CPU offload). buffer_device: where the model computes.
    """
    tied = _shared_parameters(model)
    model.to_empty(device=device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(buffer_device)
    for (first_owner, first_name), *others in tied:
        for owner, name in others:
            owner._parameters[name] = first_owner._parameters[first_name]


def _shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [owners for owners in places.values() if len(owners) > 1]


def init_weights(
    model: PreTrainedModel, blueprint: PreTrainedModel, decoder: Decoder, *, device: torch.device, seed: int
) -> None:
    """Initialise an allocated (sharded) `model` with the architecture's own scheme.

    A stage of a pipeline has some of the blueprint's parameters only, and gets the same values as the whole model.

    The peak beside the model's shards is the largest group: one decoder layer, or one embedding table. Random numbers
    are drawn on `device`, so a CPU and a GPU start from different weights.
    """
    targets = named_tensors(model)
    init_buffers(model, blueprint, device=device)
    names = [name for name, _ in blueprint.named_parameters()]
    left: list[str] = []
    for index, group in enumerate(group_by_layer(names, decoder)):
        if targets.keys().isdisjoint(group):
            continue
        # A prime far above any number of groups, so that runs with neighbouring seeds share no group's seed.
        drawn = _initialised(blueprint, group, device, seed * 1_000_003 + index)
        left += _undefined(drawn)
        for name, full in drawn.items():
            fill_local(targets[name], lambda region, full=full: full[region], packing_of(model, name))
    for name, full in _constructed(blueprint, left, seed).items():
        fill_local(targets[name], lambda region, full=full: full[region], packing_of(model, name))


def init_buffers(model: nn.Module, blueprint: PreTrainedModel, *, device: torch.device) -> None:
    """Fill every buffer (rotary frequencies, masks ...), persistent or not; `to_empty` left them undefined."""
    buffers = dict(model.named_buffers())
    computed = _initialised(blueprint, [name for name, _ in blueprint.named_buffers()], device, seed=0)
    computed |= _constructed(blueprint, [name for name in _undefined(computed) if name in buffers], seed=0)
    for name, buffer in buffers.items():
        buffer.copy_(computed[name])


def _undefined(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that `_init_weights` left as they were allocated: `_initialised` allocates NaN."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any()]


def _constructed(blueprint: PreTrainedModel, names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Tensors that a model sets in its constructor and not in `_init_weights` (apertus' activations, openai-gpt).

    There is no way to have them but to construct the model, so for these architectures alone every rank holds the
    full model in host memory for a moment.
    """
    if not names:
        return {}
    logger.info("%d tensors are initialised by constructing the full model on the host: %s ...", len(names), names[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(blueprint)._from_config(copy.deepcopy(blueprint.config), dtype=blueprint.dtype)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tensors[name].detach() for name in names}


def group_by_layer(names: list[str], decoder: Decoder) -> list[list[str]]:
    """Names that are handled together: one group a decoder layer, and one for every other parameter.

    Together, because initialising or converting one parameter of a layer may need another of the same layer.
    """
    grouped: dict[str, list[str]] = {}
    for name in names:
        layer = next((layer for layer in decoder.layers if name.startswith(f"{layer}.")), name)
        grouped.setdefault(layer, []).append(name)
    return list(grouped.values())


@torch.no_grad()
def _initialised(
    blueprint: PreTrainedModel, names: list[str], device: torch.device, seed: int
) -> dict[str, torch.Tensor]:
    """Run Transformers' initialisation of `blueprint` with `names` real on `device` and return those tensors."""
    wanted = set(names)
    places = [
        (store, key, name)
        for prefix, module in blueprint.named_modules()
        for store in (module._parameters, module._buffers)
        for key in store
        if (name := f"{prefix}.{key}" if prefix else key) in wanted
    ]
    meta = [store[key] for store, key, _ in places]
    for store, key, _ in places:
        real = torch.empty_like(store[key], device=device)
        if real.is_floating_point():
            real.fill_(float("nan"))  # see `_undefined`
        store[key] = nn.Parameter(real, requires_grad=False) if isinstance(store[key], nn.Parameter) else real
    for module in blueprint.modules():
        module._is_hf_initialized = False  # Transformers' mark for "done already"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        blueprint.initialize_weights()
    drawn = {name: store[key] for store, key, name in places}
    for (store, key, _), original in zip(places, meta, strict=True):
        store[key] = original
    return drawn
