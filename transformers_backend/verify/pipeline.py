"""What the report needs for a pipeline: a twin with layers and a batch with rows for it, and what its ranks hold."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from parallelize.config import ParallelismConfig
from parallelize.pipeline_parallel.schedules import single_stage, stage_count
from transformers_backend.decoder import describe_decoder
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import build_on_meta
from transformers_backend.pipeline_plan import PipelinePlan
from transformers_backend.proof import MODEL_ERRORS
from transformers_backend.verify.report import Report
from transformers_backend.verify.setting import ROWS, model_args_of
from transformers_backend.weights import full_tensor

_LAYERS_PER_STAGE = 2  # so that hidden states also go from layer to layer within a stage


def minimum_layers(parallelism: ParallelismConfig) -> int | None:
    """How many layers a twin needs at least, for `build_twin`; None without a pipeline."""
    degree = parallelism.pipeline_parallel_degree
    if degree == 1:
        return None
    stages = degree if single_stage(parallelism.pipeline_parallel_schedule) else 2 * degree
    return _LAYERS_PER_STAGE * stages


def refused_for_layers(name: str, parallelism: ParallelismConfig) -> Report | None:
    """The report of a model with fewer layers than the pipeline has stages, which no process need be started for.

    What else may be wrong with it is found out where it is run.
    """
    degree = parallelism.pipeline_parallel_degree
    if degree == 1:
        return None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        args = model_args_of(name)
        hf_config, model_class = args.resolve()
        layers = len(describe_decoder(build_on_meta(hf_config, model_class, args)).layers)
    except (*MODEL_ERRORS, OSError):
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)
    try:
        stage_count(parallelism.pipeline_parallel_schedule, degree, layers)
    except ValueError as error:
        return Report(name, "refused", str(error), model_class.__name__)
    return None


def rows_of_a_call(parallelism: ParallelismConfig) -> int:
    """Rows of one data rank's batch in one `forward_backward`, enough for every schedule's micro-batches.

    Those are `pipeline_parallel_microbatch_size` rows; two a pipeline rank keep all ranks busy for a while.
    """
    degree = parallelism.pipeline_parallel_degree
    return ROWS if degree == 1 else 2 * degree * parallelism.pipeline_parallel_microbatch_size


def seen_gradients(model: HFTransformerModel) -> dict[str, torch.Tensor]:
    """{name: full gradient} of the whole model, and of what this rank holds its own copy, not another rank's.

    All copies of a parameter that several pipeline ranks hold must be right, and `full_gradients` has one of them. A
    parameter that is held here without a gradient has none, whatever other ranks have.
    """
    here = {name: parameter.grad for name, parameter in model.hf_model.named_parameters()}
    own = {
        name: full_tensor(model.hf_model, name, grad).to("cpu", copy=True)
        for name, grad in here.items()
        if grad is not None
    }
    return {name: grad for name, grad in model.full_gradients().items() if name not in here} | own


def layers_per_stage(plan: PipelinePlan) -> str:
    """For example "2 + 2"."""
    return " + ".join(str(len(layers)) for layers in plan.split.stages)


def held_by_several(plan: PipelinePlan, hf_model: nn.Module) -> str:
    """The modules outside the layers whose weights several ranks hold, by the last part of their names.

    hf_model: the whole model. More than two ranks are counted: "embed_tokens, embed_positions x 4".
    """
    ranks = {}
    for name, _ in hf_model.named_parameters():
        module = name.rpartition(".")[0].rpartition(".")[2]
        ranks[module] = max(ranks.get(module, 0), len(plan.ranks_of(name)))
    return ", ".join(module + f" x {count}" * (count > 2) for module, count in ranks.items() if count > 1) or "-"
