"""What `parallelize/costs.py` needs to know about an HF model to count its FLOPs: parameters and attention shapes.

FLOPs are counted layer by layer, for a pipeline to be split by them, and their sum is what a whole model needs. Count
them before a model is split into stages: afterwards its rank has only some of the parameters.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.costs import AttentionCost, training_flops_per_token
from transformers_backend.decoder import Decoder
from transformers_backend.twin import build_twin

_BEFORE, _AFTER = "before the layers", "after the layers"  # beside the layers' names


class ModelFlops(NamedTuple):
    """FLOPs of training on one token, forward and backward, by the formula in `parallelize/costs.py`."""

    layers: list[float]
    """Of each decoder layer, all its runs together, in the order of `Decoder.layers`."""
    before_layers: float
    """Of what runs before them: 0 where tables are only looked up."""
    after_layers: float
    """Of what runs after them: final norm, projections and the head."""

    @property
    def total(self) -> float:
        return sum(self.layers) + self.before_layers + self.after_layers


def model_flops_per_token(hf_model: PreTrainedModel, decoder: Decoder, seq_len: int) -> float:
    """FLOPs of training on one token, forward and backward, by the formula in `parallelize/costs.py`."""
    return _count_flops(hf_model, decoder, seq_len, modules_after={decoder.head}).total


def layer_flops(hf_model: PreTrainedModel, decoder: Decoder, seq_len: int) -> ModelFlops:
    """The same layer by layer, and of what runs before and after the layers; works on a meta model.

    What lies beside the layers counts where it runs, which is found out on the twin where the model has more of it than
    embedding, final norm and head (OPT's projections, the norm behind BLOOM's embedding). What runs in between, or more
    than once, counts where it runs first.
    """
    known = {decoder.head, *([decoder.final_norm] if decoder.final_norm else [])}
    unknown = _modules_beside_layers(hf_model, decoder) - known
    after = known | (_modules_after_layers(hf_model, decoder) & unknown if unknown else set())
    return _count_flops(hf_model, decoder, seq_len, modules_after=after)


def _count_flops(
    hf_model: PreTrainedModel, decoder: Decoder, seq_len: int, modules_after: Collection[str]
) -> ModelFlops:
    attention = _attention_of_layers(hf_model.config, len(decoder.layers))
    runs = layer_runs(hf_model.config, decoder)
    parameters = _matmul_parameters_by_place(hf_model, decoder, modules_after)
    layers = [
        training_flops_per_token(
            matmul_parameters=runs[name] * parameters[name],
            attention=[cost] * runs[name] if cost else [],
            seq_len=seq_len,
        )
        for name, cost in zip(decoder.layers, attention, strict=True)
    ]
    beside = [
        training_flops_per_token(matmul_parameters=parameters[place], attention=[], seq_len=seq_len)
        for place in (_BEFORE, _AFTER)
    ]
    return ModelFlops(layers, *beside)


def _matmul_parameters_by_place(
    hf_model: PreTrainedModel, decoder: Decoder, modules_after: Collection[str]
) -> dict[str, int]:
    """Parameters that multiply every token, by the layer that has them, or _BEFORE or _AFTER."""
    counts = dict.fromkeys((*decoder.layers, _BEFORE, _AFTER), 0)
    tables = _tables(hf_model, decoder)
    head_weight = hf_model.get_submodule(decoder.head).weight
    for name, parameter in hf_model.named_parameters():  # a shared parameter once, by its first name
        if parameter in tables:
            continue
        owner = name.rpartition(".")[0]
        layer = _layer_of(owner, decoder)
        after = owner in modules_after or parameter is head_weight  # a tied table multiplies as the head
        counts[layer or (_AFTER if after else _BEFORE)] += parameter.numel()
    return counts


def _layer_of(module_name: str, decoder: Decoder) -> str | None:
    """The decoder layer that a module is or lies in."""
    parts = module_name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix in decoder.layers), None)


def _modules_beside_layers(hf_model: PreTrainedModel, decoder: Decoder) -> set[str]:
    """Modules with parameters of their own that multiply and that lie in no layer."""
    tables = _tables(hf_model, decoder)
    head_weight = hf_model.get_submodule(decoder.head).weight
    return {
        name.rpartition(".")[0]
        for name, parameter in hf_model.named_parameters()
        if parameter not in tables and parameter is not head_weight and _layer_of(name, decoder) is None
    }


def _modules_after_layers(hf_model: PreTrainedModel, decoder: Decoder) -> set[str]:
    """Names of the modules beside the layers that the twin's forward calls when a layer has already been called."""
    twin = build_twin(hf_model.config, type(hf_model))
    layers_began, seen, after = False, set(), set()

    def note(name: str) -> None:
        nonlocal layers_began
        if _layer_of(name, decoder) is not None:
            layers_began = True
        elif name not in seen:
            seen.add(name)
            if layers_began:
                after.add(name)

    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: note(name))
    with torch.no_grad():
        twin(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return after


def layer_runs(hf_config: PreTrainedConfig, decoder: Decoder) -> dict[str, int]:
    """How often each layer runs in one forward: once, but for the two looped stacks of hrm_text."""
    fields = hf_config.to_dict()
    slow, fast = fields.get("H_cycles", 1), fields.get("L_cycles", 1)
    return {
        name: slow * fast if ".L_module." in name else slow if ".H_module." in name else 1 for name in decoder.layers
    }


def count_matmul_parameters(hf_model: PreTrainedModel, decoder: Decoder) -> int:
    """Parameters that multiply every token: all but tables that are only looked up (a tied table is the head)."""
    return sum(_matmul_parameters_by_place(hf_model, decoder, modules_after=()).values())


def _tables(hf_model: PreTrainedModel, decoder: Decoder) -> set[nn.Parameter]:
    """Weights that are only looked up."""
    head_weight = hf_model.get_submodule(decoder.head).weight
    return {
        module.weight
        for module in hf_model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not head_weight
    }


def attention_costs(hf_config: PreTrainedConfig, layer_count: int) -> list[AttentionCost]:
    """Attention shapes of every layer that attends.

    Layers that `layer_types` (gpt_neo: `attention_layers`) calls sliding or local have the config's window, and those
    that it calls a convolution have no attention.
    """
    return [cost for cost in _attention_of_layers(hf_config, layer_count) if cost is not None]


def _attention_of_layers(hf_config: PreTrainedConfig, layer_count: int) -> list[AttentionCost | None]:
    """The same with None for every layer without attention."""
    fields = hf_config.to_dict()  # attribute access raises where a field differs between layers (gemma4)
    names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    if not any(fields.get(name) for name in names):  # mamba, rwkv: no attention at all
        return [None] * layer_count
    heads = _first(fields, *names)
    hidden_size = _first(fields, "hidden_size", "n_embd", "d_model", "embedding_dim")
    query_key_dim = fields.get("qk_head_dim") or fields.get("head_dim") or hidden_size // heads
    value_dim = fields.get("v_head_dim") or query_key_dim
    layer_types = fields.get("layer_types") or fields.get("attention_layers") or [None] * layer_count
    window = fields.get("sliding_window") or fields.get("window_size")
    per_layer = {int(layer): settings for layer, settings in (fields.get("per_layer_config") or {}).items()}
    window_everywhere = window if not any(layer_types) else None
    costs: list[AttentionCost | None] = []
    for layer in range(layer_count):
        kind = str(layer_types[layer]) if layer < len(layer_types) else ""
        if "conv" in kind:
            costs.append(None)
            continue
        own_dim = per_layer.get(layer, {}).get("head_dim")
        slides = "sliding" in kind or "local" in kind
        costs.append(
            AttentionCost(
                heads=heads,
                query_key_dim=own_dim or query_key_dim,
                value_dim=own_dim or value_dim,
                window=window if slides else window_everywhere,
            )
        )
    return costs


def _first(fields: dict, *names: str) -> int:
    return next(fields[name] for name in names if isinstance(fields.get(name), int))
