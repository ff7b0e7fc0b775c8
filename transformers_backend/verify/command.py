"""The command: its options, what it prints and writes, its exit status."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING

from parallelize.config import CONTEXT_PARALLEL_METHODS, KERNELS, PIPELINE_SCHEDULES
from parallelize.pipeline_parallel.schedules import is_zero_bubble
from transformers_backend.job_config.rules import model_source_problems
from transformers_backend.verify.compare import DENSE_MODEL_TYPES, run
from transformers_backend.verify.report import print_header, print_report, summary, with_section
from transformers_backend.verify.setting import is_model_type, setting_of


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    models = [*options.models, *(DENSE_MODEL_TYPES if options.all_dense else ())]
    mesh = {"fsdp": options.fsdp, "tp": options.tp, "pp": options.pp, "cp": options.cp, "schedule": options.schedule}
    mesh |= {"cp_method": options.cp_method, "cp_ulysses": options.cp_ulysses}
    setting = setting_of(**mesh, compile=options.compile, kernels=KERNELS if options.kernels else ("none",))
    if not options.json:
        print_header(setting)
    reports = run(models, setting, on_report=None if options.json else lambda report: print_report(report, setting))
    print(
        json.dumps([dataclasses.asdict(report) for report in reports], indent=2) if options.json else summary(reports)
    )
    if options.write_docs is not None:
        document = options.write_docs.read_text() if options.write_docs.is_file() else ""
        command = f"scripts/verify.sh {' '.join(given)}"
        document = with_section(document, reports, setting=setting, command=command)
        options.write_docs.write_text(document)
    return 1 if any(report.verdict == "fail" for report in reports) else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; --fsdp is 2 where no degree is given, and 1 beside another. Ends the process for bad ones."""
    parser = argparse.ArgumentParser(prog="scripts/verify.sh", description="Compare with plain Transformers.")
    parser.add_argument("models", nargs="*", help="model types, hub ids or folders (only their config is read)")
    parser.add_argument("--all-dense", action="store_true", help="all dense causal LM types of Transformers")
    parser.add_argument(
        "--fsdp", type=int, metavar="N", help="data-parallel shard degree (default 2, or 1 where another is given)"
    )
    parser.add_argument(
        "--tp", type=int, metavar="N",
        help="tensor-parallel degree (default 1); shows how much is split",
    )  # fmt: skip
    parser.add_argument(
        "--pp", type=int, metavar="N",
        help="pipeline-parallel degree (default 1); shows the stages",
    )  # fmt: skip
    parser.add_argument(
        "--cp", type=int, metavar="N",
        help="context-parallel degree (default 1); tries packed documents, too. The number of processes is the product "
        "of all degrees",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", default="1F1B", metavar="NAME", help=f"of the pipeline: {', '.join(PIPELINE_SCHEDULES)}"
    )
    parser.add_argument(
        "--cp-method",
        default="ring",
        metavar="NAME",
        help=f"of context parallelism: {', '.join(CONTEXT_PARALLEL_METHODS)}",
    )
    parser.add_argument(
        "--cp-ulysses", type=int, default=1, metavar="N",
        help="how many of the context-parallel ranks exchange tokens for heads; the ring is over the rest (default 1)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile layers and loss")
    parser.add_argument(
        "--kernels", action="store_true",
        help="compute by every kernel that fits; on a CPU by its plain-torch reference, or with TRITON_INTERPRET=1 in "
        "Triton's interpreter",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--write-docs", type=Path, metavar="FILE", help="write the table as the section of this mesh in a Markdown file"
    )
    options = parser.parse_args(arguments)
    if options.fsdp is None:
        options.fsdp = 2 if options.tp is options.pp is options.cp is None else 1
    options.tp, options.pp, options.cp = (
        1 if degree is None else degree for degree in (options.tp, options.pp, options.cp)
    )
    if not options.models and not options.all_dense:
        parser.error("name at least one model type, hub id or folder, or give --all-dense")
    for name, degree in (("--fsdp", options.fsdp), ("--tp", options.tp), ("--pp", options.pp), ("--cp", options.cp)):
        if degree < 1:
            parser.error(f"{name} {degree}: must be at least 1")
    _check_schedule(parser, options)
    _check_context(parser, options)
    unknown = [problem for name in options.models for problem in _name_problems(name)]
    if unknown:
        parser.error("\n".join(unknown))
    return options


def _check_context(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    method, ulysses = options.cp_method, options.cp_ulysses
    if method not in CONTEXT_PARALLEL_METHODS:
        parser.error(f"--cp-method {method}: must be one of {', '.join(CONTEXT_PARALLEL_METHODS)}")
    for name, value, default in (("--cp-method", method, "ring"), ("--cp-ulysses", ulysses, 1)):
        if value != default and options.cp == 1:
            parser.error(f"{name} {value}: is that of context parallelism; give --cp, too")
    if ulysses < 1 or options.cp % ulysses:
        parser.error(f"--cp-ulysses {ulysses}: must divide --cp {options.cp}")
    if ulysses > 1 and method != "ring":
        parser.error(f"--cp-ulysses {ulysses}: is around the ring; leave out --cp-method {method}")


def _check_schedule(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.schedule.lower() not in map(str.lower, PIPELINE_SCHEDULES):
        parser.error(f"--schedule {options.schedule}: must be one of {', '.join(PIPELINE_SCHEDULES)}")
    if options.schedule != parser.get_default("schedule") and options.pp == 1:
        parser.error(f"--schedule {options.schedule}: is that of a pipeline; give --pp, too")
    if options.compile and options.pp > 1 and is_zero_bubble(options.schedule):
        parser.error(
            f"--schedule {options.schedule}: with --compile its gradients would be wrong; leave one of them out"
        )


def _name_problems(name: str) -> list[str]:
    """What is wrong with a name that is neither a model type nor a folder, and cannot be a hub id."""
    if not is_model_type(name):
        return model_source_problems("MODEL", name)
    if name in CONFIG_MAPPING:
        return []
    (nearest,) = difflib.get_close_matches(name, list(CONFIG_MAPPING.keys()), n=1, cutoff=0.0)
    return [
        f'MODEL = "{name}": no folder from {Path.cwd()}, and Transformers {transformers.__version__} knows no such '
        f'model type; the nearest is "{nearest}". A hub id is owner/name.'
    ]
