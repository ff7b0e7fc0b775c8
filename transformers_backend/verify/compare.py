"""Running the processes, and comparing one model after another on them with plain Transformers."""

from __future__ import annotations

import copy
import datetime
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from parallelize.compile import COMPILE_ERRORS
from parallelize.config import CompileConfig, KernelConfig, ParallelismConfig
from parallelize.distributed import gather_objects
from parallelize.parallel_dims import ParallelDims
from transformers_backend.errors import is_meant_for_the_user
from transformers_backend.metrics.terminal import silence_advice
from transformers_backend.model import HFTransformerModel
from transformers_backend.proof import GRADIENT_TOLERANCE, LOSS_TOLERANCE, MODEL_ERRORS, gradients, relative_errors
from transformers_backend.tensor_plan import DegreeError
from transformers_backend.twin import VOCABULARY_SIZE, WINDOW, build_twin
from transformers_backend.verify.context import loss_of_documents_alone, packed_batch, sequence_length
from transformers_backend.verify.pipeline import (
    held_by_several,
    layers_per_stage,
    minimum_layers,
    refused_for_layers,
    rows_of_a_call,
    seen_gradients,
)
from transformers_backend.verify.report import PRETRAINED_LOSS_TOLERANCE, Report
from transformers_backend.verify.setting import Setting, model_args_of, setting_of
from transformers_backend.verify.share import sharded_share, share_of_real_sizes

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
# A gradient may be off by so many times what plain Transformers' own is off by rounding, where that is more than the
# tolerance: it is compared with one such error, and has some more from adding up in parts.
_ROUNDINGS = 4
_ROWS_TO_EVALUATE = 3  # of a data rank; no micro-batch of two rows divides that
_TIMEOUT = datetime.timedelta(minutes=5)


BatchLoss = Callable[[PreTrainedModel], torch.Tensor]
"""The loss of a certain batch by any copy of a model."""


def verify(
    models: list[str], *, fsdp: int = 2, on_report: Callable[[Report], None] | None = None, **options
) -> list[Report]:
    """Verify models on local processes and return their reports.

    fsdp, options: see `setting_of`; the degrees multiply to the number of processes. on_report: sees each as it comes.
    """
    return run(models, setting_of(fsdp=fsdp, **options), on_report=on_report)


def run(models: list[str], setting: Setting, *, on_report: Callable[[Report], None] | None = None) -> list[Report]:
    """`verify`, with its options in one. Models that are refused for their size alone need no processes, and come
    first."""
    refused = [report for name in models if (report := refused_for_layers(name, setting.parallelism)) is not None]
    if on_report is not None:
        for report in refused:
            on_report(report)
    names = {report.model for report in refused}
    others = [name for name in models if name not in names]
    reports = [*refused, *(_run_processes(others, setting, on_report) if others else ())]
    return sorted(reports, key=lambda report: models.index(report.model))


def _run_processes(models: list[str], setting: Setting, on_report: Callable[[Report], None] | None) -> list[Report]:
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = setting.processes
    with tempfile.TemporaryDirectory() as folder:
        workers = mp.spawn(_worker, (processes, models, setting, folder, queue), nprocs=processes, join=False)
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


