"""What a user can choose about parallelism: the `[parallelism]` section, and the rules of its keys."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from parallelize.config.checks import choice_problems
from parallelize.config.from_accelerate import fields_from_accelerate

TENSOR_PARALLEL_STYLES = (
    "colwise", "rowwise", "packed_qkv", "packed_gate_up", "packed_halves", "replicate", "outside", "whole", "split",
    "norm_over_heads", "vocabulary", "region", "whole_region", "join", "gather", "direct",
)  # fmt: skip
"""What `ParallelismConfig.tensor_parallel_plan` may say of a module or parameter; see docs/configuration.md."""

CONTEXT_PARALLEL_METHODS = ("ring", "allgather", "ulysses")
"""What `ParallelismConfig.context_parallel_method` may be."""

PIPELINE_SCHEDULES = (
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV",
)  # fmt: skip
"""What `ParallelismConfig.pipeline_parallel_schedule` may be, in any case."""

ZERO_BUBBLE_SCHEDULES = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Those that compute the gradients of inputs and of weights at different times."""


@dataclass
class ParallelismConfig:
    data_parallel_replicate_degree: int = 1
    """Number of replicas of the sharded model (HSDP when > 1 beside sharding). 1 means no replication."""

    data_parallel_shard_degree: int = -1
    """Number of ranks that parameters, gradients and optimizer state are sharded over (FSDP2). -1 means the rest of
    the world."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """When a layer's gathered parameters are freed: "default" and "always" after its forward (gathered again in the
    backward, least memory), "never" keeps them until the backward (less communication). With a pipeline "default" keeps
    them until the last micro-batch."""

    tensor_parallel_degree: int = 1
    """Number of ranks that each weight matrix is split over. 1 means disabled, and then none of the four keys below
    has an effect."""

    sequence_parallel: Literal["auto", "always", "never"] = "auto"
    """Whether tensor-parallel ranks also share the sequence between attention and MLP, where each of them would else
    keep all of it: less memory, the same communication. "auto" where the model's twin proves it exact, "always"
    refuses to start where it does not, "never" leaves it out."""

    enable_async_tensor_parallel: bool = False
    """Overlap the communication of tensor parallelism with its matrix products. Needs CUDA, and compile.enable with
    "model" among compile.components."""

    tensor_parallel_plan: dict[str, str] = field(default_factory=dict)
    """How modules or parameters are split, by name, with * for layer numbers: "model.layers.*.mlp.up_proj" =
    "colwise". What it names goes before what is derived; empty derives everything. Several styles of one module are
    joined by "+", as in "colwise+region". Styles: colwise, rowwise, packed_qkv, packed_gate_up, packed_halves,
    replicate, outside, whole, split, norm_over_heads, vocabulary, region, whole_region, join, gather, direct."""

    pipeline_parallel_degree: int = 1
    """Number of ranks that the layers are split over. 1 means disabled, and then none of the seven keys below has an
    effect."""

    pipeline_parallel_schedule: str = "1F1B"
    """In which order ranks run micro-batches forward and backward: GPipe, 1F1B, Interleaved1F1B, LoopedBFS,
    InterleavedZeroBubble, ZBVZeroBubble or DualPipeV, in any case; all but the first two give a rank several stages."""

    pipeline_parallel_schedule_csv: str = ""
    """A CSV file with a schedule, which goes before pipeline_parallel_schedule: a row for each pipeline rank, in it the
    actions in their order, such as 0F1 (stage 0, forward, micro-batch 1), with F, B, I or W. "" means none."""

    pipeline_parallel_microbatch_size: int = 1
    """Sequences of one micro-batch. It must divide training.local_batch_size; the quotient is the number of
    micro-batches that are in the pipeline one after the other."""

    pipeline_parallel_layers_per_stage: int = 0
    """Layers of a stage (at most), from which the number of stages follows. 0 means by the schedule: one stage a rank,
    or two for schedules with several."""

    pipeline_parallel_first_stage_less_layers: int = -1
    """How many layers the first stage has less than others, because it embeds. -1 means what the cost of that says."""

    pipeline_parallel_last_stage_less_layers: int = -1
    """How many layers the last stage has less than others, because it has the head. -1 means what the cost of that
    says."""

    module_fqns_per_model_part: list[list[str]] = field(default_factory=list)
    """The names of the modules of each stage, as in [["model.embed_tokens", "model.layers.0"], ["model.layers.1",
    "model.norm", "lm_head"]]; it goes before the three keys above. [] means split by cost."""

    context_parallel_degree: int = 1
    """Number of ranks that each sequence is split over; twice as many must divide its length (in the contiguous layout
    as many). 1 means disabled, and then none of the three keys below has an effect."""

    context_parallel_method: Literal["ring", "allgather", "ulysses"] = "ring"
    """How attention sees the whole sequence: "ring" passes keys and values around while it computes (least memory),
    "allgather" collects all of them at once, "ulysses" exchanges tokens for heads, of which the degree must be a
    divisor."""

    context_parallel_ulysses_degree: int = 1
    """Of the ranks that share a sequence so many neighbours exchange tokens for heads, and the ring is over the rest:
    for large degrees, with context_parallel_method = "ring". It must divide context_parallel_degree and the attention
    heads of a rank. 1 means the ring alone."""

    context_parallel_layout: Literal["zigzag", "contiguous"] = "zigzag"
    """Which tokens a rank has: "zigzag" an early and a late chunk, so that all have the same to compute, "contiguous"
    one chunk, with which the last rank has most to compute. With "ulysses" the work is equal in both."""

    @classmethod
    def from_accelerate(cls, config: Any) -> ParallelismConfig:
        """The same mesh as an `accelerate.ParallelismConfig`, e.g. that of `Accelerator(...).parallelism_config`.

        Sizes are taken as they are: accelerate's dp_shard_size = 1 means no sharding, where our own default of -1
        shards over the rest of the world. All sizes 1 means there that every process holds a replica, so inside a
        process group the replicas become its number of ranks. Raises one ValueError that lists what has no counterpart.
        """
        return cls(**fields_from_accelerate(config))

    def problems(self) -> list[str]:
        found = []
        for name in ("data_parallel_replicate_degree", "tensor_parallel_degree", "pipeline_parallel_degree",
                     "context_parallel_degree"):  # fmt: skip
            if getattr(self, name) < 1:
                found.append(f"parallelism.{name} = {getattr(self, name)}: must be at least 1 (1 means disabled).")
        if self.data_parallel_shard_degree < 1 and self.data_parallel_shard_degree != -1:
            found.append(
                f"parallelism.data_parallel_shard_degree = {self.data_parallel_shard_degree}: must be at least 1, or "
                "-1 for the rest of the world."
            )
        found += choice_problems("parallelism", self, "fsdp_reshard_after_forward", ("default", "always", "never"))
        found += choice_problems("parallelism", self, "sequence_parallel", ("auto", "always", "never"))
        found += choice_problems("parallelism", self, "context_parallel_method", CONTEXT_PARALLEL_METHODS)
        found += choice_problems("parallelism", self, "context_parallel_layout", ("zigzag", "contiguous"))
        found += self._ulysses_problems()
        for pattern, style in self.tensor_parallel_plan.items():
            found += _plan_entry_problems(pattern, style)
        return found + self._pipeline_problems()

    def _ulysses_problems(self) -> list[str]:
        """Whether it divides the heads is found out with the model."""
        key = f"parallelism.context_parallel_ulysses_degree = {self.context_parallel_ulysses_degree}"
        degree, ulysses = self.context_parallel_degree, self.context_parallel_ulysses_degree
        if ulysses < 1:
            return [f"{key}: must be at least 1 (1 means the ring alone)."]
        found = []
        if degree <= 1 or ulysses == 1:
            return found
        if degree % ulysses:
            divisors = [divisor for divisor in range(1, degree + 1) if degree % divisor == 0]
            nearest = min(divisors, key=lambda divisor: abs(divisor - ulysses))
            found.append(f"{key}: must divide context_parallel_degree = {degree}; the nearest that does is {nearest}.")
        if self.context_parallel_method != "ring":
            found.append(
                f'{key} with context_parallel_method = "{self.context_parallel_method}": only around a ring are tokens '
                'exchanged for heads by some of the ranks. Set the method to "ring", or this to 1.'
            )
        return found

    def _pipeline_problems(self) -> list[str]:
        """Of the keys by themselves; `pipeline_parallel/schedules.py` has the rules that need a batch or a model."""
        found = _schedule_problems(self.pipeline_parallel_schedule)
        csv = self.pipeline_parallel_schedule_csv
        if self.pipeline_parallel_degree > 1 and csv and not Path(csv).expanduser().is_file():
            found.append(
                f'parallelism.pipeline_parallel_schedule_csv = "{csv}": no such file from {Path.cwd()}; correct it, or '
                'set "" and name a pipeline_parallel_schedule.'
            )
        for name, minimum, meaning in (
            ("microbatch_size", 1, "sequences"),
            ("layers_per_stage", 0, "layers; 0 means by the schedule"),
            ("first_stage_less_layers", -1, "layers; -1 means by cost"),
            ("last_stage_less_layers", -1, "layers; -1 means by cost"),
        ):
            value = getattr(self, f"pipeline_parallel_{name}")
            if value < minimum:
                found.append(f"parallelism.pipeline_parallel_{name} = {value}: must be at least {minimum} ({meaning}).")
        return found + _model_part_problems(self.module_fqns_per_model_part)


def _plan_entry_problems(pattern: str, style: str) -> list[str]:
    """The sentences for one entry of a plan; whether the model has what it names is found out with the model."""
    found = []
    if not pattern or pattern != pattern.strip():
        found.append(
            f'parallelism.tensor_parallel_plan names "{pattern}": must be the name of a module or parameter without '
            'spaces around it, such as "model.layers.*.mlp.up_proj".'
        )
    for word in [word for word in style.split("+") if word not in TENSOR_PARALLEL_STYLES]:
        (nearest,) = difflib.get_close_matches(word, TENSOR_PARALLEL_STYLES, n=1, cutoff=0.0)
        found.append(
            f'parallelism.tensor_parallel_plan."{pattern}" = "{style}": must be one of '
            f'{", ".join(TENSOR_PARALLEL_STYLES)}; the nearest is "{nearest}".'
        )
    return found


def _schedule_problems(name: str) -> list[str]:
    known = {schedule.lower(): schedule for schedule in PIPELINE_SCHEDULES}
    if name.lower() in known:
        return []
    (nearest,) = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
    return [
        f'parallelism.pipeline_parallel_schedule = "{name}": must be one of {", ".join(PIPELINE_SCHEDULES)}; the '
        f'nearest is "{known[nearest]}".'
    ]


def _model_part_problems(parts: list[list[str]]) -> list[str]:
    """The sentences for the modules of stages; whether the model has what they name is found out with the model."""
    names = [name for part in parts for name in part]
    found = [
        f'parallelism.module_fqns_per_model_part names "{name}" {names.count(name)} times: a module belongs to one '
        "stage; leave it in one of them."
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if not all(parts):
        found.append(
            f"parallelism.module_fqns_per_model_part: part {parts.index([])} has no modules; name some, or leave the "
            "part out."
        )
    return found
