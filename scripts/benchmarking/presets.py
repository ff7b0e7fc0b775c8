"""Models and batches that are trained: Llama configs. About 50 million parameters take seconds a step on two cores."""

from __future__ import annotations

from typing import Any

_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA_3_2 = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": _ROPE,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 512,
        },
        "batch_size": 2,
        "seq_len": 32,
    },
    "cpu-50m": {
        "config": {
            "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": 32000,
        },
        "batch_size": 8,
        "seq_len": 512,
    },
    "llama3.2-1b": {
        "config": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, **_LLAMA_3_2,
        },
        "batch_size": 1,
        "seq_len": 8192,
    },
    "llama3.2-3b": {
        "config": {
            "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
            "num_key_value_heads": 8, "head_dim": 128, **_LLAMA_3_2,
        },
        "batch_size": 1,
        "seq_len": 8192,
    },
}  # fmt: skip
