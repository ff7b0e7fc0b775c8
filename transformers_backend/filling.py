"""How a model on the meta device gets its memory and its weights: loaded from a folder or hub id, or drawn."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel

from parallelize.distributed import first_rank_first
from transformers_backend.decoder import Decoder
from transformers_backend.model_args import HFTransformerModelArgs
from transformers_backend.weights import allocate, init_buffers, init_weights, load_hf_weights, resolve_folder


def fill(
    hf_model: PreTrainedModel,
    blueprint: PreTrainedModel,
    decoder: Decoder,
    model_args: HFTransformerModelArgs,
    *,
    device: torch.device,
    buffer_device: torch.device,
    seed: int,
) -> None:
    """Allocate a meta model, sharded as it is, on `device`, and load or initialise its weights; every rank calls it.

    blueprint: the whole model on the meta device. buffer_device: where it computes. seed: of weights that are drawn.
    """
    allocate(hf_model, device, buffer_device=buffer_device)
    if model_args.init == "pretrained":
        with first_rank_first():
            folder = resolve_folder(model_args.model, model_args.revision)  # downloads a hub id
        if (folder / "generation_config.json").is_file():
            hf_model.generation_config = GenerationConfig.from_pretrained(folder)
        init_buffers(hf_model, blueprint, device=device)
        load_hf_weights(hf_model, blueprint, model_args.model, revision=model_args.revision)
    else:
        init_weights(hf_model, blueprint, decoder, device=device, seed=seed)
