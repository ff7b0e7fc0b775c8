"""Which linears of a model multiply in float8: those of its layers that are plain, wide enough and nobody else's.

    the twin -> which linears are read by no code but their own forward
    the model -> of these, the ones whose sizes on a rank float8 can do, and that the user did not exclude
    the twin, converted as the model will be, compiled if it will be, on the run's device -> is it still close?
            -> {names} -> parallelize/float8.py

The head and whatever else is outside of the layers stays as it is. Float8 is an approximation: the last step does not
ask for equality, but refuses a model whose gradients become other ones.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from parallelize.compile import COMPILE_ERRORS, apply_compile, compiled_for_now
from parallelize.config import ActivationCheckpointConfig, CompileConfig, Float8Config, check
from parallelize.distributed import first_reason
from parallelize.float8 import (
    MULTIPLE,
    Float8Linears,
    apply_float8,
    missing_for_float8,
    sizes_on_a_rank,
    torchao_version,
)
from parallelize.kernels.replace import has_hooks, has_own_forward
from parallelize.mixed_precision import parameters_cast_to
from parallelize.tensor_parallel import TensorPlan
from transformers_backend.decoder import Decoder, describe_decoder
from transformers_backend.proof import example_batch, gradients, loss_and_gradients, recompute
from transformers_backend.tensor_plan.matrices import is_matrix
from transformers_backend.twin import build_twin

logger = logging.getLogger(__name__)

LEAST_COSINE = 0.975
"""Between all gradients of the twin in float8 and in fp32. Dense types that have linears of torch have 0.983 or more,
but for four with 0.967 or less, whose gradients in bf16 are ten times as far off as others'."""

LOSS_TOLERANCE = 1e-2
"""Relative."""


@dataclass
class Float8Plan:
    """Which linears multiply in float8, and which do not."""

    linears: Float8Linears | None = None
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many linears there are of (name within a layer, recipe or why it stays as it is)."""


def choose_float8(
    hf_model: PreTrainedModel,
    config: Float8Config,
    device: torch.device,
    dtype: torch.dtype,
    *,
    attn_implementation: str | None,
    tensor_plan: TensorPlan | None,
    compile: CompileConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    emulate: bool = False,
) -> Float8Plan:
    """The linears of a whole model that multiply in float8; a ValueError where they cannot. Changes nothing.

    device, dtype: of the computation. tensor_plan: how weights are split over ranks. compile, activation_checkpoint: of
    the layers. emulate: on any device, for tests. Every rank calls this, and all refuse alike.
    """
    if not config.enable:
        return Float8Plan()
    if not emulate:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        check(missing_for_float8(device.type, capability, dtype, torchao_version()))
    compiles = compile.enable and "model" in compile.components
    if not compiles:
        logger.warning(
            "float8.enable = true without compiled layers is slower than bf16: each scaling and rounding is a kernel "
            "of its own. Set compile.enable = true."
        )
    twin = build_twin(hf_model.config, type(hf_model), attn_implementation=attn_implementation)
    roles = find_roles(twin)
    plan = find_linears(hf_model, config, roles, tensor_plan, emulate=emulate)
    converted = {_role(name, describe_decoder(hf_model)) for name in plan.linears.names}
    in_twin = Float8Linears(_names(twin, converted), config.recipe, emulate)
    proof = _Proof(hf_model, in_twin, attn_implementation, device, dtype)
    reason = first_reason(proof.why_not(activation_checkpoint, compile.backend if compiles else None))
    if reason is not None:
        raise ValueError(
            f'float8.enable = true with recipe = "{config.recipe}": {type(hf_model).__name__} in float8 computes '
            f"something else on its twin ({reason}). Take a more precise recipe, name what should stay as it is in "
            "float8.exclude, or set float8.enable = false."
        )
    return plan


# -- which linears ----------------------------------------------------------------------------------------------------


class _Watched(nn.Linear):
    """A linear that notes whether anybody but its own forward reads its parameters."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["_runs"] = True
        return F.linear(input, self._parameters["weight"], self._parameters["bias"])

    def __getattr__(self, name: str):
        if name in ("weight", "bias"):
            self.__dict__["_is_read"] = True
        return super().__getattr__(name)

    def why_not(self) -> str | None:
        if "_is_read" in vars(self):
            return "other code reads its weights"
        if "_runs" not in vars(self):
            return "does not run"
        sizes = self.in_features, self.out_features
        return None if _fit(sizes) else f"cannot be tried on the small copy, where it {_badly_sized(sizes)}"


@torch.no_grad()
def find_roles(twin: PreTrainedModel) -> dict[str, str | None]:
    """For the place of each plain linear in a layer, why it cannot be converted, or None. The twin is used up."""
    decoder = describe_decoder(twin)
    watched = [
        (role, module)
        for name, module in twin.named_modules()
        if type(module) is nn.Linear and (role := _role(name, decoder)) is not None
    ]
    for _, module in watched:
        module.__class__ = _Watched
    twin(input_ids=example_batch()[0], use_cache=False)
    found: dict[str, str | None] = {}
    for role, module in watched:
        found[role] = found.get(role) or module.why_not()
    return found


