"""The sections of a job's TOML file: every key with its type, default, meaning and rules.

First stop of a run: TOML and command line fill these dataclasses (`load.py`), everything below reads them. Names and
meanings follow torchtitan v0.2.2 wherever a field means the same. What names data sets stands in `data_sections.py`;
`[metrics]`, `[profiling]`, `[comm]` and `[debug]` in `run_sections.py`; `[parallelism]`, `[activation_checkpoint]`,
`[compile]`, `[float8]` and `[kernels]` in `parallelize/config/`.

The string under a field is its help text. `problems()` returns every violated rule as a sentence; it is called on
sections whose value types are right, and constructors check nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers_backend.job_config.data_sections import Source, Stage, TextSource, mixture_problems
from transformers_backend.job_config.rules import (
    below_minimum,
    empty_strings,
    model_source_problems,
    model_type_problems,
    source_problems,
)


@dataclass
class Job:
    dump_folder: str = "./outputs"
    """Folder that everything a run writes goes to: metrics, checkpoints, traces and the resolved config."""

    description: str = ""
    """Free text that is printed at the start and kept with the resolved config."""

    print_config: bool = False
    """Print the resolved config at the start."""

    sample_prompt: str = ""
    """A prompt that the trained model continues at the end of the run. "" means no sample."""

    sample_tokens: int = 200
    """Number of tokens that the sample continues the prompt by."""

    def problems(self) -> list[str]:
        return [*empty_strings("job", self, "dump_folder"), *below_minimum("job", self, sample_tokens=1)]


@dataclass
class Model:
    hf_assets_path: str | None = None
    """Folder or hub id that the tokenizer is read from, or "byt5" for the byte-level ByT5Tokenizer, which needs no
    files. none means the same place as hf_transformers.model."""

    def problems(self) -> list[str]:
        if self.hf_assets_path is None:
            return []
        return source_problems("model.hf_assets_path", self.hf_assets_path)


@dataclass
class HFTransformers:
    model: str | None = None
    """Hub id or local folder of the model, e.g. "Qwen/Qwen3-0.6B"."""

    model_type: str | None = None
    """A Transformers model type, e.g. "llama", built from its default config and config_overrides without any
    download. Takes the place of model."""

    revision: str | None = None
    """Branch, tag or commit of the hub repository of model. none means its main branch."""

    trust_remote_code: bool = False
    """Run model code that the hub repository brings along. Leave it false for models that Transformers knows."""

    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config to change, e.g. {num_hidden_layers = 4}; printed at the start. The string
    "none" stands for None, which TOML cannot say."""

    init: Literal["pretrained", "scratch"] | None = None
    """Where weights come from: "pretrained" safetensors, or "scratch", the model's own random initialisation. none
    means pretrained with model and scratch with model_type."""

    attn_implementation: str | None = None
    """Transformers' attention function, e.g. "sdpa", "eager" or "flash_attention_2". none means its own choice."""

    def problems(self) -> list[str]:
        if self.model is None and self.model_type is None:
            return [
                "hf_transformers.model is missing: name a hub id or a local folder, or set hf_transformers.model_type "
                "to build a type from scratch."
            ]
        if self.model is not None and self.model_type is not None:
            return [
                f'hf_transformers.model = "{self.model}" and hf_transformers.model_type = "{self.model_type}": exactly '
                "one of them names the model; unset the other (the default run sets model_type, so give a TOML file "
                "of your own, or --hf_transformers.model_type none --hf_transformers.config_overrides {})."
            ]
        if self.model is not None:
            found = model_source_problems("hf_transformers.model", self.model)
            if self.revision is not None and Path(self.model).expanduser().is_dir():
                found.append(
                    f'hf_transformers.revision = "{self.revision}": hf_transformers.model = "{self.model}" is a local '
                    "folder, which has no revisions; remove it."
                )
            return found
        found = model_type_problems(self.model_type)
        if self.init == "pretrained":
            found.append(
                'hf_transformers.init = "pretrained": a model_type has no weights to load; set init to "scratch", or '
                "name a checkpoint with hf_transformers.model."
            )
        return found


