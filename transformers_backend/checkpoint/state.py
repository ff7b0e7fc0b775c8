"""What a checkpoint holds of a run, and how it is put back: model, optimizers, schedulers, random numbers.

Keys: `model` and `optimizer` by Hugging Face parameter name (sharded tensors, which torch.distributed.checkpoint lays
out anew for any mesh; fused ones in Transformers' order, see `planners.py`), `schedulers` and `data_rank_N` as JSON,
`random_rank_N`, `step`. N is a data rank: ranks that differ only in tensor parallelism have the same position and the
same random state, which is saved once. Stages of a pipeline draw different random numbers, and so do ranks that share
sequences, so that there the keys are `random_rank_N_pipeline_P`, `random_rank_N_context_C`, or with both at the end.
Each rank of a pipeline saves what it has of the rest; what several have is written once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from parallelize.tensor_parallel.packing import Packing, packing_of
from transformers_backend.model import HFTransformerModel
from transformers_backend.weights import named_tensors

DATA_KEY, RANDOM_KEY = "data_rank_", "random_rank_"  # both followed by the data rank
_STATE = "state."  # begins torch's keys of what an optimizer holds of a parameter
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def get_model_state(model: HFTransformerModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; tied ones are there once, under the first of their names."""
    return _once(named_tensors(model.hf_model))


def get_whole_model_state(model: HFTransformerModel) -> dict[str, torch.Tensor]:
    """What `get_model_state` gives of the model on one rank, on the meta device: the same on every rank."""
    return _once(named_tensors(model.blueprint))


def _once(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first_names: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors.items() if first_names.setdefault(id(tensor), name) == name}


def random_key(model: HFTransformerModel) -> str:
    """Under which this rank's random state is saved."""
    stage = 0 if model.pipelined is None else model.pipelined.rank
    part = 0 if model.mesh is None else model.mesh.get_local_rank("cp")
    return _random_key(model, model.data_rank, stage, part)


def random_keys(model: HFTransformerModel) -> set[str]:
    """Those of all ranks."""
    dims = model.dims
    places = itertools.product(range(dims.data_parallel_size), range(dims.pp), range(dims.cp))
    return {_random_key(model, *place) for place in places}


def _random_key(model: HFTransformerModel, data_rank: int, pipeline_rank: int, context_rank: int) -> str:
    key = f"{RANDOM_KEY}{data_rank}"
    if model.dims.pp > 1:
        key += f"_pipeline_{pipeline_rank}"
    return key if model.dims.cp == 1 else f"{key}_context_{context_rank}"


def find_packings(model: HFTransformerModel, state: dict[str, Any]) -> dict[str, Packing]:
    """{key of the flattened `state`: how that tensor is packed}, of fused parameters and what optimizers hold of them.

    state: whole or in parts. What an optimizer holds of a parameter is packed as it is where it has its shape.
    """
    packed = {
        name: (tensor.shape, packing)
        for name, tensor in named_tensors(model.hf_model).items()
        if (packing := packing_of(model.hf_model, name)) is not None
    }
    packings = {f"model.{name}": packed[name][1] for name in state.get("model", {}) if name in packed}
    for key, value in state.get("optimizer", {}).items():
        shape, packing = packed.get(_name(key), (None, None))
        if key.startswith(_STATE) and isinstance(value, torch.Tensor) and value.shape == shape:
            packings[f"optimizer.{key}"] = packing
    return packings


def without_live_buffers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with copies of its buffers: unlike parameters, a forward may change them."""
    return {
        name: tensor if isinstance(tensor, torch.nn.Parameter) else tensor.detach().clone()
        for name, tensor in state.items()
    }


def get_optimizer_state(model: HFTransformerModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Empty on a rank of a pipeline that trains none of its parameters."""
    return get_optimizer_state_dict(model.hf_model, optimizers, options=_OPTIONS) if optimizers else {}


def blank_optimizer_state(
    model: HFTransformerModel, optimizers: Sequence[torch.optim.Optimizer], saved: Collection[str]
) -> dict[str, Any]:
    """Drop what the optimizers hold; returns new state to be filled, of those parameters that a checkpoint has it of.

    saved: keys of the checkpoint's optimizer state. A parameter that never got a gradient has none, and in a run that
    skipped every step so far no parameter has.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
        optimizer.state.clear()  # or torch would not make it for every parameter
    with_state, state = _names_with_state(saved), get_optimizer_state(model, optimizers)
    return {key: value for key, value in state.items() if not key.startswith(_STATE) or _name(key) in with_state}


def set_optimizer_state(
    model: HFTransformerModel, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Take over running means and counts; learning rate, weight decay ... stay those of this job.

    state: what `blank_optimizer_state` returned, filled. Parameters that it leaves out have no state afterwards.
    """
    if not optimizers:
        return
    chosen = [_hyperparameters(optimizer) for optimizer in optimizers]
    everything = get_optimizer_state(model, optimizers) | state  # torch wants all parameters
    set_optimizer_state_dict(model.hf_model, optimizers, optim_state_dict=everything, options=_OPTIONS)
    with_state = _names_with_state(state)
    kept = {id(tensor) for name, tensor in named_tensors(model.hf_model).items() if name in with_state}
    for optimizer, groups in zip(optimizers, chosen, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
        for parameter in [parameter for parameter in optimizer.state if id(parameter) not in kept]:
            del optimizer.state[parameter]


def _names_with_state(keys: Iterable[str]) -> set[str]:
    return {_name(key) for key in keys if key.startswith(_STATE)}


def _name(key: str) -> str:
    """The parameter of a key state.<parameter>.<what>."""
    return key.removeprefix(_STATE).rpartition(".")[0]


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def get_schedulers_state(schedulers: Sequence[torch.optim.lr_scheduler.LambdaLR]) -> str:
    return json.dumps([scheduler.state_dict() for scheduler in schedulers])


def set_schedulers_state(schedulers: Sequence[torch.optim.lr_scheduler.LambdaLR], state: str) -> None:
    """Put this job's schedules at the saved step; learning rates are what the schedules say there."""
    step = json.loads(state)[0]["last_epoch"]  # of all; a rank of a pipeline may have another number of optimizers
    for scheduler in schedulers:
        scheduler.last_epoch = step
        scheduler._step_count = step + 1
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def get_random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