def find_linears(
    hf_model: PreTrainedModel,
    config: Float8Config,
    roles: dict[str, str | None],
    tensor_plan: TensorPlan | None,
    *,
    emulate: bool,
) -> Float8Plan:
    """The linears to convert; a ValueError where there are none, or none that `float8.exclude` means."""
    decoder, shared = describe_decoder(hf_model), _shared(hf_model)
    plan, names = Float8Plan(), set()
    unused = set(config.exclude)

    def why_not(name: str, module: nn.Module, role: str | None) -> str | None:
        if role is None:
            return "the head" if name == decoder.head else "outside of the layers"
        excluding = [part for part in config.exclude if part in name]
        unused.difference_update(excluding)
        if excluding:
            return "excluded"
        if type(module) is not nn.Linear:
            return f"is a {type(module).__name__}, not torch's Linear"
        if has_own_forward(module) or has_hooks(module):
            return "has hooks, or a forward that is not its class's"
        if name in shared:
            return "shares its weights with another module"
        if (reason := roles.get(role, "its small copy has none")) is not None:
            return reason
        sizes = sizes_on_a_rank(module, *_split_of(name, tensor_plan))
        return None if _fit(sizes) else f"{_badly_sized(sizes)}{'' if tensor_plan is None else ' on a rank'}"

    for name, module in hf_model.named_modules():
        if is_matrix(module):
            role = _role(name, decoder)
            reason = why_not(name, module, role)
            plan.kinds[role or name, reason or f"float8, {config.recipe}"] += 1
            names.update({name} if reason is None else ())
    if unused:
        places = ", ".join(sorted(role for role in roles))
        raise ValueError(
            f"float8.exclude has {', '.join(map(repr, sorted(unused)))}: no linear of a layer has that in its name. "
            f"There are, after the number of the layer: {places}."
        )
    if not names:
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in plan.kinds)
        raise ValueError(
            f"float8.enable = true: {type(hf_model).__name__} has no linear that could multiply in float8 ({reasons}). "
            "Set it to false."
        )
    plan.linears = Float8Linears(frozenset(names), config.recipe, emulate)
    return plan


def _role(name: str, decoder: Decoder) -> str | None:
    """The name of a module within its layer; None outside of the layers."""
    return next((name.removeprefix(f"{layer}.") for layer in decoder.layers if name.startswith(f"{layer}.")), None)


def _names(model: PreTrainedModel, roles: Collection[str]) -> frozenset[str]:
    decoder = describe_decoder(model)
    return frozenset(name for name, _ in model.named_modules() if _role(name, decoder) in roles)


def _shared(model: nn.Module) -> set[str]:
    """Names of the modules that have another name, too, or whose weight another module has."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _split_of(name: str, plan: TensorPlan | None) -> tuple:
    return (None, 1) if plan is None else (plan.splits.get(name), plan.degree)


def _fit(sizes: tuple[int, int]) -> bool:
    return all(size % MULTIPLE == 0 for size in sizes)


def _badly_sized(sizes: tuple[int, int]) -> str:
    return f"is {sizes[1]} x {sizes[0]}, no multiples of {MULTIPLE}"


# -- is it still close? -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Proof:
    hf_model: PreTrainedModel
    linears: Float8Linears
    """Of the twin."""
    attn_implementation: str | None
    device: torch.device
    dtype: torch.dtype

    @torch.enable_grad()
    def why_not(self, activation_checkpoint: ActivationCheckpointConfig, backend: str | None) -> str | None:
        """How the twin in float8 differs from itself in fp32 on the device; backend: that compiles layers, or None."""
        exact = self._run(self._twin())
        twin = self._twin()
        apply_float8(twin, self.linears)
        layers = [twin.get_submodule(name) for name in describe_decoder(twin).layers]
        recompute(layers, activation_checkpoint)
        try:
            with compiled_for_now() if backend else nullcontext(), warnings.catch_warnings():
                # Of casts, which have none; the compiler reads it, too, and would take an error for a failure.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                if backend:
                    apply_compile(layers, backend=backend)
                with parameters_cast_to(twin, self.dtype):
                    loss, _ = self._run(twin)
        except (*COMPILE_ERRORS, RuntimeError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return how_far(exact, (loss, gradients(twin)))

    def _twin(self) -> PreTrainedModel:
        twin = build_twin(self.hf_model.config, type(self.hf_model), attn_implementation=self.attn_implementation)
        return twin.to(self.device)

    def _run(self, twin: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
        batch = (tensor.to(self.device) for tensor in example_batch())  # 48 tokens, a multiple of 16
        return loss_and_gradients(twin, *batch, chunked=False)


def how_far(exact: tuple[float, dict[str, torch.Tensor]], found: tuple[float, dict[str, torch.Tensor]]) -> str | None:
    """A sentence on the loss or the direction of the gradients where these are not close, or None."""
    if not abs(found[0] - exact[0]) <= LOSS_TOLERANCE * abs(exact[0]):
        return f"loss {found[0]:.4f} instead of {exact[0]:.4f}"
    pairs = [(gradient, found[1].get(name, torch.zeros_like(gradient))) for name, gradient in exact[1].items()]
    ours, theirs = (torch.cat([pair[side].double().flatten() for pair in pairs]) for side in (1, 0))
    cosine = F.cosine_similarity(ours, theirs, dim=0).item()
    if not cosine >= LEAST_COSINE:
        return f"the cosine between its gradients and those in fp32 is {cosine:.3f}, and must be {LEAST_COSINE} or more"
    length = (ours.norm() / theirs.norm()).item()
    return None if 0.8 <= length <= 1.25 else f"its gradients are {length:.2f} times as long as in fp32"


def check_tokens(tokens: int, linears: Float8Linears | None, parts: int) -> None:
    """A ValueError where the tokens of a micro-batch, over so many ranks that share them, are not what float8 needs."""
    if linears is None or linears.tokens_multiple == 1:
        return
    multiple = linears.tokens_multiple * parts
    if tokens % multiple:
        raise ValueError(
            f"A micro-batch of {tokens} tokens: for float8 their number must be a multiple of {multiple}, because the "
            "gradient of a weight is a product over tokens. Change training.seq_len or local_batch_size, or set "
            'float8.recipe = "rowwise_with_gw_hp", which computes those in bf16.'
        )
