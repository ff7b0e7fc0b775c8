"""torchtitan v0.2.2 keys that have no meaning here: accepted with a warning, so that such files load unchanged."""

from __future__ import annotations

IGNORED_SECTIONS = frozenset({"experimental", "fault_tolerance", "memory_estimation", "quantize"})

IGNORED_KEYS: dict[str, frozenset[str]] = {
    section: frozenset(keys.split())
    for section, keys in {
        "job": "config_file save_config_file custom_config_module",
        "model": "name flavor converters print_after_conversion",
        "training": "gc_debug",
        "parallelism": """
            context_parallel_load_balancer context_parallel_rotate_method disable_loss_parallel
            expert_parallel_comm_backend expert_parallel_degree
            expert_tensor_parallel_degree pipeline_parallel_expert_parallel_overlap""",
        "activation_checkpoint": """
            debug determinism_check early_stop per_op_sac_force_recompute_mm_shapes_by_fqns
            visualize_memory_budget_pareto""",
        "optimizer": "early_step_in_backward",
        "checkpoint": "enable_ft_dataloader_checkpoints initial_load_in_hf_quantized",
        "validation": "dataloader",
        "metrics": "disable_color_printing save_for_all_ranks",
        "comm": "mode",
        "debug": "moe_force_load_balance",
    }.items()
}

# Another name for one of our keys.
ALIASES = {("model", "tokenizer_path"): "hf_assets_path"}

# Tables inside a section with keys that stand in the section itself here; their other keys have no meaning here.
TABLE_ALIASES = {("training", "dataloader"): ("num_workers", "prefetch_factor")}


def is_ignored(section: str, key: str) -> bool:
    return section in IGNORED_SECTIONS or key in IGNORED_KEYS.get(section, ())


def refusal(section: str, key: str, value: object) -> str | None:
    """Return why an ignored key's value cannot be ignored, or None: a mesh that we do not build, weights that we do
    not load, logits that we do not gather, or what has another name here."""
    name = f"{section}.{key}"
    if (section, key, value) == ("checkpoint", "initial_load_in_hf_quantized", True):
        return f"{name} = true: quantized weights are not loaded; remove the key and name a folder of plain weights."
    if (section, key, value) == ("parallelism", "disable_loss_parallel", True):
        return (
            f"{name} = true: with tensor parallelism every rank computes the loss of its part of the vocabulary, and "
            "whole logits never exist; the loss is the same. Remove the key."
        )
    if (section, key) == ("model", "converters") and "quantize.linear.float8" in str(value):
        return (
            f'{name} has "quantize.linear.float8": float8 has a section of its own here. Set float8.enable = true, '
            "with float8.recipe and float8.exclude for its recipe_name and filter_fqns, and remove the converter."
        )
    if section == "parallelism" and key.startswith("expert_") and key.endswith("_degree") and value not in (1, -1):
        return f"{name} = {value}: expert parallelism is not available; set it to 1 or remove the key."
    return None