def _worker(rank: int, world_size: int, models: list[str], setting: Setting, folder: str, queue) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    silence_advice()
    # Inductor generates other code for several threads (falcon's gradient is wrong there only), so try that code.
    torch.set_num_threads(2 if setting.compile else 1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    # One for all models: a mesh has a process group a dimension, and each of those has threads of its own.
    mesh = ParallelDims.resolve(setting.parallelism, world_size).build_mesh("cpu")
    for index, model in enumerate(models):
        report = verify_model(model, setting, mesh, Path(folder) / str(index))
        if rank == 0:
            queue.put(report)
        torch._dynamo.reset()
    dist.barrier()
    dist.destroy_process_group()


def verify_model(name: str, setting: Setting, mesh: DeviceMesh, folder: Path) -> Report:
    """One model's report; every rank of the process group calls it. folder: for files, removed afterwards."""
    report, parallelism = Report(name), setting.parallelism
    notes = _CollectWarnings(report.notes)
    logging.getLogger("transformers_backend").addHandler(notes)
    try:
        hf_config, model_class = model_args_of(name).resolve()
        report.model_class = model_class.__name__
        degree = parallelism.tensor_parallel_degree
        try:
            model = _compare_training(report, hf_config, model_class, degree, setting, mesh)
        except DegreeError:  # heads in groups of a fixed number (CodeGen's fours) need more of them
            degree *= 2
            model = _compare_training(report, hf_config, model_class, degree, setting, mesh)
        if parallelism.tensor_parallel_degree > 1:
            _describe_split(report, hf_config, model_class, model)
        _compare_weights(report, hf_config, model_class, degree, parallelism, mesh, folder)
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


def _compare_training(
    report: Report,
    hf_config,
    model_class,
    twin_degree: int,
    setting: Setting,
    mesh: DeviceMesh,
) -> HFTransformerModel:
    """Loss and every gradient of one global batch: plain Transformers on one device, and ours on all ranks.

    twin_degree: the tensor-parallel degree for which the twin is wide enough.
    """
    parallelism = setting.parallelism
    rows = rows_of_a_call(parallelism)
    seq = sequence_length(parallelism)
    input_ids, labels = global_batch(2 * rows * parallelism.data_parallel_shard_degree, seq)
    sizes = {"degree": twin_degree, "minimum_layers": minimum_layers(parallelism)}
    plain = build_twin(hf_config, model_class, **sizes)
    plain_loss = plain(input_ids=input_ids, labels=labels, use_cache=False).loss
    plain_loss.backward()
    model = HFTransformerModel.wrap(build_twin(hf_config, model_class, **sizes))
    model.parallelize(
        parallelism, compile=CompileConfig(setting.compile), kernels=KernelConfig(list(setting.kernels)), mesh=mesh
    )
    report.kernels = model.kernels.summary()
    mine = slice(model.data_rank * 2 * rows, (model.data_rank + 1) * 2 * rows)
    halves = list(zip(input_ids[mine].split(rows), labels[mine].split(rows), strict=True))
    targets = sum(model.count_targets(labels_of_half) for _, labels_of_half in halves)
    loss = sum(model.forward_backward(*half, num_items_in_batch=targets) for half in halves)
    report.loss_difference = max(gather_objects(abs(loss.item() - plain_loss.item())))
    if not report.loss_difference <= LOSS_TOLERANCE:
        report.fail(f"loss {loss.item():.6f} instead of {plain_loss.item():.6f}")

    def batch_loss(one: PreTrainedModel) -> torch.Tensor:
        return one(input_ids=input_ids, labels=labels, use_cache=False).loss

    _compare_gradients(report, plain, model, batch_loss)
    _compare_clipping(report, plain, model, batch_loss)
    _compare_evaluation(report, plain, model, seq)
    if model.context is not None:
        report.way = model.context.way
        _compare_documents(report, plain, model, rows, seq)
    if model.pipelined is not None:
        plan = model.pipelined.plan
        report.stages, report.held_by_several = layers_per_stage(plan), held_by_several(plan, plain)
    return model


def _compare_gradients(
    report: Report, plain: PreTrainedModel, model: HFTransformerModel, batch_loss: BatchLoss, when: str = ""
) -> bool:
    """Whether every gradient is right on every rank: what is replicated may be right on one and wrong on another.

    batch_loss: the loss of which `plain` has the gradients, for a copy of it. The report keeps the worst of all calls.
    """
    errors = relative_errors(gradients(plain), seen_gradients(model))
    worst = max(errors, key=errors.get)
    error, worst = max(gather_objects((errors[worst], worst)))
    if report.gradient_error is None or error > report.gradient_error:
        report.gradient_error, report.worst_parameter = error, worst
    wrong = sorted(name for name, value in errors.items() if not value <= GRADIENT_TOLERANCE)
    excused = {}
    if wrong:
        rounding = _rounding_of_plain(plain, batch_loss)
        excused = {name: rounding[name] for name in wrong if errors[name] <= _ROUNDINGS * rounding[name]}
    for name, size in sorted({entry for found in gather_objects(excused) for entry in found.items()}):
        report.notes.append(f"{name}{when}: plain Transformers in fp32 is {size:.1e} from float64 itself")
    wrong = sorted({name for found in gather_objects(set(wrong) - excused.keys()) for name in found})
    if wrong:
        report.fail(f"gradient of {wrong[0]} is wrong{when}")
    return not wrong


def _rounding_of_plain(plain: PreTrainedModel, batch_loss: BatchLoss) -> dict[str, float]:
    """How far the gradients of plain Transformers in fp32 are from those in float64, relatively.

    Some are sums in which nearly everything cancels (diffllama's lambdas): there any other order of adding in fp32 is
    as wrong as this one.
    """
    found = []
    for dtype in (torch.float64, torch.float32):
        one = copy.deepcopy(plain).to(dtype).train()
        one.zero_grad()
        batch_loss(one).backward()
        found.append(gradients(one))
    return relative_errors(*found)


def _compare_clipping(report: Report, plain: PreTrainedModel, model: HFTransformerModel, batch_loss: BatchLoss) -> None:
    """Clip to half of the norm: torch's own on plain Transformers' gradients, and ours."""
    norm = torch.nn.utils.get_total_norm(list(gradients(plain).values())).item()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), norm / 2)
    found = model.clip_grad_norm_(norm / 2).item()
    report.norm_error = max(gather_objects(abs(found - norm) / norm))
    if not report.norm_error <= GRADIENT_TOLERANCE:
        report.fail(f"gradient norm {found:.6f} instead of {norm:.6f}")
    _compare_gradients(report, plain, model, batch_loss, " after clipping")


