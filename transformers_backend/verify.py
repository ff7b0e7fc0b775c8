"""The parity report: each model's twin, parallelised on local gloo processes, against plain Transformers.

`scripts/verify.sh MODEL_TYPE_OR_ID ... [--all-dense] [--fsdp 2] [--compile]`. For every model, in the same worker
processes one after another:

1. plain Transformers computes the loss and every gradient of one global batch, on one device, in fp32;
2. the wrapper, parallelised, computes them from each rank's rows, in two accumulated micro-batches;
3. the twin is saved with Transformers' `save_pretrained`, loaded into sharded parameters, its first loss compared,
   exported again, and the export compared bit by bit through `AutoModelForCausalLM.from_pretrained`.

A model passes, fails, or is refused with a reason. The exit status is 1 if any fails, and 2 for a name that can be no
model.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import json
import logging
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from parallelize.compile import COMPILE_ERRORS
from parallelize.config import CompileConfig, ParallelismConfig
from transformers_backend.errors import is_meant_for_the_user
from transformers_backend.job_config.rules import model_source_problems
from transformers_backend.model import HFTransformerModel
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.proof import GRADIENT_TOLERANCE, LOSS_TOLERANCE, MODEL_ERRORS, gradients, relative_errors
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

# The dense causal language models of Transformers 5.23, by model type: no experts, and attention in every layer
# (xlstm excepted). Types that the installed version does not have are reported as such.
DENSE_MODEL_TYPES = tuple(
    """
    apertus arcee biogpt bitnet bloom codegen cohere cohere2 cohere_compass_text ctrl cwm diffllama doge ernie4_5
    exaone4 falcon gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granite_swa helium hrm_text hunyuan_v1_dense
    hyperclovax internlm3 iquestcoder jais2 lfm2 llama minicpm3 ministral ministral3 mistral modernbert-decoder mpt
    nanochat nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm
    starcoder2 vaultgemma xglm xlstm youtu
    """.split()
)
PRETRAINED_LOSS_TOLERANCE = 1e-6
_ROWS, _SEQUENCE = 2, 24  # of one rank's micro-batch; two micro-batches
_TIMEOUT = datetime.timedelta(minutes=5)


@dataclasses.dataclass
class Report:
    """One model's line. Errors are None where the model was refused before they could be measured."""

    model: str
    verdict: str = "pass"
    reason: str = ""
    model_class: str = ""
    loss_difference: float | None = None
    gradient_error: float | None = None
    worst_parameter: str = ""
    pretrained_loss_difference: float | None = None
    export: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    models = [*options.models, *(DENSE_MODEL_TYPES if options.all_dense else ())]
    if not options.json:
        _print_row(_COLUMNS)
    reports = verify(
        models, fsdp=options.fsdp, compile=options.compile, on_report=None if options.json else _print_report
    )
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        print(_summary(reports))
    if options.write_docs is not None:
        options.write_docs.write_text(_markdown(reports, options))
    return 1 if any(report.verdict == "fail" for report in reports) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/verify.sh", description="Compare with plain Transformers.")
    parser.add_argument("models", nargs="*", help="model types, hub ids or folders (only their config is read)")
    parser.add_argument("--all-dense", action="store_true", help="all dense causal LM types of Transformers")
    parser.add_argument("--fsdp", type=int, default=2, metavar="N", help="data-parallel shard degree (default 2)")
    parser.add_argument("--compile", action="store_true", help="compile layers and loss")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    if not options.models and not options.all_dense:
        parser.error("name at least one model type, hub id or folder, or give --all-dense")
    if options.fsdp < 1:
        parser.error(f"--fsdp {options.fsdp}: must be at least 1")
    unknown = [problem for name in options.models for problem in _name_problems(name)]
    if unknown:
        parser.error("\n".join(unknown))
    return options


def _is_model_type(name: str) -> bool:
    return name in CONFIG_MAPPING or not ("/" in name or Path(name).exists())