@dataclass
class Training(TextSource):
    sources: list[Source] = field(default_factory=list)
    """Weighted sources of text, in place of the keys of a single data set."""

    stages: list[Stage] = field(default_factory=list)
    """From which step which of the sources are read. An empty list means all of them in every step."""

    packing: Literal["concat", "documents"] = "concat"
    """How documents are packed into sequences: "concat", one after the other, so that tokens attend to the documents
    before their own, or "documents": positions restart with every document, and attention stays inside where it can."""

    num_workers: int | None = None
    """Processes on each data-parallel rank that read and tokenize. 0 means the training process itself. none means 1,
    or 0 where tokens cost next to nothing (byt5)."""

    prefetch_factor: int = 2
    """Chunks, of about 65,000 tokens, that each worker reads ahead."""

    local_batch_size: int = 8
    """Sequences per data-parallel rank in one forward and backward."""

    global_batch_size: int = -1
    """Sequences per optimizer step over all ranks; more than one forward's worth is accumulated. -1 means
    local_batch_size times the data-parallel degree."""

    seq_len: int = 2048
    """Tokens per training sequence."""

    max_norm: float = field(default=1.0, metadata={"may_be_infinite": True})
    """Largest norm of all gradients together; larger ones are scaled down to it. inf means no clipping."""

    steps: int = 10000
    """Number of optimizer steps of the run."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """Type that parameters and optimizer state are kept and updated in."""

    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type that layers compute in. "auto" means bfloat16 on CUDA and on CPUs with native bfloat16 dot products, else
    float32."""

    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type that gradients are summed over ranks in."""

    enable_cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory, and update them there."""

    gc_freq: int = 50
    """Steps between Python garbage collections, which then happen on all ranks at once."""

    def problems(self) -> list[str]:
        found = self.text_problems("training")
        has_dataset = "dataset_path" if self.dataset_path is not None else None
        if self.dataset != Training.dataset:
            has_dataset = "dataset"
        found += mixture_problems("training", self.sources, self.stages, has_dataset)
        found += below_minimum("training", self, local_batch_size=1, seq_len=2, steps=1, gc_freq=1, prefetch_factor=1)
        if self.num_workers is not None:
            found += below_minimum("training", self, num_workers=0)
        if not self.max_norm > 0:
            found.append(f"training.max_norm = {self.max_norm}: must be above 0; inf turns clipping off.")
        if self.global_batch_size < 1 and self.global_batch_size != -1:
            found.append(
                f"training.global_batch_size = {self.global_batch_size}: must be at least 1, or -1 for no accumulation."
            )
        elif (
            self.global_batch_size > 0 and self.local_batch_size > 0 and self.global_batch_size % self.local_batch_size
        ):
            found.append(
                f"training.global_batch_size = {self.global_batch_size}: must be a multiple of "
                f"training.local_batch_size = {self.local_batch_size}; change one of them."
            )
        return found


