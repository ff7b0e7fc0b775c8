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
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelize.attention_backend import AttentionChoice
from parallelize.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    Float8Config,
    KernelConfig,
    ParallelismConfig,
)
from parallelize.distributed import pick_device, share_random_state, sum_over
from parallelize.fsdp import reshard
from parallelize.grad_norm import clip_grad_norm_
from parallelize.mixed_precision import parameters_cast_to
from parallelize.model import needs_fsdp, parallelize_model
from parallelize.parallel_dims import ParallelDims
from transformers_backend.batch_checks import check_same_batch, check_shapes
from transformers_backend.context import SharedContext
from transformers_backend.context_proof import isolate_shared
from transformers_backend.decisions import TensorParallelism, proven_attention, refuse_inner_outputs
from transformers_backend.decoder import check_is_plain, describe_decoder, has_dropout
from transformers_backend.evaluation import evaluation_mode
from transformers_backend.filling import fill
from transformers_backend.float8_plan import Float8Plan, check_tokens
from transformers_backend.isolation import Isolation, find_isolation, usual_inputs
from transformers_backend.kernel_plan import KernelPlan
from transformers_backend.loss import count_targets, install_loss, shift_labels
from transformers_backend.model_args import HFTransformerModelArgs, build_on_meta
from transformers_backend.nonfinite import describe_nonfinite
from transformers_backend.pipelined import PipelinedModel
from transformers_backend.plain_copy import give_plain_copies, own_forwards, refuse_copies
from transformers_backend.plan import ParallelPlan, plan_parallelism
from transformers_backend.proof import prove
from transformers_backend.tensor_proof import vocabulary_shard
from transformers_backend.weights import DEFAULT_FILE_SIZE, LiveTensors, named_tensors, save_hf_weights

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
        self._meshes: dict[str, DeviceMesh] = {}  # dimensions of the mesh, which would be cut out of it at every step
        self.device = next(hf_model.parameters()).device
        """Where the model computes; batches on another device are moved there."""
        self.tensor_parallelism: TensorParallelism | None = None
        """How the model is split over tensor-parallel ranks; None without tensor parallelism."""
        self._cast_to: torch.dtype | None = None  # what FSDP2 does not cast, see parallelize/mixed_precision.py
        self.context: SharedContext | None = None
        """How ranks share sequences; None without context parallelism."""
        self.loss_is_chunked = True
        """Whether the head runs chunk by chunk and full logits never exist; known once the loss is installed."""
        self._ready = False
        self._is_changed = False  # by parallelize or the first step; not to the end where an error came between
        self.pipelined: PipelinedModel | None = None
        """This rank's stages; None without pipeline parallelism, and otherwise `hf_model` has only their layers."""
        self.kernels = KernelPlan()
        """What computes by a kernel."""
        self.attention = AttentionChoice()
        """In which order torch tries its attention kernels."""
        self.float8 = Float8Plan()
        """What multiplies in float8."""
        self._isolation: Isolation | None = None  # None: batches hold no packed documents, see `isolate_documents`
        self._local_losses_are_finite = torch.tensor(True)  # of the micro-batches since the last clipping
        self._step_was_finite = torch.tensor(True)  # and of those before it

    def __getstate__(self) -> dict:
        if self._ready:
            raise ValueError(
                "An HFTransformerModel that trains cannot be copied or pickled: it would not go on as this one does. "
                "Copy its hf_model, a plain Transformers model again (on one rank), or use save_pretrained."
            )
        return vars(self)

    # -- placing the model on devices ---------------------------------------------------------------------------

    def parallelize(
        self,
        parallelism: ParallelismConfig,
        *,
        activation_checkpoint: ActivationCheckpointConfig | None = None,
        compile: CompileConfig | None = None,
        float8: Float8Config | None = None,
        kernels: KernelConfig | None = None,
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
        loaded. seq_len: tokens of a sequence, by which layers are shared out among the stages of a pipeline and, on a
        GPU, attention kernels are timed and chosen. mesh: that of another model of this process, to share its process
        groups; None makes a new one. Raises a ValueError that lists every bad value. kernels: None is "auto", float8:
        None is without (see docs/kernels.md for both); what modules compute by is in `self.kernels` and `self.float8`
        afterwards.
        """
        if self._is_changed:
            raise ValueError(
                "parallelize comes once, before the first step, and this model is parallelised or has made a step "
                "already, or an error left it half-way. Make or load the model anew to change how it is parallelised."
            )
        forwards = own_forwards(self.hf_model)
        plan = plan_parallelism(
            self.hf_model, self.decoder, self.model_args.attn_implementation,
            parallelism=parallelism, activation_checkpoint=activation_checkpoint or ActivationCheckpointConfig(),
            compile=compile or CompileConfig(), float8=float8 or Float8Config(), kernels=kernels or KernelConfig(),
            param_dtype=param_dtype, seq_len=seq_len, mesh=mesh,
        )  # fmt: skip
        self.device, self.dims, self.mesh = plan.device, plan.dims, plan.mesh
        self._meshes = {name: plan.mesh[name] for name in plan.mesh.mesh_dim_names}
        self.context, self.tensor_parallelism = plan.context, plan.tensor
        self.float8, self.kernels, self.attention = plan.float8, plan.kernels, plan.attention
        if plan.pipeline is not None:
            self._is_changed = True
            self.pipelined = PipelinedModel(self.hf_model, self.decoder, plan.pipeline, plan.mesh, parallelism)
        if self.pipelined is None or self.pipelined.has_last_stage:
            self._install_loss(plan.compile)
        self._is_changed = True
        self._apply(plan, param_dtype, cpu_offload)
        self._fill(torch.device("cpu") if cpu_offload else plan.device, seed)
        self._start(plan)
        if plan.dims.world_size == 1 and not cpu_offload:
            give_plain_copies(self.hf_model, forwards)
        else:
            refuse_copies(self.hf_model)
        self._ready = True
        return self

    def _apply(self, plan: ParallelPlan, param_dtype: torch.dtype | None, cpu_offload: bool) -> None:
        """Place the layers of this rank, which may still be on the meta device."""
        parallelize_model(
            self.hf_model,
            layers=self.decoder.layers if self.pipelined is None else self.pipelined.layers,
            stacks=() if self.pipelined is None else self.pipelined.stacks,
            separate_units=self._separate_units(), mesh=plan.mesh,
            float8=plan.float8.linears, kernels=plan.kernels.kernels,
            tensor_plan=None if plan.tensor is None else plan.tensor.plan.of_part(self.hf_model),
            sequence_parallel=plan.sequence_parallel, has_dropout=has_dropout(self.hf_model),
            parallelism=plan.parallelism, activation_checkpoint=plan.activation_checkpoint, compile=plan.compile,
            param_dtype=param_dtype, cpu_offload=cpu_offload,
        )  # fmt: skip
        if not needs_fsdp(plan.mesh, cpu_offload):
            self._cast_to = param_dtype
            if not self._is_meta:
                self.hf_model.to(plan.device)

    def _start(self, plan: ParallelPlan) -> None:
        """What comes around the placed and filled model."""
        if self.pipelined is not None:
            self.pipelined.start(
                self._inputs, device=plan.device, compute_dtype=plan.compute_dtype,
                sequence_parallel_degree=plan.dims.tp if plan.sequence_parallel else 1,
            )  # fmt: skip
        if plan.context is not None:
            plan.context.install()
        if plan.tensor is not None:
            refuse_inner_outputs(self.hf_model, sequence_parallel=plan.sequence_parallel)
            share_random_state(plan.mesh.get_group("tp"))

    def _separate_units(self) -> list[str]:
        """An embedding that is not the head, too, is an FSDP2 unit of its own; in a pipeline, where it is."""
        embedding = self.hf_model.get_submodule(self.decoder.embedding)
        return [] if self.decoder.embedding_is_tied or not list(embedding.parameters()) else [self.decoder.embedding]

    def _install_loss(self, compile: CompileConfig) -> None:
        attention = proven_attention(self.model_args.attn_implementation)
        proof = prove(self.hf_model.config, self.model_class, attention)
        self.loss_is_chunked = proof.full_loss_because is None
        if not self.loss_is_chunked and self.kernels.linear_head is None:
            logger.warning("The loss holds the full logits in memory: %s", proof.full_loss_because)
        backend = compile.backend if compile.enable and "loss" in compile.components else None
        vocabulary = None
        if self.tensor_parallelism is not None:
            plan = self.tensor_parallelism.plan
            vocabulary = vocabulary_shard(self.hf_model, self.decoder, plan, self.mesh["tp"])
        install_loss(
            self.hf_model, self.decoder, chunked=self.loss_is_chunked, compile_backend=backend, vocabulary=vocabulary,
            linear_head=self.kernels.linear_head,
        )  # fmt: skip

    def _fill(self, device: torch.device, seed: int) -> None:
        """Allocate a meta model on `device` and load or initialise its weights; a real model is left alone."""
        if not self._is_meta:
            return
        fill(
            self.hf_model, self.blueprint, self.decoder, self.model_args,
            device=device, buffer_device=self.device, seed=seed,
        )  # fmt: skip

    def _make_ready(self) -> None:
        """What `.parallelize` does, for one device: called by the first step of a model that was not parallelised."""
        if not self._ready:
            if self._is_changed:
                raise ValueError("An error left this model half-way parallelised. Make or load it anew.")
            self._fill_if_meta()
            forwards = own_forwards(self.hf_model)
            self._install_loss(CompileConfig())
            give_plain_copies(self.hf_model, forwards)
            self._ready = self._is_changed = True

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
        if not torch.is_grad_enabled():
            raise ValueError(
                "forward_backward computes gradients, and it was called under torch.no_grad() or inference_mode(). "
                "Call it outside of that, or evaluate() for the loss only."
            )
        self._make_ready()
        self._check(input_ids, labels, position_ids)
        self._check_float8(input_ids)
        if not self.hf_model.training:  # from_pretrained gives a model in evaluation mode
            self.hf_model.train()
        if num_items_in_batch is None:
            num_items_in_batch = self.count_targets(labels)
        # A batch without a single target has loss 0 and no gradient, rather than 0 / 0.
        if not isinstance(num_items_in_batch, torch.Tensor):  # filled in there: a copy would wait for the device
            num_items_in_batch = torch.full((), num_items_in_batch, device=self.device)
        targets = num_items_in_batch.to(self.device).clamp(min=1)
        batch = self._batch(input_ids, labels, position_ids)
        with self.computing(input_ids.shape[1]), self._sharing():
            if self.pipelined is not None:
                loss = self.pipelined.forward_backward(batch, targets)
            else:
                loss = self._sum_loss(**batch) / targets
                loss.backward()
        self._local_losses_are_finite = self._local_losses_are_finite.to(self.device) & loss.detach().isfinite()
        return sum_over(loss.detach(), self._loss_meshes)

    @torch.no_grad()
    def evaluate(
        self, input_ids: torch.Tensor, labels: torch.Tensor, *, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss (fp32) and number of target tokens of one batch over all data ranks, without dropout."""
        self._make_ready()
        self._check(input_ids, labels, position_ids)
        batch = self._batch(input_ids, labels, position_ids)
        with evaluation_mode(self.hf_model), self.computing(input_ids.shape[1]), self._sharing():
            loss = self._sum_loss(**batch) if self.pipelined is None else self.pipelined.sum_loss(batch)
        reshard(self.hf_model)
        return sum_over(loss, self._loss_meshes), self.count_targets(labels)

    def _sharing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.context is None else self.context.sharing()

    @contextlib.contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """The context in which `hf_model` computes in the `param_dtype` of `.parallelize`, forward and backward, and by
        the attention kernel that was found to be the fastest. tokens: of a sequence."""
        in_pipeline = self.pipelined is not None
        with (
            parameters_cast_to(self.hf_model, self._cast_to, backward_in_halves=in_pipeline),
            self.attention.computing(tokens),
        ):
            yield

    def count_targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of target tokens of this batch over all data ranks: labels that are not -100, after the shift."""
        return sum_over(count_targets(labels.to(self.device)), self._data_meshes)

    def _check(self, *batch: torch.Tensor | None) -> None:
        check_shapes(*batch)
        check_same_batch(*batch, mesh=self.mesh, device=self.device)

    def _check_float8(self, input_ids: torch.Tensor) -> None:
        rows, length = input_ids.shape
        shares_sequence = self.tensor_parallelism is not None and self.tensor_parallelism.sequence_parallel
        check_tokens(
            (rows if self.pipelined is None else self.pipelined.microbatch_size) * length, self.float8.linears,
            parts=self.dims.cp * (self.dims.tp if shares_sequence else 1),
        )  # fmt: skip

    def _batch(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        batch = {"input_ids": input_ids.to(self.device), "targets": shift_labels(labels.to(self.device))}
        if position_ids is not None and self.context is None:
            batch["position_ids"] = position_ids.to(self.device)
        elif position_ids is not None:
            batch["position_ids"] = position_ids  # `share` reads documents out of them on the CPU
        return batch if self.context is None else self.context.share(batch)

    def _sum_loss(self, *, targets: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs(**batch)
        # Rows as the model sees them, which may be joined; with shared sequences the part that it yields.
        return self.hf_model(**inputs, targets=targets.reshape(len(inputs["input_ids"]), -1))

    def _inputs(self, input_ids: torch.Tensor, **others: torch.Tensor) -> dict:
        """What the model is called with for tokens (batch, seq). others: what else `_batch` has for these rows."""
        if self.context is not None and not self.context.takes_whole_sequences:
            return self.context.inputs(input_ids, **others)
        return usual_inputs(
            self._isolation, input_ids, others.get("position_ids"), model=self.model_class.__name__,
            attention=self._attention, accepts_position_ids=self.decoder.accepts_position_ids,
            dtype=self._cast_to or self.hf_model.dtype,
        )  # fmt: skip

    def isolate_documents(self) -> Isolation:
        """Say that `position_ids` which restart mark packed documents, and find how attention stays within each.

        From then on every `position_ids` is read so. Returns the way that was found, or the reason why documents of
        one row see each other here; such a model trains all the same, except where ranks share sequences, which
        raises a ValueError.
        """
        if self._isolation is None and self.context is not None:
            self._isolation = isolate_shared(self.hf_model.config, self.model_class, self.context)
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
    def dropout_rank(self) -> int:
        """What seeds of this rank's random numbers in training are to differ by: they are other ones for other data and
        in other stages, whose layers drop different things, and for other parts of a sequence, and the same on
        tensor-parallel ranks."""
        if self.mesh is None:
            return 0
        place = self.mesh.get_local_rank("pp") * self.dims.cp + self.mesh.get_local_rank("cp")
        return place * self.dims.data_parallel_size + self.data_rank

    @property
    def vocabulary_size(self) -> int:
        return self.hf_model.get_submodule(self.decoder.embedding).weight.shape[0]

    @property
    def _data_meshes(self) -> list[DeviceMesh]:
        return [self._meshes[name] for name in ("dp_replicate", "dp_shard") if name in self._meshes]

    @property
    def _loss_meshes(self) -> list[DeviceMesh]:
        """Over which losses add up: different data, parts of sequences, and stages of which only the last has one."""
        return [self._meshes[name] for name in ("dp_replicate", "dp_shard", "cp", "pp") if name in self._meshes]

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their global 2-norm is at most `max_norm`; returns the norm before (fp32)."""
        self._step_was_finite = self._local_losses_are_finite
        self._local_losses_are_finite = torch.ones_like(self._step_was_finite)
        parameters = list(self.hf_model.parameters())
        if self.pipelined is None:
            return clip_grad_norm_(parameters, max_norm)
        return clip_grad_norm_(
            parameters, max_norm,
            pipeline_group=self.pipelined.group, counted_elsewhere=self.pipelined.counted_elsewhere(),
        )  # fmt: skip

    def find_nonfinite(self) -> str:
        """A sentence on the latest step: ranks with a non-finite loss, and parameters with such gradients."""
        return describe_nonfinite(
            {name: p.grad for name, p in self.hf_model.named_parameters() if p.grad is not None},
            loss_is_finite=bool(self._step_was_finite) and bool(self._local_losses_are_finite),
            pipeline=() if self.pipelined is None else dist.get_process_group_ranks(self.pipelined.group),
        )

    # -- looking at and saving it ---------------------------------------------------------------------------------

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """{Transformers parameter name: full gradient on the CPU} of parameters that have one, on every rank."""
        parameters = self.hf_model.named_parameters()
        return self._full({name: parameter.grad for name, parameter in parameters if parameter.grad is not None})

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """{Transformers name: full CPU tensor} of parameters and persistent buffers, on every rank."""
        self._fill_if_meta()
        return self._full(named_tensors(self.hf_model))

    def _full(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{name: full CPU tensor} of those of all stages, in the order of the model; `tensors` are this rank's."""
        live = LiveTensors(self.hf_model, tensors, self._pipeline_group)
        names = live.names if self.pipelined is None else self.pipelined.in_order(live.names)
        return live.read(tuple(names), keep=True)

    @property
    def _pipeline_group(self) -> dist.ProcessGroup | None:
        return None if self.pipelined is None else self.pipelined.group

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
            self.hf_model, self.blueprint, self.decoder, folder,
            tokenizer=tokenizer, generation_config=self.hf_model.generation_config, dtype=dtype,
            max_file_size=max_file_size, pipeline_group=self._pipeline_group,
        )  # fmt: skip
