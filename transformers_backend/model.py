"""The wrapper around an unmodified Transformers causal LM: build, parallelise, train, export.

    model_args = HFTransformerModelArgs().update_from_config(job_config)   # what to build; reads only the HF config
    model = HFTransformerModel(model_args)                                 # on the meta device: no memory yet
    model.parallelize(ParallelismConfig(...))                              # shards, allocates, initialises or loads
    loss = model.forward_backward(input_ids, labels)

or around a model that the user already has: `HFTransformerModel.wrap(hf_model)`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from parallelize.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    KernelConfig,
    ParallelismConfig,
    async_tensor_parallel_problems,
    check,
    zero_bubble_compile_problems,
)
from parallelize.distributed import (
    are_equal,
    first_rank_first,
    gather_objects,
    pick_device,
    share_random_state,
    sum_over,
)
from parallelize.fsdp import reduced_once, reshard
from parallelize.grad_norm import clip_grad_norm_
from parallelize.mixed_precision import parameters_cast_to
from parallelize.model import needs_fsdp, parallelize_model
from parallelize.parallel_dims import ParallelDims
from parallelize.pipeline_parallel.runtime import Pipeline
from parallelize.pipeline_parallel.schedules import build_schedule
from parallelize.pipeline_parallel.shared import summed_gradients
from transformers_backend.decisions import (
    TensorParallelism,
    check_every_layer_runs,
    check_mixed_precision,
    check_same_weights,
    choose_tensor_parallelism,
    proven_attention,
    refuse_inner_outputs,
    without_wrong_compilation,
)
from transformers_backend.decoder import check_is_plain, describe_decoder, has_dropout
from transformers_backend.isolation import Isolation, find_isolation, packed_inputs, usual_way
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.pipeline_plan import PipelinePlan, plan_pipeline
from transformers_backend.proof import check_recomputation, prove
from transformers_backend.stages import LocalStages
from transformers_backend.tensor_proof import vocabulary_shard
from transformers_backend.weights import (
    DEFAULT_FILE_SIZE,
    allocate,
    full_tensor,
    init_buffers,
    init_weights,
    load_hf_weights,
    local_part,
    named_tensors,
    resolve_folder,
    save_hf_weights,
)

__all__ = ["HFTransformerModel", "HFTransformerModelArgs"]

logger = logging.getLogger(__name__)


class HFTransformerModel:
    """A Transformers causal LM that trains on a mesh; `hf_model` is the Transformers model itself.

    Parameter names are Transformers' own throughout. Without `.parallelize` it trains on one device.
    """

    def __init__(self, model_args: HFTransformerModelArgs) -> None:
        """Build the model described by `model_args` on the meta device; nothing is downloaded but its config."""
        hf_config, model_class = model_args.resolve()
        self._set_up(build_on_meta(hf_config, model_class, model_args), model_args)

    @classmethod
    def wrap(cls, hf_model: PreTrainedModel) -> HFTransformerModel:
        """Wrap a model that was loaded or built with Transformers. Changes nothing until it is parallelised."""
        check_is_plain(hf_model)
        model = cls.__new__(cls)
        model._set_up(hf_model, HFTransformerModelArgs(attn_implementation=hf_model.config._attn_implementation))
        return model

    @classmethod
    def from_pretrained(cls, name: str, **model_args) -> HFTransformerModel:
        """A model of a hub id or folder, on the meta device until `.parallelize` or the first step loads its weights.

        model_args: further fields of `HFTransformerModelArgs` (revision, config_overrides, dtype ...).
        """
        return cls(HFTransformerModelArgs(model=name, **model_args))

    def _set_up(self, hf_model: PreTrainedModel, model_args: HFTransformerModelArgs) -> None:
        self.hf_model = hf_model
        self.model_class = type(hf_model)  # FSDP2 gives the instance a class of its own later
        self.model_args = model_args
        self.decoder = describe_decoder(hf_model)
        self.dims = ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=1, tp=1)
        self.mesh = None
        self.device = next(hf_model.parameters()).device
        """Where the model computes; batches on another device are moved there."""
        self.tensor_parallelism: TensorParallelism | None = None
        """How the model is split over tensor-parallel ranks; None without tensor parallelism."""
        self._cast_to: torch.dtype | None = None  # what FSDP2 does not cast, see parallelize/mixed_precision.py
        self.loss_is_chunked = True
        """Whether the head runs chunk by chunk and full logits never exist; known once the loss is installed."""
        self._ready = False
        self.pipeline_plan: PipelinePlan | None = None
        """Which layers are on which rank; None without pipeline parallelism."""
        self._stages: LocalStages | None = None
        self._pipeline: Pipeline | None = None
        self._shared_parameters: dict[str, tuple[int, ...]] = {}
        self._microbatch_size = 1
        self._like: tuple[tuple, torch.Tensor] | None = None
        self._isolation: Isolation | None = None  # None: batches hold no packed documents, see `isolate_documents`
        self._local_losses_are_finite = torch.tensor(True)  # of the micro-batches since the last clipping
        self._step_was_finite = torch.tensor(True)  # and of those before it

    # -- placing the model on devices ---------------------------------------------------------------------------

    def parallelize(
        self,
        parallelism: ParallelismConfig,
        *,
        activation_checkpoint: ActivationCheckpointConfig | None = None,
        compile: CompileConfig | None = None,
        kernels: KernelConfig | None = None,  # none exist yet
        param_dtype: torch.dtype | None = None,
        cpu_offload: bool = False,
        seed: int = 0,
        seq_len: int = 4096,
        mesh: DeviceMesh | None = None,
    ) -> HFTransformerModel:
        """Shard the model over the initialised process group, in place, then allocate and fill what is still meta.

        param_dtype: dtype of the computation (bfloat16 for mixed precision); None is the parameters' own dtype, in
        which they are kept and updated either way. Gradients are summed over ranks in fp32.
        cpu_offload: keep shards and optimizer state in host memory. seed: of the initial weights, where they are not
        loaded. seq_len: tokens of a sequence, by which layers are shared out among pipeline stages. mesh: that of another model of this process, to share its process groups; None makes a new one. Raises a
        ValueError that lists every bad value.
        """
        if self._ready:
            raise ValueError(
                "parallelize comes once, before the first step, and this model is parallelised or has made a step "
                "already. Make or load the model anew to change how it is parallelised."
            )
        activation_checkpoint = activation_checkpoint or ActivationCheckpointConfig()
        compile = compile or CompileConfig()
        check([*parallelism.problems(), *activation_checkpoint.problems(), *compile.problems()])
        check(zero_bubble_compile_problems(parallelism, compile))
        check_mixed_precision(self.hf_model, param_dtype)
        if not dist.is_initialized():
            raise ValueError("parallelize needs an initialised process group: torch.distributed.init_process_group().")
        check_every_layer_runs(self.hf_model, dist.get_world_size())
        self.device = pick_device()
        check(async_tensor_parallel_problems(parallelism, compile, self.device.type))
        self.dims = ParallelDims.resolve(parallelism, dist.get_world_size())
        self.mesh = self.dims.build_mesh(self.device.type) if mesh is None else self.dims.check_mesh(mesh)
        if not self._is_meta:
            check_same_weights(self.hf_model)
        attention = proven_attention(self.model_args.attn_implementation)
        pipeline = plan_pipeline(self.hf_model, self.decoder, attention, parallelism, seq_len)
        split = choose_tensor_parallelism(self.hf_model, self.decoder, attention, self.mesh["tp"], parallelism)
        check_recomputation(self.hf_model.config, self.model_class, attention, activation_checkpoint)
        compile = without_wrong_compilation(
            compile, activation_checkpoint, self.hf_model, attention, self.device, split
        )
        self.tensor_parallelism, self.pipeline_plan = split, pipeline
        self._microbatch_size = parallelism.pipeline_parallel_microbatch_size
        random = has_dropout(self.hf_model)
        if pipeline is not None:
            self._cut_into_stages(pipeline)
        if self._stages is None or self._stages.has_last:
            self._install_loss(compile)
        parallelize_model(
            self.hf_model,
            layers=self.decoder.layers if self._stages is None else self._stages.layers,
            stacks=() if self._stages is None else self._stages.stacks,
            separate_units=self._separate_units(),
            mesh=self.mesh,
            tensor_plan=None if split is None else split.plan.of_part(self.hf_model),
            sequence_parallel=split is not None and split.sequence_parallel,
            has_dropout=random,
            parallelism=parallelism,
            activation_checkpoint=activation_checkpoint,
            compile=compile,
            param_dtype=param_dtype,
            cpu_offload=cpu_offload,
        )
        if not needs_fsdp(self.mesh, cpu_offload):
            self._cast_to = param_dtype
            if not self._is_meta:
                self.hf_model.to(self.device)
        self._fill(torch.device("cpu") if cpu_offload else self.device, seed)
        if self._stages is not None:
            self._stages.place_stand_ins(self.device, param_dtype or self.hf_model.dtype)
            self._stages.install()
            self._pipeline = self._make_pipeline(parallelism)
        if split is not None:
            refuse_inner_outputs(self.hf_model, sequence_parallel=split.sequence_parallel)
            share_random_state(self.mesh.get_group("tp"))
        self._ready = True
        return self

    def _cut_into_stages(self, pipeline: PipelinePlan) -> None:
        local = pipeline.stages_of_rank(self.mesh.get_local_rank("pp"))
        self._stages = LocalStages(self.hf_model, self.decoder, pipeline.split, local)
        self._stages.drop_the_rest()
        self._shared_parameters = {}
        for name, parameter in self.hf_model.named_parameters():
            if parameter.requires_grad and len(ranks := pipeline.ranks_of(name)) > 1:
                self._shared_parameters[name] = ranks

    def _separate_units(self) -> list[str]:
        """An embedding that is not the head, too, is an FSDP2 unit of its own; in a pipeline, where it is."""
        embedding = self.hf_model.get_submodule(self.decoder.embedding)
        return [] if self.decoder.embedding_is_tied or not list(embedding.parameters()) else [self.decoder.embedding]

    def _make_pipeline(self, parallelism: ParallelismConfig) -> Pipeline:
        def run_stage(stage: int, hidden_states: torch.Tensor | None, **batch) -> torch.Tensor:
            targets = batch.pop("targets")
            inputs = self._inputs(**batch)
            return self.hf_model(
                stage=stage, hidden_states=hidden_states, targets=targets.view_as(inputs["input_ids"]), **inputs
            )

        def make_schedule(stages, micro_batches, loss_fn):
            return build_schedule(
                parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv,
                stages, micro_batches, loss_fn,
            )  # fmt: skip

        own = list(self.hf_model.parameters())
        is_sharded = isinstance(self.hf_model, FSDPModule)  # then modules hold gathered parameters as they compute
        return Pipeline(
            run_stage,
            group=self.mesh.get_group("pp"),
            device=self.device,
            rank_of_stage=self.pipeline_plan.rank_of_stage,
            make_schedule=make_schedule,
            parameters=lambda: [p for p in (self.hf_model.parameters() if is_sharded else own) if p.requires_grad],
        )

    def _install_loss(self, compile: CompileConfig) -> None:
        attention = proven_attention(self.model_args.attn_implementation)
        proof = prove(self.hf_model.config, self.model_class, attention)
        self.loss_is_chunked = proof.full_loss_because is None
        if not self.loss_is_chunked:
            logger.warning("The loss holds the full logits in memory: %s", proof.full_loss_because)
        backend = compile.backend if compile.enable and "loss" in compile.components else None
        vocabulary = None
        if self.tensor_parallelism is not None:
            plan = self.tensor_parallelism.plan
            vocabulary = vocabulary_shard(self.hf_model, self.decoder, plan, self.mesh["tp"])
        install_loss(
            self.hf_model, self.decoder, chunked=self.loss_is_chunked, compile_backend=backend, vocabulary=vocabulary
        )

    def _fill(self, device: torch.device, seed: int) -> None:
        """Allocate a meta model on `device` and load or initialise its weights; a real model is left alone."""
        if not self._is_meta:
            return
        allocate(self.hf_model, device, buffer_device=self.device)
        blueprint = self.blueprint
        if self.model_args.init == "pretrained":
            with first_rank_first():
                folder = resolve_folder(self.model_args.model, self.model_args.revision)  # downloads a hub id
            if (folder / "generation_config.json").is_file():
                self.hf_model.generation_config = GenerationConfig.from_pretrained(folder)
            init_buffers(self.hf_model, blueprint, device=device)
            load_hf_weights(self.hf_model, blueprint, self.model_args.model, revision=self.model_args.revision)
        else:
            init_weights(self.hf_model, blueprint, self.decoder, device=device, seed=seed)

    def _make_ready(self) -> None:
        """What `.parallelize` does, for one device: called by the first step of a model that was not parallelised."""
        if not self._ready:
            self._fill_if_meta()
            self._install_loss(CompileConfig())
            self._ready = True

    def _fill_if_meta(self) -> None:
        if self._is_meta:
            self.device = pick_device()
            self._fill(self.device, seed=0)

    @property
    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.hf_model.parameters())

    @functools.cached_property
    def blueprint(self) -> PreTrainedModel:
        """The same model, unsharded, on the meta device: Transformers' own idea of names, shapes and conversions."""
        return build_on_meta(self.hf_model.config, self.model_class, self.model_args)

    # -- one step -------------------------------------------------------------------------------------------------

    def forward_backward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Add the gradients of one (micro-)batch of this data-parallel rank and return the global mean loss.

        input_ids, labels, position_ids: (batch, seq) int64; labels follow Transformers (aligned with the tokens, -100
        ignored, shifted inside); for packed documents see `isolate_documents`. num_items_in_batch: number of target
        tokens of the global batch, over all data ranks and accumulation steps; None counts those of this call.
        Returns an fp32 scalar, the same on every rank; under accumulation the losses of the micro-batches add up to
        the loss of the batch.
        """
        self._make_ready()
        self._check_shapes(input_ids, labels, position_ids)
        self._check_same_batch(input_ids, labels, position_ids)
        if not self.hf_model.training:  # from_pretrained gives a model in evaluation mode
            self.hf_model.train()
        if num_items_in_batch is None:
            num_items_in_batch = self.count_targets(labels)
        # A batch without a single target has loss 0 and no gradient, rather than 0 / 0.
        targets = torch.as_tensor(num_items_in_batch, device=self.device).clamp(min=1)
        if self._pipeline is not None:
            loss = self._run_pipeline(input_ids, labels, position_ids, targets)
        else:
            with self.computing():
                loss = self._sum_loss(input_ids, labels, position_ids) / targets
                loss.backward()
        self._local_losses_are_finite = self._local_losses_are_finite.to(self.device) & loss.detach().isfinite()
        return sum_over(loss.detach(), [*self._data_meshes, *self._pipeline_meshes])

    def _run_pipeline(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None,
        targets: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run this rank's stages on all micro-batches of a batch; without `targets` forward only.

        The loss of the batch divided by `targets`, or the summed one; 0 on ranks without the last stage.
        """
        batch = {"input_ids": input_ids.to(self.device), "targets": shift_labels(labels.to(self.device))}
        if position_ids is not None:
            batch["position_ids"] = position_ids.to(self.device)
        rows = input_ids.shape[0]
        micro_batches = (
            rows // self._microbatch_size if targets is not None else rows // math.gcd(rows, self._microbatch_size)
        )
        with self.computing():
            like = self._hidden_states_like(batch, rows // micro_batches)
            if targets is None:
                return sum(self._pipeline.forward(batch, micro_batches, like), torch.zeros((), device=self.device))
            parameters = dict(self.hf_model.named_parameters())
            shared = {parameters[name]: ranks for name, ranks in self._shared_parameters.items()}
            with summed_gradients(shared, self.mesh.get_group("pp")), reduced_once(self.hf_model):
                return self._pipeline.forward_backward(batch, micro_batches, like, targets)

    def _hidden_states_like(self, batch: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
        """Hidden states of a micro-batch as they travel between stages, for their shape and dtype."""
        key = (rows, *batch["input_ids"].shape[1:], len(batch), self._isolation)
        if self._like is None or self._like[0] != key:
            piece = {name: tensor[:rows] for name, tensor in batch.items() if name != "targets"}
            with evaluation_mode(self.hf_model):
                like = self._stages.hidden_states_like(**self._inputs(**piece))
            reshard(self.hf_model)
            if self.tensor_parallelism is not None and self.tensor_parallelism.sequence_parallel:
                shape = list(like.shape)
                shape[-2] = -(-shape[-2] // self.dims.tp)
                like = like.new_empty(shape)
            self._like = (key, torch.empty_like(like))
        return self._like[1]

    @torch.no_grad()
    def evaluate(
        self, input_ids: torch.Tensor, labels: torch.Tensor, *, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss (fp32) and number of target tokens of one batch over all data ranks, without dropout."""
        self._make_ready()
        self._check_shapes(input_ids, labels, position_ids)
        self._check_same_batch(input_ids, labels, position_ids)
        with evaluation_mode(self.hf_model):
            if self._pipeline is not None:
                loss = self._run_pipeline(input_ids, labels, position_ids, None)
            else:
                with self.computing():
                    loss = self._sum_loss(input_ids, labels, position_ids)
        reshard(self.hf_model)
        return sum_over(loss, [*self._data_meshes, *self._pipeline_meshes]), self.count_targets(labels)

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """The context in which `hf_model` computes in the `param_dtype` of `.parallelize`, forward and backward."""
        return parameters_cast_to(self.hf_model, self._cast_to)

    def count_targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of target tokens of this batch over all data ranks: labels that are not -100, after the shift."""
        return sum_over(count_targets(labels.to(self.device)), self._data_meshes)

    @staticmethod
    def _check_shapes(input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        for name, tensor in (("input_ids", input_ids), ("labels", labels), ("position_ids", position_ids)):
            if tensor is not None and (tensor.shape != input_ids.shape or tensor.dim() != 2):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: input_ids, labels and position_ids must all be "
                    f"(batch, seq); input_ids is {tuple(input_ids.shape)}."
                )

    def _check_same_batch(self, *batch: torch.Tensor | None) -> None:
        """Ranks that split a model's matrices must work on the same tokens; raises at once on a CPU, later on CUDA."""
        if self.dims.tp == 1:
            return
        tensors = [tensor.to(self.device) for tensor in batch if tensor is not None]
        shape = torch.tensor(tensors[0].shape, device=self.device)
        contents = torch.cat([shape, *(tensor.flatten() for tensor in tensors)])
        same = are_equal(contents, self.mesh.get_group("tp"))
        message = (
            f"input_ids, labels or position_ids differ between ranks of one tensor-parallel group of {self.dims.tp}, "
            "which compute on the same tokens. Give each rank the batch of its data_rank, of dims.data_parallel_size."
        )
        if same.device.type == "cpu" and not same:
            raise ValueError(message)
        torch._assert_async(same, message)

    def _sum_loss(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        targets = shift_labels(labels.to(self.device))
        inputs = self._inputs(input_ids.to(self.device), None if position_ids is None else position_ids.to(self.device))
        return self.hf_model(**inputs, targets=targets.view_as(inputs["input_ids"]))

    def _inputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> dict:
        """What the model is called with for tokens, and positions where there are some, both (batch, seq)."""
        if position_ids is None:
            return {"input_ids": input_ids}
        if self._isolation is None and not self.decoder.accepts_position_ids:
            raise ValueError(
                f"position_ids: {self.model_class.__name__} has no notion of them (it derives positions from the "
                "order of the tokens). Leave them out, or call isolate_documents() first for packed documents."
            )
        return packed_inputs(
            usual_way(self._attention) if self._isolation is None else self._isolation.way,
            input_ids, position_ids, dtype=self._cast_to or self.hf_model.dtype,
            accepts_position_ids=self.decoder.accepts_position_ids,
        )  # fmt: skip

    def isolate_documents(self) -> Isolation:
        """Say that `position_ids` which restart mark packed documents, and find how attention stays within each.

        From then on every `position_ids` is read so. Returns the way that was found, or the reason why documents of
        one row see each other here; such a model trains all the same.
        """
        if self._isolation is None:
            self._isolation = find_isolation(self.hf_model.config, self.model_class, self._attention)
        return self._isolation

    @property
    def _attention(self) -> str | None:
        return self.hf_model.config._attn_implementation

    @property
    def data_rank(self) -> int:
        """Which part of the data this rank trains on: 0 <= data_rank < dims.data_parallel_size."""
        if self.mesh is None:
            return 0
        return self.mesh.get_local_rank("dp_replicate") * self.dims.dp_shard + self.mesh.get_local_rank("dp_shard")

    @property
    def vocabulary_size(self) -> int:
        return self.hf_model.get_submodule(self.decoder.embedding).weight.shape[0]

    @property
    def _data_meshes(self) -> list[DeviceMesh]:
        return [] if self.mesh is None else [self.mesh["dp_replicate"], self.mesh["dp_shard"]]

    @property
    def _pipeline_meshes(self) -> list[DeviceMesh]:
        return [] if self._pipeline is None else [self.mesh["pp"]]

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their global 2-norm is at most `max_norm`; returns the norm before (fp32)."""
        self._step_was_finite = self._local_losses_are_finite
        self._local_losses_are_finite = torch.ones_like(self._step_was_finite)
        parameters = dict(self.hf_model.named_parameters())
        if self._pipeline is None:
            return clip_grad_norm_(parameters.values(), max_norm)
        rank = self.mesh.get_local_rank("pp")
        elsewhere = [parameters[name] for name, ranks in self._shared_parameters.items() if ranks[0] != rank]
        return clip_grad_norm_(
            parameters.values(), max_norm, pipeline_group=self.mesh.get_group("pp"), counted_elsewhere=elsewhere
        )

    def find_nonfinite(self) -> str:
        """A sentence on the latest step: ranks with a non-finite loss, and parameters with such gradients."""
        gradients = {name: p.grad for name, p in self.hf_model.named_parameters() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not local_part(gradient).isfinite().all()]
        finite = bool(self._step_was_finite) and bool(self._local_losses_are_finite)
        reports = gather_objects((finite, bad))
        ranks = [rank for rank, (is_finite, _) in enumerate(reports) if not is_finite]
        names = sorted({name for _, found in reports for name in found})
        on_ranks = f"Non-finite loss on rank {', '.join(map(str, ranks))}" if ranks else "Finite loss on every rank"
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{on_ranks}; non-finite gradients of {listed or 'no parameter'}."

    # -- looking at and saving it ---------------------------------------------------------------------------------

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """{Transformers parameter name: full gradient on the CPU} of parameters that have one, on every rank."""
        return self._of_all_stages(
            {
                name: self._full(name, parameter.grad)
                for name, parameter in self.hf_model.named_parameters()
                if parameter.grad is not None
            }
        )

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """{Transformers name: full CPU tensor} of parameters and persistent buffers, on every rank."""
        self._fill_if_meta()
        return self._of_all_stages(
            {name: self._full(name, tensor) for name, tensor in named_tensors(self.hf_model).items()}
        )

    def _of_all_stages(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._pipeline is None:
            return tensors
        parts = gather_objects(tensors, self.mesh.get_group("pp"))
        return {name: tensor for part in parts for name, tensor in part.items()}

    def _full(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return full_tensor(self.hf_model, name, tensor).to("cpu", copy=True)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
        max_file_size: int = DEFAULT_FILE_SIZE,
    ) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; every rank calls it.

        dtype: cast weights to it; None keeps the parameters' own. max_file_size: bytes of one safetensors file.
        """
        self._fill_if_meta()
        save_hf_weights(
            self.hf_model,
            self.blueprint,
            self.decoder,
            folder,
            tokenizer=tokenizer,
            generation_config=self.hf_model.generation_config,
            dtype=dtype,
            max_file_size=max_file_size,
        )


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within the block every module evaluates (no dropout); afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
