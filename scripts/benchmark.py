"""Times this project's trainer, Hugging Face's Trainer and a bare PyTorch loop: scripts/benchmark.py --help

Every contender is built in a fresh process of its own, so that its peak memory is its own, and all stay alive. They
then train in turns, a few steps at a time (A B C, B C A, ...), one at any moment: a machine that slows down for a
while slows all of them, and ratios are taken between blocks of the same round. Speeds are medians over rounds.

    first    one step: compilation included
    warm-up  two more steps, not timed
    rounds   --blocks times: every contender trains --steps steps in a row (on a GPU after one that is not timed)

Peak memory covers the whole run of a contender, compilation included; "imports" is what its process held before a
model existed. On CUDA memory is what PyTorch allocated on the device. The compiler keeps what it made for the next
run: the first run of a command has longer first steps and, on a CPU, higher peaks than those that follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

import torch
import transformers
from contenders import CONTENDERS, Finished, Gate, Settings, build_config, why_not_installed
from transformers import AutoModelForCausalLM

from parallelize.costs import mfu, peak_flops
from transformers_backend.decoder import describe_decoder
from transformers_backend.flops import model_flops_per_token

GIB = 2**30
WARM_UP_STEPS = 2
DEFAULT_CONTENDERS = ("ours", "hf_trainer", "bare")

_LLAMA_3_2_1B_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# Llama configs, and the batch. About 50 million parameters take a few seconds a step on two cores.
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
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_parameters": _LLAMA_3_2_1B_ROPE,
        },
        "batch_size": 1,
        "seq_len": 8192,
    },
}  # fmt: skip


class Failed(Exception):
    """A contender stopped with an error, whose text this carries."""


class Contestant:
    """The benchmark's end of one contender: a process that trains as many steps as it is told."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(name, settings, theirs))
        self._process.start()
        theirs.close()
        self.record: dict[str, Any] = {"block_seconds": [], **self._receive(), "peak_memory": 0}

    def train(self, steps: int) -> float:
        """Train `steps` steps and return the seconds they took."""
        self._connection.send(steps)
        report = self._receive()
        self.record["peak_memory"] = max(self.record["peak_memory"], report["peak_memory"])
        self.record.setdefault("first_loss", report["loss"])
        self.record["last_loss"] = report["loss"]
        return report["seconds"]

    def close(self) -> None:
        if self._process.is_alive():
            self._connection.send(0)
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> dict[str, Any]:
        try:
            report = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from None
        if "error" in report:
            raise Failed(report["error"])
        return report


def serve(name: str, settings: Settings, connection: Connection) -> None:
    """A contender's process: train whenever the benchmark says so, and report what goes wrong."""
    torch.set_num_threads(settings.threads)
    try:
        CONTENDERS[name](settings, Gate(connection))
    except Finished:
        return
    except Exception as error:  # the other contenders go on, and the reason is part of the result
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
        connection.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def run(settings: Settings, names: list[str], *, steps: int, blocks: int) -> dict[str, Any]:
    """Let the contenders train in turns; returns everything that was measured, by contender."""
    results: dict[str, Any] = {}
    contestants: list[Contestant] = []
    for name in names:
        if (reason := why_not_installed(name)) is not None:
            results[name] = {"skipped": reason}
            continue
        say(f"{name}: building, first step and {WARM_UP_STEPS} to warm up")
        attempt(lambda name=name: contestants.append(begin(name, settings)), name, results)
    try:
        for block in range(blocks):
            running = [one for one in contestants if one.name not in results]
            if not running:
                break
            turn = block % len(running)  # who begins changes
            for one in [*running[turn:], *running[:turn]]:
                attempt(lambda one=one: train_block(one, steps), one.name, results)
            say(f"round {block + 1} of {blocks}: " + ", ".join(describe_block(one, settings) for one in running))
    finally:
        for contestant in contestants:
            contestant.close()
    return {**results, **{one.name: one.record for one in contestants if one.name not in results}}


def attempt(action: Any, name: str, results: dict[str, Any]) -> None:
    try:
        action()
    except (Failed, ConnectionError) as error:
        say(f"{name} failed: {error}")
        results[name] = {"failed": str(error)}


def begin(name: str, settings: Settings) -> Contestant:
    started = time.perf_counter()
    contestant = Contestant(name, settings)
    contestant.record["build_seconds"] = time.perf_counter() - started
    contestant.record["first_step_seconds"] = contestant.train(1)
    contestant.train(WARM_UP_STEPS)
    return contestant


def train_block(contestant: Contestant, steps: int) -> None:
    if torch.cuda.is_available():
        contestant.train(1)  # gets its memory back from the device
    contestant.record["block_seconds"].append(contestant.train(steps) / steps)


def describe_block(contestant: Contestant, settings: Settings) -> str:
    seconds = contestant.record["block_seconds"]
    return f"{contestant.name} {settings.tokens_per_step / seconds[-1]:,.0f}" if seconds else f"{contestant.name} -"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- what the measurements mean ----------------------------------------------------------------------------------------


