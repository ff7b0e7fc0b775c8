"""Times this project's trainer beside what else one could train with: scripts/benchmark.py --help

    ours, ours_kernels, ours_eager, ours_eager_kernels    this project's trainer; Triton kernels on a GPU only
    ours_budget, ours_recompute      the same with less memory: memory_budget 0.9, every layer computed again
    hf_trainer, hf_trainer_liger                          Transformers' Trainer, compiled; with Liger where installed
    torchtitan                                            torchtitan's own Llama, where installed
    bare, bare_copy                                       PyTorch loops written by hand, with autocast or a bf16 copy

Every contender is built in a fresh process of its own, so that its peak memory is its own, and all stay alive. They
then train in turns, a few steps at a time (A B C, B C A, ...), one at any moment: a machine that slows down for a
while slows all of them, and ratios are taken between blocks of the same round. Speeds are medians over rounds.

    first    one step: compilation included
    warm-up  two more steps, not timed
    rounds   --blocks times: every contender trains --steps steps in a row (on a GPU after one that is not timed)

Compile time is the first step less the median step. On a CPU ratios are given by processor time of all threads, too: on
a machine that others use as well take --threads 1 and those. Peak memory covers the whole run of a contender,
compilation included; "imports" is what its process held before a model existed. On CUDA memory is what PyTorch
allocated on the device. The compiler keeps what it made for the next run: the first run of a command has longer first
steps and, on a CPU, higher peaks than those that follow; --cold gives every start an empty cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

import torch
from benchmarking.chart import draw
from benchmarking.contenders import Settings
from benchmarking.machine import describe_machine, measure_ceiling
from benchmarking.peers import CONTENDERS
from benchmarking.presets import PRESETS
from benchmarking.report import count_parameters, evaluate, flops_per_token, to_markdown
from benchmarking.rounds import run

DEFAULT_CONTENDERS = ("ours", "hf_trainer", "bare")
_FILES = ("--json", "--markdown", "--plot")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="llama3.2-1b" if on_cuda else "cpu-50m", help="default: %(default)s")
    add("--contenders", default=",".join(DEFAULT_CONTENDERS), help='among those above, or "all"; %(default)s')
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the computation; weights are fp32")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile; default on")
    add("--cold", action="store_true", help="every start with an empty cache of compiled code")
    add(
        "--starts", type=int, default=1, help="of each contender, whose first steps' median counts; default %(default)s"
    )
    add("--steps", type=int, default=10 if on_cuda else 2, help="in a row, of one contender; default %(default)s")
    add("--blocks", type=int, default=5, help="rounds in which every contender has its turn; default %(default)s")
    add("--limit", type=float, help="seconds; what has not begun by then is left out, and said to be")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch on the CPU; default all cores")
    add("--json", type=Path, help="file to write everything that was measured to")
    add("--markdown", type=Path, help="file to write the tables to, which are printed anyway")
    add("--plot", type=Path, metavar="FILE.png", help="picture to draw")
    for name in ("batch-size", "seq-len"):
        add(f"--{name}", type=int, help="in place of the preset's")
    for name in ("hidden-size", "intermediate-size", "num-hidden-layers", "num-attention-heads", "num-key-value-heads",
                 "vocab-size"):  # fmt: skip
        add(f"--{name}", type=int, help="Llama's config field, in place of the preset's")
    options = parser.parse_args(arguments)
    if options.contenders == "all":
        options.contenders = ",".join(CONTENDERS)
    unknown = [name for name in options.contenders.split(",") if name not in CONTENDERS]
    if unknown:
        parser.error(f"--contenders has {unknown[0]!r}: must be among {', '.join(CONTENDERS)}")
    if min(options.steps, options.blocks, options.starts, options.threads) < 1:
        parser.error("--steps, --blocks, --starts and --threads must be at least 1")
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        parser.error(f"--plot {options.plot}: must end in .png")
    return options


def make_settings(options: argparse.Namespace) -> Settings:
    preset = PRESETS[options.preset]
    given = {key: value for key, value in vars(options).items() if value is not None}
    config = {**preset["config"], **{key: given[key] for key in preset["config"] if key in given}}
    return Settings(
        model_type="llama",
        config=config,
        batch_size=given.get("batch_size", preset["batch_size"]),
        seq_len=given.get("seq_len", preset["seq_len"]),
        precision=options.precision,
        compile=options.compile,
        threads=options.threads,
    )


def command_line(arguments: list[str]) -> str:
    """The command as somebody would repeat it: without the files that it wrote."""
    pairs = zip(["", *arguments], arguments, strict=False)
    kept = [word for before, word in pairs if not {before, word} & {*_FILES}]
    return " ".join(["scripts/benchmark.py", *kept])


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    # One GPU, also where there are several: Transformers' Trainer would spread its batch over all of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    settings = make_settings(options)
    names = list(dict.fromkeys(options.contenders.split(",")))
    load = [os.getloadavg()[0]]
    ceiling = measure_ceiling(settings.precision, settings.threads)
    results = run(
        settings, names, steps=options.steps, blocks=options.blocks, starts=options.starts, cold=options.cold,
        limit=options.limit,
    )  # fmt: skip
    load.append(os.getloadavg()[0])
    # Twice, in case the machine was busy.
    ceiling = max(ceiling, measure_ceiling(settings.precision, settings.threads))
    ratios = evaluate(results, settings, ceiling)
    report = {
        "command": command_line(arguments),
        "machine": describe_machine(),
        "load": load,
        "settings": dataclasses.asdict(settings),
        "steps": options.steps,
        "blocks": options.blocks,
        "starts": options.starts,
        "cold": options.cold,
        "parameters": count_parameters(settings),
        "flops_per_token": flops_per_token(settings),
        "ceiling": ceiling,
        "results": {name: results[name] for name in names},
        "ratios": ratios,
    }
    print(to_markdown(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(to_markdown(report))
    if options.plot is not None:
        draw(report, options.plot)
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
