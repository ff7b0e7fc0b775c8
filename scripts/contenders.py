"""What scripts/benchmark.py compares: three (and a half) ways to train the same model on the same batches.

Each contender is a function that builds everything and then trains until its `Gate` stops it. They share the model
class and config, fp32 weights, bf16 computation where asked for, AdamW's numbers and kernel, and gradient clipping.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from transformers_backend.decoder import describe_decoder
from transformers_backend.job_config import JobConfig
from transformers_backend.loss import count_targets, install_loss, shift_labels
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
        self._remaining, self._start = 0, 0.0
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
        self._connection.send({"seconds": seconds, "loss": float(loss), "peak_memory": peak_memory()})
        if loss.is_cuda:
            torch.cuda.empty_cache()  # the device is the next contender's now; that is why a block's first step is free
        self._wait()

    def _wait(self) -> None:
        self._remaining = self._connection.recv()
        if self._remaining == 0:
            raise Finished
        reset_peak_memory()
        self._start = time.perf_counter()


# -- memory, in bytes: allocated on the CUDA device, else resident in RAM ------------------------------------------


def peak_memory() -> int:
    """Largest use since `reset_peak_memory`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _process_status("VmHWM")


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS


def resident_memory() -> int:
    """What the process holds now: what the imported libraries cost, before a model exists."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _process_status("VmRSS")


def _process_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# -- what they share -------------------------------------------------------------------------------------------------


def build_config(settings: Settings) -> Any:
    """The Transformers config, made as the trainer makes it."""
    return override_config(CONFIG_MAPPING[settings.model_type](), settings.config)


def build_model(settings: Settings) -> PreTrainedModel:
    torch.manual_seed(0)
    with _device():
        return AutoModelForCausalLM.from_config(build_config(settings), dtype=torch.float32).train()


def random_tokens(settings: Settings) -> torch.Tensor:
    """(batches, batch, seq) int64 on the CPU, the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    shape = (DISTINCT_BATCHES, settings.batch_size, settings.seq_len)
    return torch.randint(build_config(settings).vocab_size, shape, generator=generator)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- the contenders --------------------------------------------------------------------------------------------------


def train_ours(settings: Settings, gate: Gate) -> None:
    """This project's trainer as scripts/train.sh runs it, on one rank; only the text is replaced by random tokens."""
    tokens = random_tokens(settings)

    class GatedTrainer(Trainer):
        def train_step(self) -> StepResult:
            result = super().train_step()
            gate.step_done(result.loss)
            return result

    with tempfile.TemporaryDirectory() as folder:
        trainer = GatedTrainer(_job_config(settings, Path(folder)))
        trainer.data = _endless(tokens)
        try:
            gate.start()
            trainer.train()
        finally:
            trainer.close()


def _job_config(settings: Settings, folder: Path) -> JobConfig:
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
    config.metrics.log_freq = ENDLESS
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 0, 0.0
    for name, value in ADAMW.items():
        setattr(config.optimizer, name, value)
    return config


def _endless(tokens: torch.Tensor):
    while True:
        for batch in tokens:
            yield {"input_ids": batch, "labels": batch}


def train_hf_trainer(settings: Settings, gate: Gate) -> None:
    """Transformers' own Trainer, with its usual full-logits loss."""
    import transformers

    tokens = random_tokens(settings).flatten(0, 1)

    class Sequences(Dataset):
        def __len__(self) -> int:
            return ENDLESS

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            sequence = tokens[index % len(tokens)]
            return {"input_ids": sequence, "labels": sequence}

    class GatedTrainer(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)  # the others' order

        def training_step(self, *args, **kwargs) -> torch.Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    class Stepping(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs) -> None:
            gate.start()

        def on_step_end(self, *args, **kwargs) -> None:
            gate.step_done(trainer.last_loss)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            max_steps=ENDLESS // settings.batch_size,
            bf16=settings.precision == "bf16",
            torch_compile=settings.compile,
            optim="adamw_torch_fused",
            learning_rate=ADAMW["lr"],
            adam_beta1=ADAMW["beta1"],
            adam_beta2=ADAMW["beta2"],
            adam_epsilon=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
            max_grad_norm=MAX_NORM,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = GatedTrainer(
            model=build_model(settings), args=arguments, train_dataset=Sequences(), callbacks=[Stepping()]
        )
        trainer.train()


def train_bare(settings: Settings, gate: Gate) -> None:
    """A hand-written loop for one device: autocast, whole-model compilation, and this project's chunked loss."""
    model = build_model(settings)
    _install_chunked_loss(model, settings)
    optimizer = _adamw(list(model.parameters()))
    context = torch.autocast(_device().type, torch.bfloat16, enabled=settings.precision == "bf16")

    def step(input_ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with context:
            loss = model(input_ids=input_ids, targets=shift_labels(input_ids)) / count_targets(input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.detach()

    _run(step, settings, gate)


def train_bare_copy(settings: Settings, gate: Gate) -> None:
    """The same by hand with a bf16 model to compute with, beside fp32 master weights that the optimizer updates."""
    model = build_model(settings)
    working = list(model.parameters())
    masters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in working]
    for parameter in working if settings.precision == "bf16" else []:
        parameter.data = parameter.data.bfloat16()  # parameters only: rotary frequencies stay fp32
    _install_chunked_loss(model, settings)
    optimizer = _adamw(masters)

    def step(input_ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=input_ids, targets=shift_labels(input_ids)) / count_targets(input_ids)
        loss.backward()
        for master, parameter in zip(masters, working, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(working, masters)
        return loss.detach()

    _run(step, settings, gate)


def _install_chunked_loss(model: PreTrainedModel, settings: Settings) -> None:
    decoder = describe_decoder(model)
    install_loss(model, decoder, chunked=True, compile_backend="inductor" if settings.compile else None)
    if settings.compile:
        model.get_submodule(decoder.base).compile()


def _adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=ADAMW["lr"], betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=ADAMW["eps"], fused=True
    )


def _run(step: Callable[[torch.Tensor], torch.Tensor], settings: Settings, gate: Gate) -> None:
    batches, device = _endless(random_tokens(settings)), _device()
    gc.disable()  # as in this project's trainer
    gate.start()
    while True:
        gate.step_done(step(next(batches)["input_ids"].to(device)))


CONTENDERS: dict[str, Callable[[Settings, Gate], None]] = {
    "ours": train_ours,
    "hf_trainer": train_hf_trainer,
    "bare": train_bare,
    "bare_copy": train_bare_copy,
}


def why_not_installed(name: str) -> str | None:
    """The package that a contender needs and that is not there, or None."""
    needed = "accelerate" if name == "hf_trainer" else None
    return None if needed is None or importlib.util.find_spec(needed) else f"{needed} is not installed"
