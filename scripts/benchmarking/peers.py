"""The other ways to train the same model on the same batches: what users would pick instead."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel

from benchmarking.contenders import (
    ADAMW,
    ENDLESS,
    MAX_NORM,
    Gate,
    Settings,
    build_config,
    build_model,
    endless,
    random_tokens,
    torch_device,
    train_ours,
    train_ours_budget,
    train_ours_eager,
    train_ours_eager_kernels,
    train_ours_kernels,
    train_ours_recompute,
)
from parallelize.kernels.language import launches_on
from transformers_backend.decoder import describe_decoder
from transformers_backend.loss import count_targets, install_loss, shift_labels


def train_hf_trainer(settings: Settings, gate: Gate, *, liger: bool = False) -> None:
    """Transformers' own Trainer: compiled, scaled_dot_product_attention, fused AdamW, its usual full-logits loss.

    liger: with Liger's kernels (https://github.com/linkedin/Liger-Kernel), its loss without logits among them.
    """
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
            use_liger_kernel=liger,
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


def train_hf_trainer_liger(settings: Settings, gate: Gate) -> None:
    train_hf_trainer(settings, gate, liger=True)


def train_bare(settings: Settings, gate: Gate) -> None:
    """A hand-written loop for one device: autocast, whole-model compilation, and this project's chunked loss."""
    model = build_model(settings)
    _install_chunked_loss(model, settings)
    optimizer = _adamw(list(model.parameters()))
    context = torch.autocast(torch_device().type, torch.bfloat16, enabled=settings.precision == "bf16")

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
    batches, device = endless(random_tokens(settings)), torch_device()
    gc.disable()  # as in this project's trainer
    gate.start()
    while True:
        gate.step_done(step(next(batches)["input_ids"].to(device)))


# -- torchtitan --------------------------------------------------------------------------------------------------------


def train_torchtitan(settings: Settings, gate: Gate) -> None:
    """torchtitan's own Llama (its v0.2) the way torchtitan trains it on one device: autocast, compiled layer by layer.

    The loss is its own, of full logits in fp32, compiled too.
    """
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3 import Transformer

    torch.manual_seed(0)
    with torch_device():
        model = Transformer(_torchtitan_arguments(settings))
    with torch.no_grad():
        model.init_weights(buffer_device=torch_device())
    if build_config(settings).tie_word_embeddings:
        model.output.weight = model.tok_embeddings.weight
    compute_loss = cross_entropy_loss
    if settings.compile:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
        compute_loss = torch.compile(cross_entropy_loss)
    optimizer = _adamw(list(model.parameters()))
    context = torch.autocast(torch_device().type, torch.bfloat16, enabled=settings.precision == "bf16")

    def step(input_ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with context:
            loss = compute_loss(model(input_ids), shift_labels(input_ids)) / count_targets(input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.detach()

    _run(step, settings, gate)


def _torchtitan_arguments(settings: Settings) -> Any:
    """The same shape as the Transformers config."""
    from torchtitan.models.llama3 import TransformerModelArgs
    from torchtitan.models.llama3.model.args import RoPEScalingArgs

    config = build_config(settings)
    rope = config.rope_parameters
    scaling = RoPEScalingArgs(scaling_factor=1.0)  # as good as none
    if rope.get("rope_type") == "llama3":
        scaling = RoPEScalingArgs(
            rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"head_dim = {config.head_dim}: torchtitan's Llama has hidden_size / num_attention_heads.")
    return TransformerModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        # It rounds 8 / 3 of the width, times a factor, up to a multiple: that of what is wanted, from a little below.
        multiple_of=config.intermediate_size,
        ffn_dim_multiplier=0.99 * config.intermediate_size / int(8 * config.hidden_size / 3),
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling_args=scaling,
        max_seq_len=settings.seq_len,
    )


CONTENDERS: dict[str, Callable[[Settings, Gate], None]] = {
    "ours": train_ours,
    "ours_kernels": train_ours_kernels,
    "ours_budget": train_ours_budget,
    "ours_recompute": train_ours_recompute,
    "ours_eager": train_ours_eager,
    "ours_eager_kernels": train_ours_eager_kernels,
    "hf_trainer": train_hf_trainer,
    "hf_trainer_liger": train_hf_trainer_liger,
    "torchtitan": train_torchtitan,
    "bare": train_bare,
    "bare_copy": train_bare_copy,
}

_PACKAGES = {
    "hf_trainer": ("accelerate",),
    "hf_trainer_liger": ("accelerate", "liger_kernel"),
    "torchtitan": ("torchtitan",),
}


def why_not_here(name: str) -> str | None:
    """What a contender needs that is not there, or None."""
    missing = [package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if name.endswith("_kernels") and not launches_on(torch_device()):
        return "Triton kernels run on GPUs only"
    return None
