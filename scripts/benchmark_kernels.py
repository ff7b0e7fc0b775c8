"""Times each Triton kernel, forward and backward, beside eager torch, compiled torch and Liger (where installed):
scripts/benchmark_kernels.py --help

What moves data is given as a share of the bandwidth of a large copy on the same device, what multiplies matrices as a
share of the FLOP/s of a large matrix product, both measured in the same run. Only what has to be moved or computed
counts, so that computing logits twice, say, lowers the share. Nothing is found in the device's cache. "Extra memory" is
the most that is allocated beyond inputs, outputs and gradients.

--context adds what context parallelism computes: a whole attention as one block by every backend, and rings of 8 with
all ranks on one device, beside one call of scaled_dot_product_attention.

Kernels run on CUDA devices. With --device cpu the script runs tiny sizes, and operators compute their references: this
tries the script and measures nothing of interest.

Exit status: 0 measured, 1 something failed, 2 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

import torch
from benchmarking import context
from benchmarking.kernel_cases import CONTESTANTS, Case, find_cases, why_not_here
from benchmarking.machine import describe_machine, machine_in_words, measure_bandwidth, measure_ceiling
from benchmarking.timing import difference, forward_backward, memory_of, seconds_of

from parallelize.config import KERNELS

_TOLERANCE = 0.02  # relative, root mean square: beyond it something else was computed


def measure(case: Case, contestant: str, expected: list[torch.Tensor], ceilings: dict[str, float]) -> dict[str, Any]:
    """Seconds, share and memory of one contestant; `expected` is what plain torch computes in the same dtype."""
    device = case.inputs[0].device
    row = {"kernel": case.kernel, "shape": case.shape, "contestant": contestant}
    if (reason := why_not_here(contestant)) is not None:
        return {**row, "skipped": reason}
    action = forward_backward(case.contestants[contestant], case.inputs, case.grads)
    wrong = difference(action(), expected)
    if wrong > _TOLERANCE:
        return {**row, "failed": f"differs from plain torch by {wrong:.1%}"}
    seconds = seconds_of(action, device)
    kind, amount = ("copy", case.bytes_moved) if case.flops is None else ("matrix products", case.flops)
    share = amount / seconds / ceilings[kind]
    return {**row, "seconds": seconds, "share": share, "of": kind, "memory": memory_of(action), "difference": wrong}


def measure_case(make: Callable[[], Case], contestants: list[str], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    case = make()
    say(f"{case.kernel}: {case.shape}")
    row = {"kernel": case.kernel, "shape": case.shape, "contestant": "eager"}
    plain = attempt(lambda: {"outputs": forward_backward(case.contestants["eager"], case.inputs, case.grads)()}, row)
    if "failed" in plain:  # there is nothing to compare the others with
        return [plain]
    return [
        attempt(functools.partial(measure, case, name, plain["outputs"], ceilings), {**row, "contestant": name})
        for name in contestants
    ]


def attempt(action: Callable[[], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    try:
        return action()
    except Exception as error:  # the others go on, and the reason is part of the result
        return {**row, "failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def measure_context(device: torch.device) -> list[dict[str, Any]]:
    shapes = context.SHAPES if device.type == "cuda" else context.TINY_SHAPES
    return [
        attempt(lambda shape=shape: {**asdict(shape), **context.measure(shape, device, say)}, asdict(shape))
        for shape in shapes
    ]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- reports -----------------------------------------------------------------------------------------------------------


def to_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"`{report['command']}`",
        "",
        machine_in_words(report["machine"]),
        f"Copies reach {report['ceilings']['copy'] / 1e9:,.0f} GB/s (read and written), matrix products "
        f"{report['ceilings']['matrix products'] / 1e12:,.2f} TFLOP/s.",
        "",
    ]
    if report["kernels"]:
        lines += [
            "| kernel | shape | by | forward + backward, ms | share | extra memory, GB |",
            "| --- | --- | --- | ---: | ---: | ---: |",
            *map(_kernel_row, report["kernels"]),
            "",
        ]
    for title, key in (("a block of all tokens", "blocks"), (f"ring of {context.RING}, summed", "rings")):
        rows = [row for found in report["context"] for row in found.get(key, ())]
        if rows:
            lines += [
                f"| {title} | tokens | forward, ms | backward, ms | speed beside one call | forward | backward | "
                "TFLOP/s |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
                *map(_context_row, rows),
                "",
            ]
    lines += [f"{found['length']:,} tokens: {found['failed']}" for found in report["context"] if "failed" in found]
    return "\n".join(lines).rstrip() + "\n"


def _kernel_row(row: dict[str, Any]) -> str:
    start = f"| {row['kernel']} | {row['shape']} | {row['contestant']} |"
    if "seconds" not in row:
        return f"{start} {row.get('skipped') or row.get('failed')} | | |"
    memory = "" if row["memory"] is None else f"{row['memory'] / 1e9:.3f}"
    return f"{start} {row['seconds'] * 1000:.3f} | {row['share']:.1%} of {row['of']} | {memory} |"


def _context_row(row: dict[str, Any]) -> str:
    return (
        f"| {row['name']} | {row['length']:,} | {row['forward'] * 1000:.2f} | {row['backward'] * 1000:.2f} | "
        f"{row['share']:.1%} | {row['forward_share']:.1%} | {row['backward_share']:.1%} | "
        f"{row['flops_per_second'] / 1e12:,.2f} |"
    )


# -- command line ------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kernels", default=",".join(KERNELS), help='some of %(default)s; or "none"')
    add("--contestants", default=",".join(CONTESTANTS), help="some of %(default)s")
    add("--context", action="store_true", help="attention blocks and rings, too")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the script")
    add("--json", type=Path, help="file to write everything that was measured to")
    add("--markdown", type=Path, help="file to write the tables to, which are printed anyway")
    options = parser.parse_args(arguments)
    for key, choices in (("kernels", (*KERNELS, "none")), ("contestants", CONTESTANTS)):
        unknown = [name for name in getattr(options, key).split(",") if name not in choices]
        if unknown:
            parser.error(f"--{key} has {unknown[0]!r}: must be among {', '.join(choices)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        say("benchmark_kernels: torch finds no CUDA device here; --device cpu tries the script on tiny sizes.")
        return 2
    device = torch.device(options.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    threads = torch.get_num_threads()
    ceilings = {"copy": measure_bandwidth(), "matrix products": measure_ceiling(precision, threads)}
    rows: list[dict[str, Any]] = []
    for kernel in options.kernels.split(",") if options.kernels != "none" else ():
        for make in find_cases(kernel, device):
            rows += measure_case(make, options.contestants.split(","), ceilings)
    report = {
        "command": " ".join(["scripts/benchmark_kernels.py", *arguments]),
        "machine": describe_machine(),
        "ceilings": ceilings,
        "kernels": rows,
        "context": measure_context(device) if options.context else [],
    }
    print(to_markdown(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(to_markdown(report))
    return int(any("failed" in row for row in [*rows, *report["context"]]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