@dataclass
class Optimizer:
    name: Literal["AdamW", "Muon"] = "AdamW"
    """The optimizer: "AdamW", or "Muon" for the matrices of the layers with AdamW for everything else."""

    lr: float = 8e-4
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of AdamW's running mean of gradients. Muon has a momentum of its own, 0.95."""

    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""

    eps: float = 1e-8
    """Added to the denominator of the update."""

    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""

    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How AdamW runs: "fused" (one kernel, where the device has one), "foreach" (several tensors at once) or
    "for-loop" (one tensor at a time)."""

    def problems(self) -> list[str]:
        found = below_minimum("optimizer", self, lr=0, weight_decay=0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} = {getattr(self, name)}: must be in [0, 1), e.g. 0.9.")
        if not self.eps > 0:
            found.append(f"optimizer.eps = {self.eps}: must be above 0, e.g. 1e-8.")
        return found


@dataclass
class LRScheduler:
    warmup_steps: int = 200
    """Steps over which the learning rate rises linearly from 0. A run with fewer steps shortens it to them."""

    total_steps: int | None = None
    """Steps that the schedule is drawn for. none means training.steps; set it to try the first steps of a longer
    run."""

    decay_ratio: float | None = None
    """Last part of the total steps in which the learning rate decays, 0 to 1, after a stable phase. none means it
    decays right from the end of the warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay: "linear", "sqrt" (1 - square root) or "cosine"."""

    min_lr_factor: float = 0.0
    """Learning rate at the end of the decay, as a part of optimizer.lr, 0 to 1."""

    def problems(self) -> list[str]:
        found = below_minimum("lr_scheduler", self, warmup_steps=0)
        if self.total_steps is not None:
            found += below_minimum("lr_scheduler", self, total_steps=1)
            if self.warmup_steps > self.total_steps:
                found.append(
                    f"lr_scheduler.warmup_steps = {self.warmup_steps}: must be at most lr_scheduler.total_steps = "
                    f"{self.total_steps}; change one of them."
                )
        for name in ("decay_ratio", "min_lr_factor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                found.append(f"lr_scheduler.{name} = {value}: must be in [0, 1], e.g. 0.1.")
        return found


CHECKPOINT_PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")


@dataclass
class Checkpoint:
    enable: bool = False
    """Save checkpoints, and resume from the folder where it already holds some."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder, or a URL that fsspec opens, e.g. "s3://bucket/run"."""

    interval: int = 500
    """Steps between checkpoints."""

    keep_latest_k: int = 10
    """Number of checkpoints that are kept, at least 2; older ones are deleted. 0 means all."""

    load_step: int = -1
    """Step of the checkpoint to resume from. -1 means the latest whole one."""

    load_only: bool = False
    """Resume, but save nothing."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts of a checkpoint that a resume leaves as the job sets them up: "model", "optimizer", "lr_scheduler",
    "dataloader" (the position in the data), "train_state" (the step and random numbers)."""

    initial_load_path: str | None = None
    """A checkpoint of another run, <folder>/step-N, local or a URL, that a run starts from whose own folder holds none.
    With initial_load_in_hf a Hugging Face folder or hub id."""

    initial_load_model_only: bool = True
    """Of initial_load_path take the weights only, and start at step 0."""

    initial_load_in_hf: bool = False
    """Read initial_load_path as safetensors in the Hugging Face format."""

    create_seed_checkpoint: bool = False
    """Save the initial weights as step 0 and end. Needs one process; a job on any mesh that finds it starts from it."""

    enable_first_step_checkpoint: bool = False
    """Save after the first step too, to learn early whether saving works."""

    last_save_model_only: bool = False
    """Save the weights alone at the end of the run, in <folder>/step-N-model, without the optimizer state that a
    resume needs."""

    last_save_in_hf: bool = False
    """At the end of the run also write a folder that from_pretrained loads: safetensors, config and tokenizer, in
    <folder>/step-N-hf. Works without enable too."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Type of the weights in the folder of last_save_in_hf."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """"disabled" holds the run until a checkpoint is written, "async" writes it beside training from a copy in host
    memory, "async_with_pinned_mem" keeps that copy in page-locked memory, which CUDA fills faster."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What follows when a checkpoint cannot be written, e.g. to a full disk: "stop" ends the run with an error,
    "continue" warns and trains on. The last checkpoint of a run must be written either way."""

    def problems(self) -> list[str]:
        found = [*empty_strings("checkpoint", self, "folder"), *below_minimum("checkpoint", self, interval=1)]
        if self.keep_latest_k < 0 or self.keep_latest_k == 1:
            found.append(
                f"checkpoint.keep_latest_k = {self.keep_latest_k}: must be 0 (all) or at least 2, because the newest "
                "one may still be incomplete."
            )
        if self.load_step < -1:
            found.append(f"checkpoint.load_step = {self.load_step}: must be at least 0, or -1 for the latest.")
        if unknown := set(self.exclude_from_loading) - set(CHECKPOINT_PARTS):
            found.append(
                f"checkpoint.exclude_from_loading = {sorted(unknown)}: no parts of a checkpoint; those are "
                f"{', '.join(CHECKPOINT_PARTS)}."
            )
        return [*found, *self._start_problems()]

    def _start_problems(self) -> list[str]:
        found = []
        if self.initial_load_in_hf and not self.initial_load_path:
            found.append(
                "checkpoint.initial_load_in_hf = true: set checkpoint.initial_load_path to the Hugging Face folder or "
                "hub id to start from."
            )
        if self.initial_load_in_hf and not self.initial_load_model_only:
            found.append(
                "checkpoint.initial_load_model_only = false: a Hugging Face folder has weights only; set it to true."
            )
        for name in ("initial_load_path", "create_seed_checkpoint", "load_only"):
            if getattr(self, name) and not self.enable:
                found.append(f"checkpoint.{name} needs checkpoint.enable = true; set that, or leave {name} out.")
        if self.create_seed_checkpoint and self.load_only:
            found.append("checkpoint.create_seed_checkpoint and load_only: one saves, the other does not; choose one.")
        return found


@dataclass
class Validation(TextSource):
    enable: bool = False
    """Measure the loss on held-out text during the run."""

    dataset: str | None = None
    """The text, as training.dataset. none means "python_stdlib", if training reads it too; else this must be set."""

    dataset_split: str = "validation"
    """Split of the data set."""

    local_batch_size: int | None = None
    """Sequences per data-parallel rank in one forward. none means training.local_batch_size."""

    seq_len: int | None = None
    """Tokens per sequence. none means training.seq_len."""

    freq: int = 10
    """Training steps between two validations."""

    steps: int = -1
    """Batches per validation. -1 means all of the data."""

    def problems(self) -> list[str]:
        found = self.text_problems("validation") if self.enable else []
        found += below_minimum("validation", self, freq=1)
        for name in ("local_batch_size", "seq_len"):
            if getattr(self, name) is not None:
                found += below_minimum("validation", self, **{name: 1})
        if self.steps < 1 and self.steps != -1:
            found.append(f"validation.steps = {self.steps}: must be at least 1, or -1 for all of the data.")
        return found
