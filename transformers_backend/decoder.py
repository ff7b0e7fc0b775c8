"""What is where in a Transformers causal LM: the only file that probes the structure of a model.

`describe_decoder` finds the embedding, the layer list, the final norm, the rotary embedding and the head once and
declares them by name in a `Decoder`. Everything below (parallelize, loss, weights, verify) works on that
description. A part that a model does not have is `None`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Decoder:
    """Names of a causal LM's parts, relative to the causal LM itself (`hf_model.get_submodule(name)` yields them)."""

    base: str
    """The model without its head, e.g. "model" or "transformer": token ids in, last hidden states out."""
    embedding: str
    """The token embedding."""
    layer_lists: tuple[str, ...]
    """The ModuleLists of decoder layers in the order in which they run; one for nearly all, two for hrm_text."""
    layers: tuple[str, ...]
    """Every decoder layer, e.g. "model.layers.0"."""
    final_norm: str | None
    rotary: str | None
    head: str
    """The module that yields the logits, e.g. "lm_head"."""
    embedding_is_tied: bool
    """Whether embedding and head share one parameter."""
    accepts_position_ids: bool
    """Whether the base takes `position_ids`; alibi and recurrent models do not."""


def check_is_plain(hf_model: PreTrainedModel) -> None:
    """Raise a ValueError for what is no Transformers model as that library made it, on one device."""
    name = type(hf_model).__name__
    if not isinstance(hf_model, PreTrainedModel):
        raise ValueError(
            f"{name}: not a Transformers model (a PreTrainedModel). Pass on what from_pretrained returned, before "
            "accelerator.prepare, DistributedDataParallel, torch.compile or PEFT put something around it."
        )
    if "_original_forward" in vars(hf_model) or any(isinstance(p, DTensor) for p in hf_model.parameters()):
        raise ValueError(
            f"{name}: already prepared by accelerate, or sharded. Pass the model on without accelerator.prepare, "
            "fully_shard or tp_plan: sharding and precision are arguments of .parallelize."
        )
    devices = sorted({str(parameter.device) for parameter in hf_model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"{name}: its parameters lie on several devices ({', '.join(devices)}); training needs them on one. Load "
            "the model without device_map; .parallelize shards it."
        )


def describe_decoder(hf_model: PreTrainedModel) -> Decoder:
    """Describe a causal LM, or raise a ValueError that says which part was not found."""
    names = {module: name for name, module in hf_model.named_modules()}
    # `get_decoder` is deeper where the head calls a part of the base (OPT's `model.decoder`), but some models have an
    # output layer by that name (ModernBERT's).
    candidates = [module for module in (hf_model.get_decoder(), hf_model.base_model) if module is not hf_model]
    base = next((module for module in candidates if module is not None and _find_layer_lists(module)), None)
    if base is None:
        raise ValueError(
            f"{type(hf_model).__name__}: no list of decoder layers below a head was found; a causal LM class is needed "
            "(AutoModelForCausalLM gives one)."
        )
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    if embedding is None or head is None:
        missing = "input embedding" if embedding is None else "output head"
        raise ValueError(f"{type(hf_model).__name__}: the model declares no {missing}, so it cannot be trained here.")
    layer_lists = _find_layer_lists(base)
    siblings = _siblings(base, layer_lists[0])
    return Decoder(
        base=names[base],
        embedding=names[embedding],
        layer_lists=tuple(names[layers] for layers in layer_lists),
        layers=tuple(names[layer] for layers in layer_lists for layer in layers),
        final_norm=_find_final_norm(siblings, layer_lists, names),
        rotary=next((names[m] for m in [*siblings, *base.children()] if "rotary" in type(m).__name__.lower()), None),
        head=names[head],
        embedding_is_tied=getattr(embedding, "weight", None) is getattr(head, "weight", embedding),
        accepts_position_ids="position_ids" in inspect.signature(base.forward).parameters,
    )


def _find_layer_lists(base: nn.Module) -> list[nn.ModuleList]:
    """Outermost ModuleLists of composite modules.

    Lists of plain modules (gemma3n's projections are bare Linears) are no decoder layers, and neither is a list
    inside a layer.
    """
    found: list[nn.ModuleList] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and all(any(item.children()) for item in child):
                found.append(child)
            else:
                visit(child)

    visit(base)
    return found


def _siblings(base: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """The children of the module that owns the layer list (`model.decoder` in OPT), in registration order."""
    owner = next(module for module in base.modules() if any(child is layers for child in module.children()))
    return list(owner.children())


def _find_final_norm(siblings: list[nn.Module], layer_lists: list[nn.ModuleList], names: dict) -> str | None:
    """The first norm registered after the layers, or else the last before them (OPT registers its own early)."""
    if len(layer_lists) > 1:
        return None
    position = siblings.index(layer_lists[0])
    norms = [(index, module) for index, module in enumerate(siblings) if "norm" in type(module).__name__.lower()]
    after = [module for index, module in norms if index > position]
    before = [module for index, module in norms if index < position]
    final = after[0] if after else before[-1] if before else None
    return None if final is None else names[final]


def learned_positions(hf_model: PreTrainedModel, decoder: Decoder) -> int | None:
    """Longest sequence that a table of learned positions allows (GPT-2, OPT ...); None for a model without one."""
    for name, module in hf_model.get_submodule(decoder.base).named_modules():
        if isinstance(module, nn.Embedding) and ("pos" in name or name.endswith("wpe")):
            return module.num_embeddings - getattr(module, "offset", 0)  # OPT keeps its first rows for padding
    return None


def rotaries_by_length(hf_model: PreTrainedModel) -> list[nn.Module]:
    """Rotary embeddings that choose their frequencies by the latest position that they are given (Transformers'
    `dynamic_rope_update`). Their `rope_type` is one name, or one for each kind of layer."""

    def chooses(kinds: str | dict[str, str]) -> bool:
        names = kinds.values() if isinstance(kinds, dict) else [kinds]
        return any("dynamic" in name or name == "longrope" for name in names)

    return [module for module in hf_model.modules() if chooses(getattr(module, "rope_type", ""))]


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def parameter_kind(name: str, hf_model: PreTrainedModel, decoder: Decoder) -> str:
    """What a parameter belongs to: "embedding", "attention", "mlp", "norms", "head" or "other"; for people to read."""
    owner = name.rpartition(".")[0]
    if is_norm(hf_model.get_submodule(owner)):
        return "norms"
    if owner == decoder.head and not decoder.embedding_is_tied:
        return "head"
    if isinstance(hf_model.get_submodule(owner), nn.Embedding):  # of tokens or positions
        return "embedding"
    layer = next((layer for layer in decoder.layers if name.startswith(f"{layer}.")), None)
    if layer is None:
        return "other"
    within = name.removeprefix(f"{layer}.").lower()
    return "attention" if "attn" in within or "attention" in within else "mlp" if "." in within else "other"


def recomputes_layers(hf_model: PreTrainedModel) -> bool:
    """Whether Transformers' own gradient checkpointing is on; its property has another name in newer versions."""
    return any(getattr(module, "gradient_checkpointing", False) for module in hf_model.modules())


def has_dropout(hf_model: PreTrainedModel) -> bool:
    """Whether the model draws random numbers in training: in modules, or in functions with a probability of the config.

    Modules that stand unused beside a causal LM (GPT-2's summary, classifiers) do not count.
    """
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in hf_model.modules()):
        return True
    return any(dropout_fields(hf_model.config.to_dict()))


def dropout_fields(fields: dict) -> Iterator[tuple[tuple[str, ...], float]]:
    """(path, value) of every positive probability of dropping in a config or in one nested in it."""
    for name, value in fields.items():
        if str(name).startswith(("summary_", "classifier_")):
            continue
        if isinstance(value, dict):
            yield from (((name, *path), inner) for path, inner in dropout_fields(value))
        elif isinstance(value, float) and value > 0 and ("dropout" in name or "pdrop" in name):
            yield (name,), value


def drops_layers(hf_model: PreTrainedModel) -> bool:
    """Whether training skips whole layers at random (OPT, BioGPT and XGLM with `layerdrop`)."""
    return bool(hf_model.config.to_dict().get("layerdrop"))