def evaluate(results: dict[str, Any], settings: Settings, ceiling: float) -> dict[str, dict[str, float]]:
    """Add medians (and utilisation) to each result, in place; returns the ratios of ours to each other contender.

    ceiling: FLOP/s of a large matrix product on this machine in the dtype of the computation.
    """
    flops = flops_per_token(settings)
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops(device_name, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    measured = {name: result for name, result in results.items() if result.get("block_seconds")}
    for result in measured.values():
        rate = settings.tokens_per_step / statistics.median(result["block_seconds"])
        result["tokens_per_second"] = rate
        result["ceiling_share"] = rate * flops / ceiling
        result["mfu"] = mfu(rate, flops, peak)
    ours = measured.get("ours")
    return {
        f"ours / {name}": {
            "tokens_per_second": statistics.median(
                other / own for own, other in zip(ours["block_seconds"], result["block_seconds"], strict=True)
            ),
            "peak_memory": ours["peak_memory"] / result["peak_memory"],
        }
        for name, result in measured.items()
        if ours is not None and result is not ours
    }


def flops_per_token(settings: Settings) -> float:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(settings))
    return model_flops_per_token(model, describe_decoder(model), settings.seq_len)


def measure_ceiling(settings: Settings) -> float:
    """FLOP/s of the best of several large square matrix products: what a training step can at most come near to."""
    if not torch.cuda.is_available():
        return _time_matrix_products(settings.precision, settings.threads)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own holds no memory afterwards
        return pool.apply(_time_matrix_products, (settings.precision, settings.threads))


def _time_matrix_products(precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    on_cuda = torch.cuda.is_available()
    size, dtype = 8192 if on_cuda else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device="cuda" if on_cuda else "cpu").to(dtype) for _ in range(2))
    best, repeats = float("inf"), 20 if on_cuda else 1
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right
        if on_cuda:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * size**3 / best


# -- reports -----------------------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    model_names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model_names[0] if model_names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory[0], 1) if memory else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def to_markdown(report: dict[str, Any]) -> str:
    machine, settings = report["machine"], report["settings"]
    where = machine["device"] or f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    lines = [
        f"`{report['command']}`",
        "",
        f"{machine['date']}; {where}; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}.",
        f"{report['parameters'] / 1e6:,.1f} million parameters, {settings['batch_size']} x {settings['seq_len']} "
        f"tokens a step, {settings['precision']}, {'compiled' if settings['compile'] else 'eager'}, "
        f"{report['blocks']} rounds of {report['steps']} steps. Matrix products reach {report['ceiling'] / 1e12:,.2f} "
        "TFLOP/s.",
        "",
        "| contender | tokens/s | of the matrix-product ceiling | MFU | peak memory, GiB | first step, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_row(name, result) for name, result in report["results"].items()),
        "",
        "| ratio | tokens/s | peak memory |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {ratio['tokens_per_second']:.3f} | {ratio['peak_memory']:.3f} |"
            for name, ratio in report["ratios"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any]) -> str:
    if "tokens_per_second" not in result:
        return f"| {name} | {result.get('skipped') or result.get('failed') or 'no round was timed'} | | | | |"
    utilisation = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
    return (
        f"| {name} | {result['tokens_per_second']:,.0f} | {result['ceiling_share']:.1%} | {utilisation} | "
        f"{result['peak_memory'] / GIB:.2f} | {result['first_step_seconds']:.1f} |"
    )


# -- command line ------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="llama3.2-1b" if on_cuda else "cpu-50m", help="default: %(default)s")
    add("--contenders", default=",".join(DEFAULT_CONTENDERS), help=f"among {', '.join(CONTENDERS)}; %(default)s")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the computation; weights are fp32")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile; default on")
    add("--steps", type=int, default=10 if on_cuda else 2, help="in a row, of one contender; default %(default)s")
    add("--blocks", type=int, default=5, help="rounds in which every contender has its turn; default %(default)s")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch on the CPU; default all cores")
    add("--json", type=Path, help="file to write everything that was measured to")
    add("--markdown", type=Path, help="file to write the tables to, which are printed anyway")
    for name in ("batch-size", "seq-len"):
        add(f"--{name}", type=int, help="in place of the preset's")
    for name in ("hidden-size", "intermediate-size", "num-hidden-layers", "num-attention-heads", "num-key-value-heads",
                 "vocab-size"):  # fmt: skip
        add(f"--{name}", type=int, help="Llama's config field, in place of the preset's")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.contenders.split(",") if name not in CONTENDERS]
    if unknown:
        parser.error(f"--contenders has {unknown[0]!r}: must be among {', '.join(CONTENDERS)}")
    if min(options.steps, options.blocks, options.threads) < 1:
        parser.error("--steps, --blocks and --threads must be at least 1")
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
    kept = [word for before, word in pairs if not {before, word} & {"--json", "--markdown"}]
    return " ".join(["scripts/benchmark.py", *kept])


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    # One GPU, also where there are several: Transformers' Trainer would spread its batch over all of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    settings = make_settings(options)
    names = options.contenders.split(",")
    ceiling = measure_ceiling(settings)
    results = run(settings, names, steps=options.steps, blocks=options.blocks)
    ceiling = max(ceiling, measure_ceiling(settings))  # twice, in case the machine was busy
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(build_config(settings)).num_parameters()
    ratios = evaluate(results, settings, ceiling)
    report = {
        "command": command_line(arguments),
        "machine": describe_machine(),
        "settings": dataclasses.asdict(settings),
        "steps": options.steps,
        "blocks": options.blocks,
        "parameters": parameters,
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
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
