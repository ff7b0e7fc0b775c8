"""JobConfig: all sections of a run together, the rules that span them, and the resolved config as TOML.

The trainer calls `validate` before any process group or download starts; leaf functions below it take flat values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallelize.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    Float8Config,
    KernelConfig,
    ParallelismConfig,
    async_tensor_parallel_problems,
    check,
    float8_problems,
    zero_bubble_problems,
)
from parallelize.context_parallel.layout import sequence_length_problems
from parallelize.pipeline_parallel.schedules import batch_problems, model_part_problems
from transformers_backend.job_config.data_sections import held_out_problems
from transformers_backend.job_config.run_sections import Comm, Debug, Metrics, Profiling
from transformers_backend.job_config.sections import (
    Checkpoint,
    HFTransformers,
    Job,
    LRScheduler,
    Model,
    Optimizer,
    Training,
    Validation,
)
from transformers_backend.job_config.values import field_types, table_type, to_toml, type_problems


@dataclass
class JobConfig:
    """Everything that a run is told. The constructor checks nothing, so that fields can be set one by one."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    hf_transformers: HFTransformers = field(default_factory=HFTransformers)
    training: Training = field(default_factory=Training)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    float8: Float8Config = field(default_factory=Float8Config)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    debug: Debug = field(default_factory=Debug)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """Return the config as the text of a TOML file that loads to an equal config; keys that are None are left
        out, because None is always the default."""
        lines = []
        for name, keys in self.to_dict().items():
            tables = {
                key: keys.pop(key) for key, kind in field_types(type(getattr(self, name))).items() if table_type(kind)
            }
            lines += ["", f"[{name}]", *_assignments(keys)]
            for key, items in tables.items():
                for item in items:
                    lines += ["", f"[[{name}.{key}]]", *_assignments(item)]
        return "\n".join(lines[1:]) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `to_toml()` to a file, whose folder is created."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_toml(), encoding="utf-8")


def _assignments(keys: dict[str, Any]) -> list[str]:
    return [f"{key} = {to_toml(value)}" for key, value in keys.items() if value is not None]


def validate(config: JobConfig, *, world_size: int | None) -> None:
    """Raise one ValueError that lists every problem of a config.

    `world_size` is the number of ranks; None, where it is not known yet, leaves out the rules that need it.
    """
    check(find_problems(config, world_size))


def find_problems(config: JobConfig, world_size: int | None = None) -> list[str]:
    found, sound = [], set()
    for name, kind in field_types(JobConfig).items():
        section = getattr(config, name)
        if not isinstance(section, kind):
            found.append(f"{name} = {section!r}: must be a {kind.__name__}.")
            continue
        problems = type_problems(name, section) or section.problems()
        found += problems
        if not problems:
            sound.add(name)
    if {"parallelism", "compile"} <= sound:
        found += async_tensor_parallel_problems(config.parallelism, config.compile)
    if {"parallelism", "float8"} <= sound:
        found += float8_problems(config.float8, config.parallelism)
    if {"parallelism", "compile", "activation_checkpoint"} <= sound:
        found += zero_bubble_problems(config.parallelism, config.compile, config.activation_checkpoint)
    if {"parallelism", "training"} <= sound:
        found += _pipeline_problems(config)
    if {"parallelism", "training", "validation"} <= sound:
        found += _context_problems(config)
    if {"training", "validation"} <= sound and config.validation.enable:
        found += held_out_problems("validation", config.validation, config.training.sources or [config.training])
    if {"hf_transformers", "model"} <= sound:
        found += _tokenizer_problems(config)
    if world_size is not None and {"parallelism", "training"} <= sound:
        found += _mesh_problems(config.parallelism, world_size) or _batch_problems(config, world_size)
    if world_size not in (None, 1) and "checkpoint" in sound and config.checkpoint.create_seed_checkpoint:
        found.append(
            f"checkpoint.create_seed_checkpoint = true: needs one process, and there are {world_size} ranks; start "
            "with NPROC=1."
        )
    return found


def _tokenizer_problems(config: JobConfig) -> list[str]:
    if config.hf_transformers.model is not None or config.model.hf_assets_path is not None:
        return []
    return [
        f'model.hf_assets_path is missing: hf_transformers.model_type = "{config.hf_transformers.model_type}" brings '
        'no tokenizer; name a folder or hub id that has one, or "byt5" for byte-level tokens without a download.'
    ]


def _pipeline_problems(config: JobConfig) -> list[str]:
    parallelism = config.parallelism
    pp, csv = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule_csv
    schedule, parts = parallelism.pipeline_parallel_schedule, parallelism.module_fqns_per_model_part
    if pp == 1:
        return []
    try:
        found = batch_problems(
            {"training.local_batch_size": config.training.local_batch_size},  # forward only, any batch will do
            microbatch_size=parallelism.pipeline_parallel_microbatch_size,
            schedule=schedule,
            pp=pp,
            csv=csv,
        )
    except ValueError as error:  # of the file
        return [str(error)]
    if parts and not csv:
        found += model_part_problems(schedule, pp, len(parts))
    return found


def _context_problems(config: JobConfig) -> list[str]:
    degree, lengths = config.parallelism.context_parallel_degree, {"training.seq_len": config.training.seq_len}
    if degree == 1:
        return []
    if config.validation.enable and config.validation.seq_len:
        lengths["validation.seq_len"] = config.validation.seq_len
    is_zigzag = config.parallelism.context_parallel_layout == "zigzag"
    return [
        text
        for key, length in lengths.items()
        for text in sequence_length_problems(key, length, degree, is_zigzag=is_zigzag)
    ]


def _mesh_problems(parallelism: ParallelismConfig, world_size: int) -> list[str]:
    fixed = _degrees_beside_sharding(parallelism)
    shard = parallelism.data_parallel_shard_degree
    if shard == -1 and world_size % fixed:
        return [
            f"parallelism: the degrees other than data_parallel_shard_degree multiply to {fixed}, which must divide "
            f"the number of ranks, {world_size}; change them or the number of ranks."
        ]
    if shard != -1 and fixed * shard != world_size:
        return [
            f"parallelism: the degrees multiply to {fixed * shard}, which must equal the number of ranks, "
            f"{world_size}; set data_parallel_shard_degree = -1 to shard over the rest of them."
        ]
    return []


def _batch_problems(config: JobConfig, world_size: int) -> list[str]:
    parallelism, training = config.parallelism, config.training
    beside = parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
    data_ranks = world_size // (beside * parallelism.pipeline_parallel_degree)
    per_forward = training.local_batch_size * data_ranks
    if training.global_batch_size == -1 or training.global_batch_size % per_forward == 0:
        return []
    return [
        f"training.global_batch_size = {training.global_batch_size}: must be a multiple of local_batch_size x "
        f"data-parallel ranks = {training.local_batch_size} x {data_ranks}; change it, or set -1 for no accumulation."
    ]


def _degrees_beside_sharding(parallelism: ParallelismConfig) -> int:
    return (
        parallelism.data_parallel_replicate_degree
        * parallelism.tensor_parallel_degree
        * parallelism.pipeline_parallel_degree
        * parallelism.context_parallel_degree
    )
