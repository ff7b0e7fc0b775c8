"""What `parallelize/costs.py` needs to know about an HF model to count its FLOPs: parameters and attention shapes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.costs import AttentionCost, training_flops_per_token
from transformers_backend.decoder import Decoder


def model_flops_per_token(hf_model: PreTrainedModel, decoder: Decoder, seq_len: int) -> float:
    """FLOPs of training on one token, forward and backward, by the formula in `parallelize/costs.py`."""
    runs = layer_runs(hf_model.config, decoder)
    repeated = sum(
        (runs[name] - 1) * parameter.numel()
        for name in decoder.layers
        for parameter in hf_model.get_submodule(name).parameters()
    )
    attention = attention_costs(hf_model.config, len(decoder.layers))
    if any(count > 1 for count in runs.values()):  # looped layers are alike, so their order does not matter
        attention = [attention[0]] * sum(runs.values())
    return training_flops_per_token(
        matmul_parameters=count_matmul_parameters(hf_model, decoder) + repeated, attention=attention, seq_len=seq_len
    )


def layer_runs(hf_config: PreTrainedConfig, decoder: Decoder) -> dict[str, int]:
    """How often each layer runs in one forward: once, but for the two looped stacks of hrm_text."""
    fields = hf_config.to_dict()
    slow, fast = fields.get("H_cycles", 1), fields.get("L_cycles", 1)
    return {
        name: slow * fast if ".L_module." in name else slow if ".H_module." in name else 1 for name in decoder.layers
    }


def count_matmul_parameters(hf_model: PreTrainedModel, decoder: Decoder) -> int:
    """Parameters that multiply every token: all but tables that are only looked up (a tied table is the head)."""
    head_weight = hf_model.get_submodule(decoder.head).weight
    tables = {
        module.weight
        for module in hf_model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not head_weight
    }
    return sum(parameter.numel() for parameter in hf_model.parameters() if parameter not in tables)


def attention_costs(hf_config: PreTrainedConfig, layer_count: int) -> list[AttentionCost]:
    """Attention shapes of every layer that attends.

    Layers that `layer_types` (gpt_neo: `attention_layers`) calls sliding or local have the config's window, and those
    that it calls a convolution have no attention.
    """
    fields = hf_config.to_dict()  # attribute access raises where a field differs between layers (gemma4)
    heads = _first(fields, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden_size = _first(fields, "hidden_size", "n_embd", "d_model", "embedding_dim")
    query_key_dim = fields.get("qk_head_dim") or fields.get("head_dim") or hidden_size // heads
    value_dim = fields.get("v_head_dim") or query_key_dim
    layer_types = fields.get("layer_types") or fields.get("attention_layers") or [None] * layer_count
    window = fields.get("sliding_window") or fields.get("window_size")
    per_layer = {int(layer): settings for layer, settings in (fields.get("per_layer_config") or {}).items()}
    window_everywhere = window if not any(layer_types) else None
    costs = []
    for layer in range(layer_count):
        kind = str(layer_types[layer]) if layer < len(layer_types) else ""
        if "conv" in kind:
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
