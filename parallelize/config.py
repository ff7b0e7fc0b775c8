"""What a user can choose about parallelism, activation checkpointing, compilation and kernels.

These dataclasses are the `[parallelism]`, `[activation_checkpoint]`, `[compile]` and `[kernels]` sections of a job's
TOML file and the arguments of `HFTransformerModel.parallelize`. Names and meanings follow torchtitan v0.2.2 wherever a
field means the same. They are read at the top (`parallelize/model.py`); leaf functions take flat values.

`problems()` returns every violated rule as a sentence that names key, value, rule and remedy, so that a job can
report all of them at once; `check(...)` raises them as one `ValueError`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

TENSOR_PARALLEL_STYLES = (
    "colwise", "rowwise", "packed_qkv", "packed_gate_up", "packed_halves", "replicate", "outside", "whole", "split",
    "norm_over_heads", "vocabulary", "region", "whole_region", "join", "gather", "direct",
)  # fmt: skip
"""What `ParallelismConfig.tensor_parallel_plan` may say of a module or parameter; see docs/configuration.md."""

CONTEXT_PARALLEL_METHODS = ("ring", "allgather", "ulysses")
"""What `ParallelismConfig.context_parallel_method` may be."""

KERNELS = ("rms_norm", "gated_activation", "rotary", "linear_cross_entropy")
"""What `KernelConfig.enable` may name; see parallelize/kernels/."""

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
        given = _accelerate_fields(config)
        check(_without_counterpart(given))
        degrees = {ours: given[theirs] for theirs, ours in _ACCELERATE_SIZES.items()}
        if set(degrees.values()) == {1} and dist.is_initialized():
            degrees["data_parallel_replicate_degree"] = dist.get_world_size()
        is_async = given["tp_size"] > 1 and given["tp_handler"].enable_async_tp  # accelerate itself ignores it
        shared = {}
        if given["cp_size"] > 1:
            shared["context_parallel_method"] = _ACCELERATE_STRATEGIES[given["cp_handler"].cp_comm_strategy]
        return cls(**degrees, **shared, enable_async_tensor_parallel=is_async)

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


def zero_bubble_problems(
    parallelism: ParallelismConfig, compile: CompileConfig, activation_checkpoint: ActivationCheckpointConfig
) -> list[str]:
    """The sentences for what does not go together with a backward in two halves, first for inputs, then for weights.

    In compiled layers torch 2.13 gets gradients wrong without a word; it refuses only modules that `torch.compile` has
    wrapped, not those compiled in place. Parameters that FSDP2 frees between the halves would get no gradient.
    """
    setting = backward_in_halves(parallelism)
    if setting is None:
        return []
    others = [schedule for schedule in PIPELINE_SCHEDULES if schedule not in ZERO_BUBBLE_SCHEDULES]
    found = []
    if compile.enable and "model" in compile.components:
        found.append(
            "which torch does wrongly, without an error, in compiled layers. Choose one of "
            f'{", ".join(others)}, or set compile.components = ["loss"].'
        )
    if activation_checkpoint.mode == "selective" and str(activation_checkpoint.selective_ac_option) == "op":
        found.append(
            "and what is recomputed operator by operator can run backward only once. Choose one of "
            f'{", ".join(others)}, or set activation_checkpoint.mode = "none" '
            '("full" is right, and recomputes a layer for each of its weights).'
        )
    if parallelism.fsdp_reshard_after_forward == "always":
        found.append(
            'and parallelism.fsdp_reshard_after_forward = "always" frees parameters between the two. Choose one of '
            f'{", ".join(others)}, or set that to "default".'
        )
    return [
        f"parallelism.{setting}: computes the gradients of inputs and weights at different times, {problem}"
        for problem in found
    ]


def backward_in_halves(parallelism: ParallelismConfig) -> str | None:
    """The key and value by which a pipeline's schedule has its backward in two halves; None where it has not."""
    name, csv = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv
    if parallelism.pipeline_parallel_degree == 1:
        return None
    if csv:
        path = Path(csv).expanduser()
        if not path.is_file() or not re.search(r"\d[IW]\d", path.read_text(encoding="utf-8", errors="replace")):
            return None
        return f'pipeline_parallel_schedule_csv = "{csv}" (which has actions I and W)'
    if name.lower() in [schedule.lower() for schedule in ZERO_BUBBLE_SCHEDULES]:
        return f'pipeline_parallel_schedule = "{name}"'
    return None


def async_tensor_parallel_problems(
    parallelism: ParallelismConfig, compile: CompileConfig, device_type: str | None = None
) -> list[str]:
    """The sentence for asynchronous tensor parallelism where it cannot be; device_type None: not known yet."""
    if not parallelism.enable_async_tensor_parallel or parallelism.tensor_parallel_degree == 1:
        return []
    missing = []
    if not (compile.enable and "model" in compile.components):
        missing.append('compiled layers (the compiler makes it): set compile.enable = true with "model" in components')
    if device_type not in (None, "cuda"):
        missing.append(f"CUDA devices that reach each other's memory, and this run is on {device_type}")
    if not missing:
        return []
    return [
        f"parallelism.enable_async_tensor_parallel = true: needs {'; and '.join(missing)}. Do that, or set it to false."
    ]


# accelerate 1.15's names, and ours.
_ACCELERATE_SIZES = {
    "dp_replicate_size": "data_parallel_replicate_degree",
    "dp_shard_size": "data_parallel_shard_degree",
    "tp_size": "tensor_parallel_degree",
    "cp_size": "context_parallel_degree",
}
# How ranks exchange a sequence; "alltoall" passes keys and values on from rank to rank.
_ACCELERATE_STRATEGIES = {"allgather": "allgather", "alltoall": "ring"}
# What says nothing by itself: the only backends that there are, and settings of sequence parallelism, which is refused.
_ACCELERATE_SILENT = ("cp_backend", "sp_backend", "sp_handler")