def _compare_evaluation(report: Report, plain: PreTrainedModel, model: HFTransformerModel, seq: int) -> None:
    """The mean loss of another batch in evaluation mode."""
    rows = _ROWS_TO_EVALUATE
    input_ids, labels = global_batch(rows * model.dims.data_parallel_size, seq)
    with torch.no_grad():
        expected = plain.eval()(input_ids=input_ids, labels=labels, use_cache=False).loss.item()
    mine = slice(model.data_rank * rows, (model.data_rank + 1) * rows)
    loss_sum, targets = model.evaluate(input_ids[mine], labels[mine])
    found = (loss_sum / targets).item()
    report.evaluation_difference = max(gather_objects(abs(found - expected)))
    if not report.evaluation_difference <= LOSS_TOLERANCE:
        report.fail(f"evaluation finds a loss of {found:.6f} instead of {expected:.6f}")


def _compare_documents(report: Report, plain: PreTrainedModel, model: HFTransformerModel, rows: int, seq: int) -> None:
    """Loss and every gradient of packed documents on ranks that share rows, and of each document alone.

    rows, seq: of a data rank's batch. A model that keeps documents apart in no way, or says so, is refused here.
    """
    input_ids, labels, positions = packed_batch(rows * model.dims.data_parallel_size, seq)
    mine = slice(model.data_rank * rows, (model.data_rank + 1) * rows)
    model.hf_model.zero_grad()
    try:
        isolation = model.isolate_documents()
        if isolation.way is None:
            raise ValueError(isolation.reason)
        loss = model.forward_backward(input_ids[mine], labels[mine], position_ids=positions[mine])
    except ValueError as error:
        if not is_meant_for_the_user(error):
            raise
        report.documents = "refused"
        report.notes.append(f"documents: {error}")
        return
    plain.zero_grad()
    plain.train()
    expected = loss_of_documents_alone(plain, input_ids, labels)
    expected.backward()
    difference = max(gather_objects(abs(loss.item() - expected.item())))
    report.loss_difference = max(report.loss_difference, difference)
    if not difference <= LOSS_TOLERANCE:
        report.fail(f"loss of packed documents {loss.item():.6f} instead of {expected.item():.6f}")
    is_right = _compare_gradients(
        report, plain, model, lambda one: loss_of_documents_alone(one, input_ids, labels), " with packed documents"
    )
    report.documents = "pass" if difference <= LOSS_TOLERANCE and is_right else "fail"


