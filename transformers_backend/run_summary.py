"""What a run is about to do, as one table that a person reads at its start: `describe_run` returns the text.

Above it the trainer, which logs the text on the main rank; below it the model, whose shards are already in place.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from parallelize.config import ActivationCheckpointConfig
from parallelize.costs import MemoryEstimate
from parallelize.distributed import gather_objects
from parallelize.model import needs_fsdp, reshards_after_forward
from parallelize.parallel_dims import MESH_DIMENSIONS
from parallelize.pipeline_parallel.schedules import bubble_share, canonical_name
from parallelize.pipeline_parallel.split import StageShare
from parallelize.pipeline_parallel.timeline import peak_in_flight
from transformers_backend.checkpoint import is_remote, locate_folder
from transformers_backend.decoder import parameter_kind
from transformers_backend.job_config import JobConfig
from transformers_backend.memory import estimate_memory, local_bytes
from transformers_backend.model import HFTransformerModel

WIDTH = 100
_LABEL_WIDTH = 12
_KINDS = ("embedding", "attention", "mlp", "norms", "head", "other")
_MIB = 2**20


def describe_run(
    config: JobConfig,
    model: HFTransformerModel,
    *,
    optimizers: Sequence[torch.optim.Optimizer],
    computes_in: torch.dtype,
    accumulation_steps: int,
    tokens_per_step: int,
    flops_per_token: float,
    data_name: str,
) -> str:
    """Model, mesh, placements, expected memory, data, schedule and checkpoints; lines of at most 100 columns.

    In a pipeline parameters are this rank's, and memory that of the rank with most; all ranks call it together.
    computes_in: dtype of the computation. data_name: where the text comes from, e.g. 'dataset_path = "x.jsonl"'.
    """
    memory = estimate_run_memory(
        config, model, optimizers=optimizers, computes_in=computes_in, accumulates=accumulation_steps > 1
    )
    if model.pipelined is not None:  # the rank that needs most
        memory = max(gather_objects(memory, model.pipelined.group), key=lambda estimate: estimate.peak)
    rows = [
        ("run", _run_lines(config)),
        ("model", _model_lines(model)),
        ("mesh", _mesh_lines(config, model, computes_in)),
        ("context", [] if model.context is None else [model.context.describe()]),
        ("attention", [model.attention.because] if model.attention.because else []),
        ("float8", _float8_lines(model)),
        ("kernels", _kernel_lines(model)),
        ("pipeline", _pipeline_lines(config, model)),
        ("plan", _plan_lines(model)),
        ("parameters", [*_whose_parameters(model), *parameter_table(model)]),
        ("memory", _memory_lines(memory, model.device.type, *_pipeline_memory(config, model))),
        ("data", _data_lines(config, model, data_name, accumulation_steps, tokens_per_step, flops_per_token)),
        ("schedule", _schedule_lines(config)),
        ("checkpoints", _checkpoint_lines(config)),
        ("figures", _figure_lines(config)),
    ]
    return "\n".join(line for label, lines in rows for line in _labelled(label, lines))


def _kernel_lines(model: HFTransformerModel) -> list[str]:
    """For every kind of module that kernels were looked for, what computes it, or why it has none."""
    return [f"{count} x {kind}: {kernel}" for (kind, kernel), count in model.kernels.kinds.items()]


def _float8_lines(model: HFTransformerModel) -> list[str]:
    """For every kind of linear, whether it multiplies in float8, or why not; nothing where none does."""
    return [f"{count} x {kind}: {what}" for (kind, what), count in model.float8.kinds.items()]


def estimate_run_memory(
    config: JobConfig,
    model: HFTransformerModel,
    *,
    optimizers: Sequence[torch.optim.Optimizer],
    computes_in: torch.dtype,
    accumulates: bool,
) -> MemoryEstimate:
    """What this rank will need, by `transformers_backend/memory.py`."""
    rows, in_pipeline = config.training.local_batch_size, {}
    if model.pipelined is not None:
        micro_batches, rows = _micro_batches(config)
        timeline, rank = model.pipelined.plan.timeline(config.parallelism, micro_batches), model.pipelined.rank
        numbers = model.pipelined.plan.stages_of_rank(rank)
        in_pipeline = {
            "stages": [model.pipelined.plan.split.stages[stage] for stage in numbers],
            "most_at_once": lambda sizes: peak_in_flight(timeline[rank], dict(zip(numbers, sizes, strict=True))),
        }
        accumulates = accumulates or micro_batches > 1
    return estimate_memory(
        model.hf_model,
        model.decoder,
        optimizers=optimizers,
        computes_in=computes_in,
        is_sharded=model.mesh is not None and needs_fsdp(model.mesh, config.training.enable_cpu_offload),
        reshards=reshards_after_forward(config.parallelism),
        recompute=_recompute(config.activation_checkpoint),
        memory_budget=config.activation_checkpoint.compilers_budget,
        batch_size=rows,
        seq_len=config.training.seq_len // _parts_of_a_sequence(model),
        loss_is_chunked=model.loss_is_chunked,
        accumulates=accumulates,
        offloaded=config.training.enable_cpu_offload and model.device.type != "cpu",
        device_type=model.device.type,
        sequence_parallel=_shares_sequence(model),
        **in_pipeline,
    )


def parameter_table(model: HFTransformerModel) -> list[str]:
    """A line for every kind of parameter, placement and dtype: number of tensors, of parameters, and MiB a rank.

    The placement has a column for each mesh dimension that parameters lie on.
    """
    groups: dict[tuple[str, tuple[str, ...], str], _Group] = {}
    named = list(model.hf_model.named_parameters())
    found = dict.fromkeys(name for _, parameter in named for name in _placements(parameter))
    dimensions = sorted(found, key=lambda name: MESH_DIMENSIONS.index(name) if name in MESH_DIMENSIONS else -1)
    for name, parameter in named:
        placed = _placements(parameter)
        cells = tuple(placed.get(dimension, "") for dimension in dimensions) if placed else ("whole",)
        kind = parameter_kind(name, model.hf_model, model.decoder)
        groups.setdefault((kind, cells, str(parameter.dtype).removeprefix("torch.")), _Group()).add(parameter)
    places = dimensions or ["placement"]
    total = _Group(*(sum(parts) for parts in zip(*(group.counts for group in groups.values()), strict=True)))
    rows = [
        [kind, *cells, *[""] * (len(places) - len(cells)), dtype, *group.cells]
        for (kind, cells, dtype), group in sorted(groups.items(), key=lambda item: _KINDS.index(item[0][0]))
    ]
    table = _aligned([["kind", *places, "dtype", "tensors", "numbers", "MiB a rank"], *rows,
                      ["together", *[""] * len(places), "", *total.cells]], numeric=3)  # fmt: skip
    if model.decoder.embedding_is_tied:
        table.insert(-1, f"{'head':<11}the embedding's own weights (tied)")
    return table


def stage_table(shares: Sequence[StageShare], ranks: Sequence[int]) -> list[str]:
    """A line for every stage of a pipeline: rank, layers, parameters, and its part of the model's FLOPs.

    ranks: on which pipeline rank each stage is.
    """
    rows = [
        [str(share.stage), str(rank), _layer_numbers(share.layers), f"{share.parameters:,}", f"{share.share:.1%}"]
        for share, rank in zip(shares, ranks, strict=True)
    ]
    return _aligned([["stage", "rank", "layers", "parameters", "FLOPs"], *rows], numeric=5)


def _layer_numbers(layers: range) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


@dataclass
class _Group:
    tensors: int = 0
    numbers: int = 0
    bytes_here: int = 0

    def add(self, parameter: torch.Tensor) -> None:
        self.tensors += 1
        self.numbers += parameter.numel()
        self.bytes_here += local_bytes(parameter)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.tensors, self.numbers, self.bytes_here

    @property
    def cells(self) -> tuple[str, str, str]:
        return f"{self.tensors:,}", f"{self.numbers:,}", f"{self.bytes_here / _MIB:,.2f}"


def _placements(parameter: torch.Tensor) -> dict[str, str]:
    """{mesh dimension: placement}, e.g. {"dp_shard": "Shard(0)"}; nothing for a plain tensor, which is whole."""
    if not isinstance(parameter, DTensor):
        return {}
    names = parameter.device_mesh.mesh_dim_names or [f"dim {n}" for n in range(parameter.device_mesh.ndim)]
    return {name: _shown(placement) for name, placement in zip(names, parameter.placements, strict=True)}


def _shown(placement: object) -> str:
    if isinstance(placement, (Shard, _StridedShard)):  # the latter where tp has cut the same dimension before
        return f"Shard({placement.dim})"
    return "Replicate" if isinstance(placement, Replicate) else str(placement)


def _aligned(rows: list[list[str]], *, numeric: int) -> list[str]:
    """Rows of cells as lines with columns; the last `numeric` columns are aligned on their right."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    first_number = len(widths) - numeric
    return [
        "".join(
            cell.rjust(width) if n >= first_number else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _labelled(label: str, lines: list[str]) -> list[str]:
    """The lines beside their label, those that are too long broken at spaces."""
    indent = " " * _LABEL_WIDTH
    broken = [piece for line in lines for piece in textwrap.wrap(line, WIDTH - _LABEL_WIDTH, drop_whitespace=False,
              break_long_words=False, break_on_hyphens=False)]  # fmt: skip
    return [(label.ljust(_LABEL_WIDTH) if n == 0 else indent) + piece.rstrip() for n, piece in enumerate(broken)]


def _run_lines(config: JobConfig) -> list[str]:
    return [*filter(None, [config.job.description]), f"writes to {config.job.dump_folder}"]


def _model_lines(model: HFTransformerModel) -> list[str]:
    decoder = model.decoder
    total, trained = _count_parameters(model)
    weights = model.model_args.model if model.model_args.init == "pretrained" else "new, random"
    return [
        f"{model.model_class.__name__}: {total:,} parameters, "
        f"{'all trained' if trained == total else f'{trained:,} of them trained'}; weights: {weights}",
        f"embedding {decoder.embedding}, {len(decoder.layers)} layers at {', '.join(decoder.layer_lists)}, "
        f"norm {decoder.final_norm}, head {decoder.head} "
        f"({'tied to the embedding' if decoder.embedding_is_tied else 'untied'})",
        f"attention {_attention(model)}",
    ]


def _count_parameters(model: HFTransformerModel) -> tuple[int, int]:
    """Numbers of parameters of the whole model, and of those that are trained."""
    parameters = list(model.hf_model.parameters())
    if model.pipelined is not None:
        elsewhere = set(map(id, model.pipelined.counted_elsewhere()))
        parameters = [parameter for parameter in parameters if id(parameter) not in elsewhere]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    counts = [(sum(parameter.numel() for parameter in parameters), trained)]
    if model.pipelined is not None:
        counts = gather_objects(counts[0], model.pipelined.group)
    return tuple(map(sum, zip(*counts, strict=True)))


def _mesh_lines(config: JobConfig, model: HFTransformerModel, computes_in: torch.dtype) -> list[str]:
    compiled = f"compiled: {', '.join(config.compile.components)}" if config.compile.enable else "not compiled"
    recompute = _recompute(config.activation_checkpoint)
    names = {
        "none": "nothing", "full": "every layer", "op": "all but attention and every second matrix product",
        "memory_budget": f"what is cheapest, down to {config.activation_checkpoint.memory_budget:.0%} of what is kept",
    }  # fmt: skip
    return [
        f"{model.dims.world_size} x {model.device.type}, mesh {model.dims}; weights kept in {config.training.dtype}, "
        f"computation in {str(computes_in).removeprefix('torch.')}",
        f"{compiled}; computed again in the backward: {names.get(recompute, f'one layer in {recompute}')}",
    ]


def _micro_batches(config: JobConfig) -> tuple[int, int]:
    """How many micro-batches are in a pipeline one after the other, and the sequences of one."""
    size = config.parallelism.pipeline_parallel_microbatch_size
    return config.training.local_batch_size // size, size


def _pipeline_lines(config: JobConfig, model: HFTransformerModel) -> list[str]:
    """The stages, and how long ranks are idle; nothing without a pipeline."""
    if model.pipelined is None:
        return []
    plan, parallelism = model.pipelined.plan, config.parallelism
    micro_batches, size = _micro_batches(config)
    csv = parallelism.pipeline_parallel_schedule_csv
    idle = bubble_share(plan.timeline(parallelism, micro_batches))
    return [
        f"{Path(csv).name if csv else canonical_name(parallelism.pipeline_parallel_schedule)}: {len(plan.shares)} "
        f"stages on {model.dims.pp} ranks, {micro_batches} micro-batches of {size} sequence{'s' * (size > 1)}; ranks "
        f"are idle for {idle:.1%} of their time, not counting communication",
        *stage_table(plan.shares, plan.rank_of_stage),
    ]


def _whose_parameters(model: HFTransformerModel) -> list[str]:
    if model.pipelined is None:
        return []
    stages = ", ".join(map(str, model.pipelined.plan.stages_of_rank(model.pipelined.rank)))
    return [f"of rank {model.pipelined.rank} of the pipeline (stage {stages})"]


def _attention(model: HFTransformerModel) -> str | None:
    """What attends, under the name that the user has for it."""
    return model.hf_model.config._attn_implementation if model.context is None else model.context.own_attention


def _parts_of_a_sequence(model: HFTransformerModel) -> int:
    """Of which a rank's activations are one. Modules that run on the whole sequence may need most of the memory."""
    return 1 if model.context is not None and model.context.takes_whole_sequences else model.dims.cp


def _shares_sequence(model: HFTransformerModel) -> bool:
    return model.tensor_parallelism is not None and model.tensor_parallelism.sequence_parallel


def _plan_lines(model: HFTransformerModel) -> list[str]:
    """How tensor parallelism splits the model, module by module; nothing without it."""
    split = model.tensor_parallelism
    if split is None:
        return []
    sequence = "sequence parallel between regions" if split.sequence_parallel else "not sequence parallel"
    reason = f": {split.sequence_parallel_because}" if split.sequence_parallel_because else ""
    return [f"tensor parallel over {model.dims.tp} ranks; {sequence}{reason}", *split.plan.lines()]


def _recompute(activation_checkpoint: ActivationCheckpointConfig) -> str:
    is_selective = activation_checkpoint.mode == "selective"
    return str(activation_checkpoint.selective_ac_option) if is_selective else activation_checkpoint.mode


def _pipeline_memory(config: JobConfig, model: HFTransformerModel) -> tuple[bool, bool]:
    """Whether there is a pipeline, and whether its backwards come in two halves."""
    if model.pipelined is None:
        return False, False
    timeline = model.pipelined.plan.timeline(config.parallelism, _micro_batches(config)[0])
    return True, any(slot.kind == "backward_input" for slots in timeline for slot in slots)


def _memory_lines(
    memory: MemoryEstimate, device_type: str, in_pipeline: bool = False, backward_in_halves: bool = False
) -> list[str]:
    left_out = {"cuda": "CUDA itself, communication buffers, fragmentation"}.get(device_type, "the program itself")
    if backward_in_halves:  # twice the activations, measured on torch 2.13
        left_out += "; what torch keeps of backwards in two halves until the end of a batch"
    together = "" if memory.accumulates else "  (gradients take the place of activations)"
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
        "gathered or cast weights": memory.working,
        f"activations of {'micro-batches' if in_pipeline else 'a micro-batch'}": memory.activations,
        "logits of a chunk": memory.logits,
    }
    place = ["parameters, gradients and optimizer state are in host memory"] if memory.offloaded else []
    return [
        f"{'estimated for the fullest rank' if in_pipeline else 'estimated for a rank':<30} {'MiB':>10}",
        *(f"{name:<30} {value / _MIB:>10,.1f}" for name, value in parts.items()),
        f"{'at the peak of a step':<30} {memory.peak / _MIB:>10,.1f}{together}",
        *place,
        f"not counted: {left_out}",
    ]


def _data_lines(
    config: JobConfig, model: HFTransformerModel, data_name: str, accumulation_steps: int, tokens_per_step: int,
    flops_per_token: float,
) -> list[str]:  # fmt: skip
    training = config.training
    lines = [
        data_name,
        f"{tokens_per_step:,} tokens a step: {training.local_batch_size} sequences of {training.seq_len:,} on each of "
        f"{model.dims.data_parallel_size} data ranks, accumulated {accumulation_steps} times; {flops_per_token:.3g} "
        "FLOPs a token",
    ]
    if config.validation.enable:
        lines.append(f"validation {_every(config.validation.freq)}")
    return lines


def _schedule_lines(config: JobConfig) -> list[str]:
    optimizer, schedule, steps = config.optimizer, config.lr_scheduler, config.training.steps
    total = schedule.total_steps or steps
    warmup = min(schedule.warmup_steps, total)
    decay = total - warmup if schedule.decay_ratio is None else min(round(total * schedule.decay_ratio), total - warmup)
    shape = [f"warm-up over {warmup:,} steps"] if warmup else []
    if total - warmup - decay:
        shape.append(f"constant for {total - warmup - decay:,} steps")
    if decay:
        shape.append(f"{schedule.decay_type} decay over {decay:,} steps to {optimizer.lr * schedule.min_lr_factor:.3g}")
    return [
        f"{steps:,} steps of {optimizer.name}, learning rate {optimizer.lr:g}: {', then '.join(shape)}",
        f"gradient norm clipped to {config.training.max_norm:g}",
    ]


def _checkpoint_lines(config: JobConfig) -> list[str]:
    checkpoint = config.checkpoint
    folder = locate_folder(checkpoint.folder, Path(config.job.dump_folder))
    if not checkpoint.enable:
        lines = ["none: checkpoint.enable = true makes a run that can be resumed"]
    else:
        kept = f"the newest {checkpoint.keep_latest_k} are kept" if checkpoint.keep_latest_k else "all are kept"
        lines = [f"{_every(checkpoint.interval)} to {folder}, {kept}"]
    if checkpoint.last_save_in_hf:
        exports = locate_folder("checkpoint", Path(config.job.dump_folder)) if is_remote(folder) else folder
        lines.append(f"at the end exported in {checkpoint.export_dtype} to {exports}/step-{config.training.steps}-hf")
    return lines


def _figure_lines(config: JobConfig) -> list[str]:
    metrics = config.metrics
    also = [name for name, on in (("TensorBoard", metrics.enable_tensorboard), ("W&B", metrics.enable_wandb)) if on]
    return [f"{_every(metrics.log_freq)} to {', '.join(['metrics.jsonl', *also])}"]


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps:,} steps"