def _accelerate_fields(config: Any) -> dict[str, Any]:
    """The fields of an accelerate.ParallelismConfig. Its class is not asked for: this library does not import it."""
    given = {entry.name: getattr(config, entry.name) for entry in fields(config)} if _is_instance(config) else {}
    if not _ACCELERATE_SIZES.keys() <= given.keys():
        hint = ""
        if config is None:
            hint = " An Accelerator's parallelism_config is None where none was given to it."
        raise ValueError(
            f"from_accelerate: got {type(config).__name__}, which is not an accelerate.ParallelismConfig; pass one, or "
            f"write ParallelismConfig() to shard over all ranks.{hint}"
        )
    return given


def _is_instance(config: Any) -> bool:
    return is_dataclass(config) and not isinstance(config, type)


def _without_counterpart(given: dict[str, Any]) -> list[str]:
    """The sentences for what an accelerate.ParallelismConfig says that cannot be said here."""
    found = []
    if given.get("sp_size", 1) > 1:
        found.append(
            f"sp_size = {given['sp_size']}: the sequence parallelism of DeepSpeed is not available here; set it to 1, "
            "and raise dp_shard_size by that factor."
        )
    if given["cp_size"] > 1 and (strategy := given["cp_handler"].cp_comm_strategy) not in _ACCELERATE_STRATEGIES:
        found.append(
            f'cp_handler.cp_comm_strategy = "{strategy}": this version here does not know that way to exchange a '
            f"sequence; take one of {', '.join(_ACCELERATE_STRATEGIES)}."
        )
    known = {*_ACCELERATE_SIZES, *_ACCELERATE_SILENT, "sp_size", "tp_handler", "cp_handler"}
    found += [
        f"{name} = {value!r}: accelerate's ParallelismConfig has it, but this version here does not know it; leave it "
        "out."
        for name, value in given.items()
        if name not in known and value not in (None, 1, False)
    ]
    return [f"accelerate.ParallelismConfig: {problem}" for problem in found]


@dataclass
class ActivationCheckpointConfig:
    mode: Literal["none", "full", "selective"] = "none"
    """What the backward recomputes: "none" keeps all activations, "full" keeps each layer's input only, "selective"
    see selective_ac_option."""

    selective_ac_option: str = "2"
    """With mode "selective": an integer n recomputes every n-th layer, "op" recomputes inside every layer all but
    attention, every second matrix product and communication."""

    preserve_rng_state: bool = True
    """Replay the random state in the recomputation, so that dropout draws the same mask. False is faster where a
    model has no dropout."""

    def problems(self) -> list[str]:
        found = choice_problems("activation_checkpoint", self, "mode", ("none", "full", "selective"))
        option = str(self.selective_ac_option)
        if option != "op" and not (option.isdigit() and int(option) > 0):
            found.append(
                f'activation_checkpoint.selective_ac_option = "{option}": must be "op" or a positive integer n, '
                'as a string, for every n-th layer, e.g. "2".'
            )
        return found


@dataclass
class CompileConfig:
    enable: bool = False
    """Compile with torch.compile, layer by layer."""

    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: any of "model" (each decoder layer) and "loss" (the chunked head and cross-entropy)."""

    backend: str = "inductor"
    """The torch.compile backend, e.g. "inductor" or "aot_eager"."""

    def problems(self) -> list[str]:
        unknown = [name for name in self.components if name not in ("model", "loss")]
        found = [f'compile.components has "{name}": must be among "model" and "loss"; remove it.' for name in unknown]
        if self.enable and self.backend not in torch.compiler.list_backends(exclude_tags=()):
            names = ", ".join(torch.compiler.list_backends())
            found.append(f'compile.backend = "{self.backend}": torch has no such backend; choose among {names}.')
        return found


@dataclass
class KernelConfig:
    enable: list[str] = field(default_factory=lambda: ["auto"])
    """Triton kernels that modules may compute by, each proven equal to the module first: any of "rms_norm",
    "gated_activation", "rotary", "linear_cross_entropy"; or "none"; or "auto", those that make the run faster on its
    device, which on a CPU are none.

    "linear_cross_entropy" computes the loss without logits and without an fp32 copy of the head's gradient: for a
    vocabulary of 256,000 gigabytes less, for a third more matrix products of the head (logits are computed twice; with
    zero-bubble schedules, its backward twice). It is never part of "auto", as no GPU has measured it against the loss
    in chunks yet."""

    def __post_init__(self) -> None:
        if isinstance(self.enable, str):  # one name, as a TOML file may have it
            self.enable = [self.enable]

    def problems(self) -> list[str]:
        if self.enable in (["auto"], ["none"]):
            return []
        allowed = ", ".join(f'"{name}"' for name in KERNELS)
        return [
            f'kernels.enable has "{name}": must be "auto" or "none" alone, or a list of any of {allowed}; correct it.'
            for name in self.enable
            if name not in KERNELS
        ]


def choice_problems(section: str, config: object, name: str, choices: tuple[str, ...]) -> list[str]:
    """The sentence for a field whose value is not among `choices`, or nothing."""
    value = getattr(config, name)
    if value in choices:
        return []
    allowed = ", ".join(f'"{choice}"' for choice in choices)
    return [f'{section}.{name} = "{value}": must be one of {allowed}.']


def check(problems: Iterable[str]) -> None:
    """Raise one ValueError that lists all `problems`, or return if there are none."""
    problems = list(problems)
    if problems:
        raise ValueError("\n".join(["Invalid configuration:", *(f"  - {problem}" for problem in problems)]))
