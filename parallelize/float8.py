"""Linears that multiply in float8, by torchao: an approximation, which a user asks for by name.

Comes first of all that changes a model (`parallelize/model.py`): a linear gives its place to one of torchao's, with the
same name and the same parameters, which kernels, tensor parallelism, recomputation, the compiler and FSDP2 then treat
like any other. Input, weight and the output's gradient are scaled and rounded anew for each product. torchao is
imported when a linear is converted, and not before.

Which linears of a model can be converted is decided where models are known (`transformers_backend/float8_plan.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from dataclasses import dataclass

import torch
from torch import nn

from parallelize.tensor_parallel.plan import Split

LEAST_TORCHAO = (0, 18)
"""Older ones lack a remedy for compiled code that writes float8 numbers wrongly (triton-lang/triton#11111)."""

LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply in float8."""

MULTIPLE = 16
"""Of which both sizes of a float8 matrix must be multiples."""


@dataclass(frozen=True)
class Float8Linears:
    """Linears to convert, and how."""

    names: frozenset[str]
    recipe: str
    """One of `parallelize.config.FLOAT8_RECIPES`."""
    emulate: bool = False
    """Round to float8 and multiply in fp32, which any device can: for tests."""

    @property
    def tokens_multiple(self) -> int:
        """Of what the tokens of a forward that has a backward must be a multiple: the gradient of a weight is a product
        over tokens."""
        return 1 if self.recipe == "rowwise_with_gw_hp" else MULTIPLE


def apply_float8(model: nn.Module, linears: Float8Linears) -> None:
    """Convert the linears of `model` that are named, of those that this rank has, in place."""
    # Their kernels are there once torchao is imported.
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(linears.recipe), emulate=linears.emulate)
    is_training = {name: module.training for name, module in model.named_modules() if name in linears.names}
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in is_training, config=config)
    for name, training in is_training.items():
        model.get_submodule(name).train(training)


def is_float8(module: nn.Module) -> bool:
    """Whether it is one of torchao's, in the place of a linear."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("torchao.float8.")


def missing_for_float8(
    device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype, torchao: str | None
) -> list[str]:
    """The sentences for what a run in float8 lacks.

    capability: compute capability of the CUDA device. dtype: of the computation. torchao: its version, None without.
    """
    key = "float8.enable = true"
    found = []
    if torchao is None or _numbers(torchao) < LEAST_TORCHAO:
        has = "is not installed" if torchao is None else f"is {torchao}"
        least = ".".join(map(str, LEAST_TORCHAO))
        found.append(f'{key}: needs torchao >= {least}, which {has}; pip install -e ".[float8]".')
    if device_type != "cuda" or capability < LEAST_CAPABILITY:
        has = f"a {device_type}" if capability is None else f"a GPU of {capability[0]}.{capability[1]}"
        found.append(
            f"{key}: needs a GPU of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or higher (Ada, "
            f"Hopper, Blackwell), and this is {has}; set it to false."
        )
    # What "auto" is on a CPU is no mistake of its own.
    if dtype != torch.bfloat16 and device_type == "cuda":
        found.append(
            f"{key} with computation in {str(dtype).removeprefix('torch.')}: goes with bfloat16; set "
            'training.mixed_precision_param = "bfloat16" (param_dtype of .parallelize), or float8.enable = false.'
        )
    return found


def torchao_version() -> str | None:
    try:
        return importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def sizes_on_a_rank(linear: nn.Linear, split: Split | None, degree: int) -> tuple[int, int]:
    """(in, out) features of a linear of the whole model on one of `degree` tensor-parallel ranks."""
    if split is not None and split.style == "rowwise":
        return linear.in_features // degree, linear.out_features
    if split is None or split.style != "colwise":
        return linear.in_features, linear.out_features
    if not split.segments:
        return linear.in_features, linear.out_features // degree
    parts = (part.size // (part.heads if part.is_shared(degree) else degree) for part in split.segments)
    return linear.in_features, sum(parts)
