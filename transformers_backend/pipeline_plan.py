"""How a model is cut into the stages of a pipeline: which layers each gets, where it runs, what it holds.

Found out before the model is changed (`HFTransformerModel.parallelize`), and shown by scripts/plan_pipeline.py. Costs
come from `flops.py`, the balance from `parallelize/pipeline_parallel/split.py`; the tall twin says where a model may be
cut and proves the cut (`stage_proof.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from parallelize.config import ParallelismConfig
from parallelize.pipeline_parallel.schedules import rank_of_stage, stage_count, timeline
from parallelize.pipeline_parallel.split import (
    StageShare,
    first_and_last_cost,
    split_by_names,
    split_layers,
    stage_shares,
)
from parallelize.pipeline_parallel.timeline import Slot
from transformers_backend.decoder import Decoder, recomputes_layers
from transformers_backend.flops import ModelFlops, layer_flops
from transformers_backend.stage_proof import TallTwin
from transformers_backend.stages import StageSplit


@dataclass(frozen=True)
class PipelinePlan:
    """The stages of a pipeline; the same on every rank."""

    split: StageSplit
    rank_of_stage: tuple[int, ...]
    """For each stage, its rank among those of the pipeline."""
    shares: tuple[StageShare, ...]
    """What each stage has of the model's layers, parameters and FLOPs."""

    def ranks_of(self, parameter: str) -> tuple[int, ...]:
        """The pipeline ranks that hold a parameter (by the first of its names, where it is tied), ascending."""
        return tuple(sorted({self.rank_of_stage[stage] for stage in self.split.stages_of(parameter)}))

    def timeline(self, parallelism: ParallelismConfig, micro_batches: int) -> list[list[Slot]]:
        """For each rank what it computes when; a unit of time is the mean forward of a stage."""
        return timeline(
            parallelism.pipeline_parallel_schedule,
            pp=parallelism.pipeline_parallel_degree,
            stages=len(self.shares),
            micro_batches=micro_batches,
            forward_costs=[share.share * len(self.shares) for share in self.shares],
            csv=parallelism.pipeline_parallel_schedule_csv,
        )

    def stages_of_rank(self, rank: int) -> list[int]:
        return [stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank]


def plan_pipeline(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    attn_implementation: str | None,
    parallelism: ParallelismConfig,
    seq_len: int,
) -> PipelinePlan | None:
    """The plan for a whole model (meta or real), proven on the tall twin; None where there is no pipeline.

    seq_len: tokens of a sequence, for the cost of attention. Raises a ValueError for a model that cannot be cut so.
    """
    degree, csv = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule_csv
    if degree == 1:
        return None
    twin = TallTwin(hf_model.config, type(hf_model), attn_implementation)
    facts = twin.look_at_layers()
    flops = layer_flops(hf_model, decoder, seq_len)
    ranges = _split(hf_model, decoder, parallelism, flops, facts.forbidden_cuts)
    _refuse_shared_parameters(hf_model, decoder, ranges)
    _refuse_hooks(hf_model, [decoder.layers[layers[0]] for layers in ranges[1:]])
    refuse_gradient_checkpointing(hf_model)
    split = twin.prove_stages([[decoder.layers[index] for index in layers] for layers in ranges], facts)
    shares = stage_shares(
        ranges,
        flops.layers,
        first_cost=flops.before_layers,
        last_cost=flops.after_layers,
        parameters=_count_parameters(hf_model, split),
    )
    ranks = [
        rank_of_stage(parallelism.pipeline_parallel_schedule, stage, degree, len(ranges), csv=csv)
        for stage in range(len(ranges))
    ]
    return PipelinePlan(split, tuple(ranks), tuple(shares))


