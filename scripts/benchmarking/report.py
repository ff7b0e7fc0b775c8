"""What was measured becomes figures, ratios and tables."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarking.contenders import Settings, build_config
from benchmarking.machine import machine_in_words
from parallelize.costs import mfu, peak_flops
from transformers_backend.decoder import describe_decoder
from transformers_backend.flops import model_flops_per_token

GIB = 2**30


def evaluate(results: dict[str, Any], settings: Settings, ceiling: float) -> dict[str, dict[str, float]]:
    """Add medians and what follows from them to each result, in place; returns the ratios of ours to the others.

    ceiling: FLOP/s of a large matrix product on this machine in the dtype of the computation.
    """
    flops = flops_per_token(settings)
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops(device_name, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    measured = {name: result for name, result in results.items() if result.get("block_seconds")}
    for result in measured.values():
        seconds = statistics.median(result["block_seconds"])
        rate = settings.tokens_per_step / seconds
        result["tokens_per_second"] = rate
        result["flops_per_second"] = rate * flops
        result["ceiling_share"] = rate * flops / ceiling
        result["mfu"] = mfu(rate, flops, peak)
        result["first_step_seconds"] = statistics.median(result["first_steps_seconds"])
        result["compile_seconds"] = max(result["first_step_seconds"] - seconds, 0.0)
    ours = measured.get("ours")
    return {
        f"ours / {name}": {
            # Rounds that both came to: time may have been up within the last one.
            "tokens_per_second": statistics.median(
                other / own for own, other in zip(ours["block_seconds"], result["block_seconds"], strict=False)
            ),
            "peak_memory": ours["peak_memory"] / result["peak_memory"],
            "first_step": ours["first_step_seconds"] / result["first_step_seconds"],
            **_processor_ratios(ours, result),
        }
        for name, result in measured.items()
        if ours is not None and result is not ours
    }


def _processor_ratios(ours: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """The same as if nothing else had run on the machine's cores; nothing on a GPU, where the processor only waits."""
    if torch.cuda.is_available():
        return {}
    first, other_first = (statistics.median(one["first_steps_cpu_seconds"]) for one in (ours, result))
    return {
        "cpu_tokens_per_second": statistics.median(
            other / own for own, other in zip(ours["block_cpu_seconds"], result["block_cpu_seconds"], strict=False)
        ),
        "cpu_first_step": first / other_first,
    }


def flops_per_token(settings: Settings) -> float:
    """6 N + 12 L H Q S (parallelize/costs.py): without a discount for the causal mask."""
    model = _on_meta(settings)
    return model_flops_per_token(model, describe_decoder(model), settings.seq_len)


def count_parameters(settings: Settings) -> int:
    return _on_meta(settings).num_parameters()


def _on_meta(settings: Settings) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(settings))


def to_markdown(report: dict[str, Any]) -> str:
    settings = report["settings"]
    rounds = max((len(result.get("block_seconds", ())) for result in report["results"].values()), default=0)
    cache = "empty at every start" if report["cold"] else "as earlier runs left it"
    lines = [
        f"`{report['command']}`",
        "",
        machine_in_words(report["machine"]),
        f"{report['parameters'] / 1e6:,.1f} million parameters, {settings['batch_size']} x {settings['seq_len']} "
        f"tokens a step, {settings['precision']}, {'compiled' if settings['compile'] else 'eager'}, "
        f"{rounds} rounds of {report['steps']} steps, {report['starts']} "
        f"{'start' if report['starts'] == 1 else 'starts'} each; the compiler's cache {cache}. "
        f"{report['flops_per_token'] / 1e9:,.3f} GFLOP a token. Matrix products reach "
        f"{report['ceiling'] / 1e12:,.2f} TFLOP/s. {load_in_words(report['load'])}",
        "",
        "| contender | tokens/s | TFLOP/s | of the matrix-product ceiling | MFU | peak memory, GiB | first step, s | "
        "of it compiling, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_row(name, result) for name, result in report["results"].items()),
        "",
        "| ratio | tokens/s | peak memory | first step | tokens by processor time | first step by processor time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_ratio_row(name, ratio) for name, ratio in report["ratios"].items()),
    ]
    return "\n".join(lines) + "\n"


def load_in_words(load: list[float]) -> str:
    """load: processes that wanted a core, on average over a minute, before and after."""
    return f"Processes that wanted a core: {load[0]:.1f} before, {load[1]:.1f} after (its own counted)."


def _ratio_row(name: str, ratio: dict[str, float]) -> str:
    keys = ("tokens_per_second", "peak_memory", "first_step", "cpu_tokens_per_second", "cpu_first_step")
    return " | ".join([f"| {name}", *(f"{ratio[key]:.3f}" if key in ratio else "" for key in keys)]) + " |"


def _row(name: str, result: dict[str, Any]) -> str:
    if "tokens_per_second" not in result:
        return f"| {name} | {result.get('skipped') or result.get('failed') or 'no round was timed'} | | | | | | |"
    utilisation = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
    return (
        f"| {name} | {result['tokens_per_second']:,.0f} | {result['flops_per_second'] / 1e12:,.2f} | "
        f"{result['ceiling_share']:.1%} | {utilisation} | {result['peak_memory'] / GIB:.2f} | "
        f"{result['first_step_seconds']:.1f} | {result['compile_seconds']:.1f} |"
    )
