"""What `parallelize/costs.py` needs to know about an HF model to count its FLOPs: parameters and attention shapes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parallelize.costs import AttentionCost, training_flops_per_token
from transformers_backend.decoder import Decoder


def model_flops_per_token(hf_model: PreTrainedModel, decoder: Decoder, seq_len: int) -> float:
    """FLOPs of training on one token, forward and backward, by the formula in `parallelize/costs.py`."""
    return training_flops_per_token(
        matmul_parameters=count_matmul_parameters(hf_model, decoder),
        attention=attention_costs(hf_model.config, len(decoder.layers)),
        seq_len=seq_len,
    )


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
    """Attention shapes of every layer; layers whose `layer_types` say that they slide have the config's window."""
    fields = hf_config.to_dict()  # attribute access raises where a field differs between layers (gemma4)
    heads = _first(fields, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden_size = _first(fields, "hidden_size", "n_embd", "d_model", "embedding_dim")
    query_key_dim = fields.get("qk_head_dim") or fields.get("head_dim") or hidden_size // heads
    value_dim = fields.get("v_head_dim") or query_key_dim
    layer_types = fields.get("layer_types") or [None] * layer_count
    per_layer = {int(layer): settings for layer, settings in (fields.get("per_layer_config") or {}).items()}
    window_everywhere = fields.get("sliding_window") if not any(layer_types) else None
    costs = []
    for layer in range(layer_count):
        own_dim = per_layer.get(layer, {}).get("head_dim")
        slides = layer < len(layer_types) and "sliding" in str(layer_types[layer])
        costs.append(
            AttentionCost(
                heads=heads,
                query_key_dim=own_dim or query_key_dim,
                value_dim=own_dim or value_dim,
                window=fields.get("sliding_window") if slides else window_everywhere,
            )
        )
    return costs


def _first(fields: dict, *names: str) -> int:
    return next(fields[name] for name in names if isinstance(fields.get(name), int))