def _name_problems(name: str) -> list[str]:
    """What is wrong with a name that is neither a model type nor a folder, and cannot be a hub id."""
    if not _is_model_type(name):
        return model_source_problems("MODEL", name)
    if name in CONFIG_MAPPING:
        return []
    (nearest,) = difflib.get_close_matches(name, list(CONFIG_MAPPING.keys()), n=1, cutoff=0.0)
    return [
        f'MODEL = "{name}": no folder from {Path.cwd()}, and Transformers {transformers.__version__} knows no such '
        f'model type; the nearest is "{nearest}". A hub id is owner/name.'
    ]


def verify(
    models: list[str], *, fsdp: int = 2, compile: bool = False, on_report: Callable[[Report], None] | None = None
) -> list[Report]:
    """Verify models on `fsdp` local processes and return their reports; `on_report` sees each as it comes."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = mp.spawn(_worker, (fsdp, models, compile, folder, queue), nprocs=fsdp, join=False)
        reports = []
        while len(reports) < len(models):
            try:
                reports.append(queue.get(timeout=5))
            except Empty:
                workers.join(timeout=0)  # raises if a worker died
            else:
                if on_report is not None:
                    on_report(reports[-1])
        while not workers.join():
            pass
    return reports


def _worker(rank: int, world_size: int, models: list[str], compile: bool, folder: str, queue) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Inductor generates other code for several threads (falcon's gradient is wrong there only), so try that code.
    torch.set_num_threads(2 if compile else 1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    for index, model in enumerate(models):
        report = _verify_model(model, world_size, compile, Path(folder) / str(index))
        if rank == 0:
            queue.put(report)
        torch._dynamo.reset()
    dist.barrier()
    dist.destroy_process_group()


def _verify_model(name: str, world_size: int, compile: bool, folder: Path) -> Report:
    report = Report(name)
    notes = _CollectWarnings(report.notes)
    logging.getLogger("transformers_backend").addHandler(notes)
    try:
        key = "model_type" if _is_model_type(name) else "model"
        hf_config, model_class = HFTransformerModelArgs(**{key: name}).resolve()
        report.model_class = model_class.__name__
        _compare_training(report, hf_config, model_class, world_size, compile)
        _compare_weights(report, hf_config, model_class, world_size, folder)
    except ValueError as error:
        report.verdict = "refused" if is_meant_for_the_user(error) else "fail"
        report.reason = f"{type(error).__name__}: {error}" if report.verdict == "fail" else str(error)
    except (*MODEL_ERRORS, *COMPILE_ERRORS, OSError) as error:  # OSError: a hub id that cannot be fetched
        report.verdict, report.reason = "fail", f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        logging.getLogger("transformers_backend").removeHandler(notes)
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return report


def _compare_training(report: Report, hf_config, model_class, world_size: int, compile: bool) -> None:
    """Loss and every gradient of one global batch: plain Transformers on one device, and ours on all ranks."""
    input_ids, labels = _global_batch(2 * _ROWS * world_size)
    plain = build_twin(hf_config, model_class)
    plain_loss = plain(input_ids=input_ids, labels=labels, use_cache=False).loss
    plain_loss.backward()
    model = HFTransformerModel.wrap(build_twin(hf_config, model_class))
    model.parallelize(ParallelismConfig(data_parallel_shard_degree=world_size), compile=CompileConfig(enable=compile))
    mine = slice(model.data_rank * 2 * _ROWS, (model.data_rank + 1) * 2 * _ROWS)
    micro_batches = list(zip(input_ids[mine].split(_ROWS), labels[mine].split(_ROWS), strict=True))
    targets = sum(model.count_targets(micro_labels) for _, micro_labels in micro_batches)
    loss = sum(model.forward_backward(*batch, num_items_in_batch=targets) for batch in micro_batches)
    errors = relative_errors(gradients(plain), model.full_gradients())
    report.loss_difference = abs(loss.item() - plain_loss.item())
    report.worst_parameter = max(errors, key=errors.get)
    report.gradient_error = errors[report.worst_parameter]
    if not report.loss_difference <= LOSS_TOLERANCE:
        report.verdict, report.reason = "fail", f"loss {loss.item():.6f} instead of {plain_loss.item():.6f}"
    elif not report.gradient_error <= GRADIENT_TOLERANCE:
        report.verdict, report.reason = "fail", f"gradient of {report.worst_parameter} is wrong"


def _compare_weights(report: Report, hf_config, model_class, world_size: int, folder: Path) -> None:
    """Folder -> sharded parameters -> first loss; sharded parameters -> folder -> bit-equal weights."""
    pretrained, exported = folder / "pretrained", folder / "exported"
    original = build_twin(hf_config, model_class, seed=1)
    if dist.get_rank() == 0:
        original.save_pretrained(pretrained, max_shard_size="100KB")
    dist.barrier()
    input_ids, labels = _global_batch(world_size)
    with torch.no_grad():
        plain_loss = original(input_ids=input_ids, labels=labels, use_cache=False).loss
    model = HFTransformerModel.from_pretrained(str(pretrained))
    model.parallelize(ParallelismConfig(data_parallel_shard_degree=world_size))
    row = slice(model.data_rank, model.data_rank + 1)
    loss = model.forward_backward(input_ids[row], labels[row])
    report.pretrained_loss_difference = abs(loss.item() - plain_loss.item())
    model.save_pretrained(exported, max_file_size=100_000)
    differing = _differing(original, AutoModelForCausalLM.from_pretrained(exported))
    report.export = "bit-equal" if not differing else f"differs: {', '.join(differing[:3])}"
    if report.verdict == "pass" and not report.pretrained_loss_difference <= PRETRAINED_LOSS_TOLERANCE:
        report.verdict = "fail"
        report.reason = f"loss of the loaded folder {loss.item():.7f} instead of {plain_loss.item():.7f}"
    elif report.verdict == "pass" and differing:
        report.verdict, report.reason = "fail", f"export {report.export}"
    dist.barrier()


def _differing(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    tensors, others = one.state_dict(), other.state_dict()
    names = sorted(tensors.keys() | others.keys())
    return [n for n in names if n not in tensors or n not in others or not torch.equal(tensors[n], others[n])]


def _global_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (rows, seq); every row ignores another number of labels, so that means of means differ."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (rows, _SEQUENCE), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : (5 * row) % (_SEQUENCE - 4)] = -100
    return input_ids, labels


class _CollectWarnings(logging.Handler):
    """What the wrapper warns of (a loss on full logits, layers left uncompiled) belongs in the report."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(record.getMessage())