def _refuse_shared_parameters(hf_model: PreTrainedModel, decoder: Decoder, ranges: Sequence[range]) -> None:
    """A ValueError for a parameter of a layer that is used elsewhere, too, unless that is in the same stage (zamba's).

    Each stage would train a copy of its own. Parameters that lie in no layer are held where they are needed.
    """
    stage_of = {decoder.layers[index]: stage for stage, layers in enumerate(ranges) for index in layers}
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in hf_model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    for names in names_of.values():
        layers = [next((layer for layer in decoder.layers if name.startswith(f"{layer}.")), None) for name in names]
        stages = {stage_of.get(layer) for layer in layers}
        if len(stages) > 1:
            other = next(name for name, layer in zip(names, layers, strict=True) if layer != layers[0])
            raise ValueError(
                f"{type(hf_model).__name__}: {names[0]} and {other} are one parameter and would be in different stages "
                "of the pipeline, each with a copy of its own, so this split is refused. Name the stages in "
                "parallelism.module_fqns_per_model_part so that layers which share parameters are together, or set "
                "parallelism.pipeline_parallel_degree = 1."
            )


def _refuse_hooks(hf_model: PreTrainedModel, first_layers: Sequence[str]) -> None:
    """A ValueError for a hook that would see, or change in vain, what stands for the layers of an earlier stage."""
    for name in first_layers:
        if hf_model.get_submodule(name)._forward_pre_hooks:
            raise ValueError(
                f"{type(hf_model).__name__}: {name} begins a stage of the pipeline and has a forward pre-hook, which "
                "would get other hidden states than the layer. Register it after parallelize, from when on it gets "
                "those that the layer computes with, or set parallelism.pipeline_parallel_degree = 1."
            )


def refuse_gradient_checkpointing(hf_model: PreTrainedModel) -> None:
    """A ValueError where Transformers recomputes layers itself, when what a stage received has gone."""
    if recomputes_layers(hf_model):
        raise ValueError(
            f"{type(hf_model).__name__}: gradient checkpointing of Transformers is on, which does not go together with "
            "a pipeline. Call gradient_checkpointing_disable() and set "
            'activation_checkpoint.mode = "full", which recomputes layers.'
        )


def _split(
    hf_model: PreTrainedModel,
    decoder: Decoder,
    parallelism: ParallelismConfig,
    flops: ModelFlops,
    forbidden_cuts: frozenset[int],
) -> list[range]:
    """The numbers of each stage's layers, by cost or as `module_fqns_per_model_part` names them."""
    parts = parallelism.module_fqns_per_model_part
    first_less = parallelism.pipeline_parallel_first_stage_less_layers
    last_less = parallelism.pipeline_parallel_last_stage_less_layers
    stages = stage_count(
        parallelism.pipeline_parallel_schedule,
        parallelism.pipeline_parallel_degree,
        len(decoder.layers),
        parallelism.pipeline_parallel_layers_per_stage,
        less_layers=max(0, first_less) + max(0, last_less),
        parts=len(parts),
        csv=parallelism.pipeline_parallel_schedule_csv,
    )
    if parts:
        places = _places(hf_model, decoder)
        return split_by_names(parts, decoder.layers, places=places, stages=stages, forbidden_cuts=forbidden_cuts)
    first_cost, last_cost = first_and_last_cost(
        flops.layers,
        first_cost=flops.before_layers,
        last_cost=flops.after_layers,
        first_stage_less_layers=first_less,
        last_stage_less_layers=last_less,
        stages=stages,
    )
    return split_layers(
        flops.layers, first_cost=first_cost, last_cost=last_cost, stages=stages, forbidden_cuts=forbidden_cuts
    )


def _places(hf_model: PreTrainedModel, decoder: Decoder) -> dict[str, str]:
    """Modules beside the layers by name, and in which part they may be named: "first", "last" or "any"."""
    in_layers = tuple(f"{layer}." for layer in decoder.layers)
    beside = [name for name, _ in hf_model.named_modules() if name and not f"{name}.".startswith(in_layers)]
    known = {decoder.embedding: "first", decoder.head: "last", decoder.final_norm: "last"}
    return {name: known.get(name, "any") for name in beside}


def _count_parameters(hf_model: PreTrainedModel, split: StageSplit) -> Sequence[int]:
    """Parameters of each stage; one that several hold counts on each."""
    counts = [0] * len(split.stages)
    for name, parameter in hf_model.named_parameters():
        for stage in split.stages_of(name):
            counts[stage] += parameter.numel()
    return counts