def _describe_split(report: Report, hf_config, model_class, model: HFTransformerModel) -> None:
    """What tensor parallelism splits, and whether the sequence, too."""
    split = model.tensor_parallelism
    report.sequence_parallel = split.sequence_parallel
    if not split.sequence_parallel:
        report.notes.append(f"no sequence parallelism: {split.sequence_parallel_because}")
    share_of_twin = sharded_share(model.hf_model, model.mesh.get_group("pp"))
    if dist.get_rank() == 0:
        report.sharded = share_of_real_sizes(hf_config, model_class, split.recipe, model.mesh["tp"])
        if report.sharded is None:
            report.sharded, report.sharded_of_twin = share_of_twin, True


def _compare_weights(
    report: Report,
    hf_config,
    model_class,
    twin_degree: int,
    parallelism: ParallelismConfig,
    mesh: DeviceMesh,
    folder: Path,
) -> None:
    """Folder -> sharded parameters -> first loss; sharded parameters -> folder -> bit-equal weights."""
    pretrained, exported = folder / "pretrained", folder / "exported"
    layers = minimum_layers(parallelism)
    original = build_twin(hf_config, model_class, degree=twin_degree, minimum_layers=layers, seed=1)
    if dist.get_rank() == 0:
        original.save_pretrained(pretrained, max_shard_size="100KB")
    dist.barrier()
    rows = 1 if layers is None else rows_of_a_call(parallelism)
    input_ids, labels = global_batch(rows * parallelism.data_parallel_shard_degree, sequence_length(parallelism))
    with torch.no_grad():
        plain_loss = original(input_ids=input_ids, labels=labels, use_cache=False).loss
    model = HFTransformerModel.from_pretrained(str(pretrained))
    model.parallelize(parallelism, mesh=mesh)
    mine = slice(model.data_rank * rows, (model.data_rank + 1) * rows)
    loss = model.forward_backward(input_ids[mine], labels[mine])
    report.pretrained_loss_difference = abs(loss.item() - plain_loss.item())
    model.save_pretrained(exported, max_file_size=100_000)
    differing = _differing(original, AutoModelForCausalLM.from_pretrained(exported))
    report.export = "bit-equal" if not differing else f"differs: {', '.join(differing[:3])}"
    # Ranks that split a sum add in another order, and so do micro-batches; else the computation is the same one.
    degrees = (
        parallelism.tensor_parallel_degree, parallelism.pipeline_parallel_degree, parallelism.context_parallel_degree
    )  # fmt: skip
    same_order = max(degrees) == 1
    tolerance = PRETRAINED_LOSS_TOLERANCE if same_order else LOSS_TOLERANCE
    if not report.pretrained_loss_difference <= tolerance:
        report.fail(f"loss of the loaded folder {loss.item():.7f} instead of {plain_loss.item():.7f}")
    if differing:
        report.fail(f"export {report.export}")
    dist.barrier()


def _differing(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    tensors, others = one.state_dict(), other.state_dict()
    names = sorted(tensors.keys() | others.keys())
    return [n for n in names if n not in tensors or n not in others or not torch.equal(tensors[n], others[n])]


def global_batch(rows: int, seq: int = 3 * WINDOW) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (rows, seq); every row ignores another number of labels, so that means of means differ."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (rows, seq), generator=generator)
    labels = input_ids.clone()
    for row in range(rows):
        labels[row, : (5 * row) % (seq - 4)] = -100
    return input_ids, labels


class _CollectWarnings(logging.Handler):
    """What the wrapper warns of (a loss on full logits, layers left uncompiled) belongs in the report."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(record.getMessage())