def _print_report(report: Report) -> None:
    _print_row(_cells(report))


def _print_row(cells: tuple[str, ...]) -> None:
    print(" ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip(), flush=True)


_COLUMNS = ("model", "loss diff", "worst gradient", "of", "loaded diff", "export", "verdict")
_WIDTHS = (20, 10, 15, 46, 12, 10, 8)


def _cells(report: Report) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    verdict = report.verdict + (f" ({report.reason})" if report.reason else "")
    return (
        report.model, number(report.loss_difference), number(report.gradient_error), report.worst_parameter or "-",
        number(report.pretrained_loss_difference), report.export or "-",
        "; ".join([verdict, *report.notes]),
    )  # fmt: skip


def _summary(reports: list[Report]) -> str:
    counts = {verdict: sum(report.verdict == verdict for report in reports) for verdict in ("pass", "refused", "fail")}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _markdown(reports: list[Report], options: argparse.Namespace) -> str:
    command = f"scripts/verify.sh {'--all-dense ' if options.all_dense else ''}--fsdp {options.fsdp}"
    command += " --compile" if options.compile else ""
    lines = [
        "# Models",
        "",
        f"Generated on {datetime.date.today()} by `{command} --write-docs {options.write_docs}` with "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}. "
        "Do not edit.",
        "",
        "Each model's twin (same architecture, tiny sizes, fp32) on local gloo processes, against plain Transformers",
        "on one device. *Loss diff* and *worst gradient* (relative) are of one global batch in two accumulated",
        "micro-batches; *loaded diff* is the first loss after loading a `save_pretrained` folder into sharded",
        "parameters; *export* compares the exported folder, read with `from_pretrained`, with the original weights.",
        "",
        f"**{_summary(reports)}.** Pass means: loss within {LOSS_TOLERANCE:g}, every gradient within "
        f"{GRADIENT_TOLERANCE:g}, loaded loss within {PRETRAINED_LOSS_TOLERANCE:g}, export bit-equal.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + " --- |" * len(_COLUMNS),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(report)) + " |" for report in reports]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
