"""One way to train a model: what is trained, the gate that starts and stops it, and this project's trainer.

Each contender is a function that builds everything and then trains until its `Gate` stops it. All share the model
(Transformers' class, but for torchtitan), fp32 weights, bf16 computation where asked for, AdamW's numbers and kernel,
and gradient clipping. The others are in peers.py.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from benchmarking.machine import peak_memory, reset_peak_memory, resident_memory
from parallelize.config import KERNELS
from transformers_backend.job_config import JobConfig
from transformers_backend.model_args import override_config
from transformers_backend.trainer import StepResult, Trainer

ADAMW = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
DISTINCT_BATCHES = 8
ENDLESS = 10**6  # steps; the gate stops a contender long before


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, the same for every contender."""

    model_type: str
    config: dict[str, Any]
    """Fields of the Transformers config."""
    batch_size: int
    seq_len: int
    precision: str
    """Dtype of the computation, "bf16" or "fp32"; weights and optimizer state are fp32."""
    compile: bool
    threads: int
    """Of torch on the CPU."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


class Finished(Exception):
    """Raised out of a contender's training loop when the benchmark has what it needs."""


class Gate:
    """Lets a contender train a number of steps at a time, so that only one of them computes at any moment.

    The benchmark sends the number of steps of the next block (0 ends the contender); the gate answers when they are
    done. Between blocks nothing of the contender runs.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._remaining, self._start, self._cpu_start = 0, 0.0, 0.0
        self._imports = resident_memory()

    def start(self) -> None:
        """Call when everything is built, right before the first step."""
        self._connection.send({"imports_memory": self._imports})
        self._wait()

    def step_done(self, loss: torch.Tensor) -> None:
        """Call after every step, with its mean loss; returns when the next step may begin."""
        self._remaining -= 1
        if self._remaining > 0:
            return
        if loss.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        processor = time.process_time() - self._cpu_start
        report = {"seconds": seconds, "cpu_seconds": processor, "loss": float(loss), "peak_memory": peak_memory()}
        self._connection.send(report)
        if loss.is_cuda:
            torch.cuda.empty_cache()  # the device is the next contender's now; that is why a block's first step is free
        self._wait()

    def _wait(self) -> None:
        self._remaining = self._connection.recv()
        if self._remaining == 0:
            raise Finished
        reset_peak_memory()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()


# -- what they share ---------------------------------------------------------------------------------------------------


def build_config(settings: Settings) -> Any:
    """The Transformers config, made as the trainer makes it."""
    return override_config(CONFIG_MAPPING[settings.model_type](), settings.config)


def build_model(settings: Settings) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch_device():
        return AutoModelForCausalLM.from_config(
            build_config(settings), dtype=torch.float32, attn_implementation="sdpa"
        ).train()


def random_tokens(settings: Settings) -> torch.Tensor:
    """(batches, batch, seq) int64 on the CPU, the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    shape = (DISTINCT_BATCHES, settings.batch_size, settings.seq_len)
    return torch.randint(build_config(settings).vocab_size, shape, generator=generator)


def endless(tokens: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        for batch in tokens:
            yield {"input_ids": batch, "labels": batch}


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- this project ------------------------------------------------------------------------------------------------------


def train_ours(
    settings: Settings, gate: Gate, *, kernels: tuple[str, ...] = ("auto",), recompute: str = "none"
) -> None:
    """This project's trainer as scripts/train.sh runs it, on one rank; only the text is replaced by random tokens."""
    tokens = random_tokens(settings)

    class GatedTrainer(Trainer):
        def train_step(self) -> StepResult:
            result = super().train_step()
            gate.step_done(result.loss)
            return result

    with tempfile.TemporaryDirectory() as folder:
        trainer = GatedTrainer(_job_config(settings, kernels, recompute, Path(folder)))
        trainer.data = endless(tokens)
        try:
            gate.start()
            trainer.train()
        finally:
            trainer.close()


def train_ours_budget(settings: Settings, gate: Gate) -> None:
    train_ours(settings, gate, recompute="memory_budget" if settings.compile else "none")


def train_ours_recompute(settings: Settings, gate: Gate) -> None:
    train_ours(settings, gate, recompute="full")


def train_ours_kernels(settings: Settings, gate: Gate) -> None:
    train_ours(settings, gate, kernels=KERNELS)


def train_ours_eager(settings: Settings, gate: Gate) -> None:
    train_ours(dataclasses.replace(settings, compile=False), gate, kernels=("none",))


def train_ours_eager_kernels(settings: Settings, gate: Gate) -> None:
    train_ours(dataclasses.replace(settings, compile=False), gate, kernels=KERNELS)


def _job_config(settings: Settings, kernels: tuple[str, ...], recompute: str, folder: Path) -> JobConfig:
    text = folder / "text.txt"
    text.write_text("Replaced by random tokens. " * settings.seq_len)
    config = JobConfig()
    config.job.dump_folder = str(folder)
    config.model.hf_assets_path = "byt5"
    config.hf_transformers.model_type = settings.model_type
    config.hf_transformers.config_overrides = settings.config
    config.training.dataset_path = str(text)
    config.training.local_batch_size, config.training.seq_len = settings.batch_size, settings.seq_len
    config.training.steps, config.training.max_norm = ENDLESS, MAX_NORM
    config.training.mixed_precision_param = "bfloat16" if settings.precision == "bf16" else "float32"
    config.compile.enable = settings.compile
    config.kernels.enable = list(kernels)
    config.activation_checkpoint.mode = recompute
    config.activation_checkpoint.memory_budget = 0.9
    config.metrics.log_freq = ENDLESS
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    for name, value in ADAMW.items():
        setattr(config.optimizer, name, value)
    return config
