"""Lists which models keep packed documents apart, and how: scripts/survey_packing.py --all-dense

For each model type its twin (same architecture, tiny sizes, fp32) computes rows of several documents, and each document
alone; logits must agree within 1e-5 and all gradients within 1e-4, relative. The trainer tries the same at its start.
Flash kernels need a GPU: in their place runs a stand-in that takes the same arguments.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

import torch
import transformers

from transformers_backend.isolation import Isolation, find_isolation
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.verify import DENSE_MODEL_TYPES

_SUPPORT = {"sdpa": "_supports_sdpa", "eager": None, "flash_attention_2": "_supports_flash_attn"}
_NOT_THERE = "-"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/survey_packing.py", description="Which models keep documents apart.")
    parser.add_argument("models", nargs="*", help="model types")
    parser.add_argument("--all-dense", action="store_true", help="all dense causal LM types of Transformers")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    models = [*options.models, *(DENSE_MODEL_TYPES if options.all_dense else ())]
    if not models:
        parser.error("name at least one model type, or give --all-dense")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {}
    for model in models:
        rows[model] = survey(model)
        print(f"{model:<20} " + "  ".join(f"{_cell(found):<12}" for found in rows[model].values()), flush=True)
    if options.write_docs is not None:
        options.write_docs.write_text(_markdown(rows, options))
    return 0


def survey(model_type: str) -> dict[str, Isolation | None]:
    """{attention: what keeps documents apart with it}; None where the model does not have it."""
    hf_config, model_class = HFTransformerModelArgs(model_type=model_type).resolve()
    return {
        attention: find_isolation(hf_config, model_class, attention)
        if attribute is None or getattr(model_class, attribute)
        else None
        for attention, attribute in _SUPPORT.items()
    }


def _cell(found: Isolation | None) -> str:
    if found is None:
        return _NOT_THERE
    return found.way or ("not shown" if "does not run" in found.reason else "**crosses**")


def _markdown(rows: dict[str, dict[str, Isolation | None]], options: argparse.Namespace) -> str:
    command = (
        f"scripts/survey_packing.py {'--all-dense ' if options.all_dense else ''}{' '.join(options.models)}".strip()
    )
    kept = {
        attention: sum(row[attention] is not None and row[attention].way is not None for row in rows.values())
        for attention in _SUPPORT
    }
    apart = ", ".join(f"{count} with {attention}" for attention, count in kept.items())
    lines = [
        "# Packed documents",
        "",
        f"Generated on {datetime.date.today()} by `python {command} --write-docs {options.write_docs}` with torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}. "
        "Do not edit.",
        "",
        'With `training.packing = "documents"` a sequence holds several documents. What keeps each from attending to',
        "the others, by attention implementation:",
        "",
        "- *positions*: `position_ids` that restart with each document, from which Transformers makes its mask;",
        "- *mask*: the model makes no such mask, and takes one from this trainer;",
        "- *joined rows*: the batch is one row with the bounds of documents, for which flash kernels have a variant;",
        "- **crosses**: nothing does: attention (or a recurrence) crosses documents, and the log warns of it;",
        "- not shown: the stand-in for flash kernels does not run in it, and the log warns too;",
        f"- {_NOT_THERE}: the model does not have this attention.",
        "",
        f"Of {len(rows)} model types {apart} keep documents apart. Flash attention was tried without its kernels, by a",
        "stand-in that takes the same arguments.",
        "",
        "| model | " + " | ".join(_SUPPORT) + " |",
        "|" + " --- |" * (len(_SUPPORT) + 1),
    ]  # fmt: skip
    lines += [f"| {model} | " + " | ".join(map(_cell, row.values())) + " |" for model, row in rows.items()]
    reasons = {
        f"- {model}, {attention}: {found.reason}."
        for model, row in rows.items()
        for attention, found in row.items()
        if found is not None and found.way is None
    }
    return "\n".join([*lines, "", "Where documents cross, or may:", "", *sorted(reasons)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
