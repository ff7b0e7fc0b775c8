"""A sample from the model in training, as it stands, sharded as it is: the trainer's last look at it."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from parallelize.distributed import from_first_rank
from parallelize.fsdp import reshard
from transformers_backend.model import HFTransformerModel, evaluation_mode


@torch.no_grad()
def sample_text(
    model: HFTransformerModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    new_tokens: int,
    longest: int | None = None,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue `prompt` by up to `new_tokens` tokens; every rank calls it and gets the same text.

    longest: number of positions that the model has, None for any.

    The model runs on a window of one fixed length, padded on the right (which a causal model does not see), so that
    compiled layers meet one shape. It keeps no cache: this is a look at the model, not a server.
    """
    hf_model = model.hf_model
    device = model.device
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    length = len(start) + new_tokens if longest is None else min(len(start) + new_tokens, longest)
    start = start[:length]
    window = torch.zeros(1, length, dtype=torch.int64, device=device)
    window[0, : len(start)] = torch.tensor(start)
    generator = torch.Generator().manual_seed(seed)  # the same on every rank, and on the CPU everywhere
    length = len(start)
    with evaluation_mode(hf_model), model.computing(window.shape[1]):
        while length < window.shape[1]:
            if model.pipelined is not None:
                logits = model.pipelined.next_token_logits(window, length - 1)
            else:
                logits = hf_model(input_ids=window, use_cache=False).logits[0, length - 1].float().cpu()
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).item()
            token = from_first_rank(token)  # ranks that rounded otherwise must not stop at another time
            if token == tokenizer.eos_token_id:
                break
            window[0, length] = token
            length += 1
    reshard(hf_model)
    return tokenizer.decode(window[0, :length].tolist())
