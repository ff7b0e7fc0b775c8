"""How documents that share a row stay apart, and whether they do: tried on the twin before it is trusted.

A packed row tells its documents by `position_ids` that restart at 0. For most models these are enough: Transformers
makes its attention masks from them (`masking_utils.find_packed_sequence_indices`). A few models make masks without
looking at positions and take one from outside; flash kernels take no mask, and in a batch of several rows they
ignore positions without a word, but they take the bounds of documents in one joined row. Others cannot (recurrences,
masks of their own). Which is which is not a list here: `find_isolation` compares a packed batch with each document
alone, logits and every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_backend.attention import stand_in_for_flash
from transformers_backend.decoder import describe_decoder
from transformers_backend.loss import IGNORE_INDEX, shift_labels, sum_cross_entropy
from transformers_backend.proof import GRADIENT_TOLERANCE, MODEL_ERRORS, gradients, relative_errors
from transformers_backend.twin import VOCABULARY_SIZE, build_twin

LOGIT_TOLERANCE = 1e-5  # fp32; relative to the largest logit
# Lengths of the documents in each row: one of a single token, one longer than the twin's attention windows.
_ROWS = ((7, 1, 16), (11, 13))

Way = Literal["positions", "mask", "joined rows", "shared attention"]


@dataclass(frozen=True)
class Isolation:
    way: Way | None
    """What keeps documents apart: their positions, a mask of ours, bounds in one joined row, or, where ranks share
    sequences, the attention over them. None: nothing does."""
    reason: str | None = None
    """Why nothing does, with the first difference that was found."""


def takes_joined_rows(attn_implementation: str | None) -> bool:
    """Whether it is one of the flash kernels, by whatever name ("flash_attention_2", a kernel of the hub ...)."""
    return attn_implementation is not None and "flash" in attn_implementation.lower()


def usual_way(attn_implementation: str | None) -> Way:
    """What serves most models: positions, which flash kernels heed in a single row only."""
    return "joined rows" if takes_joined_rows(attn_implementation) else "positions"


def packed_inputs(
    way: Way | None,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    accepts_position_ids: bool,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor | int]:
    """Inputs of the model for packed tokens and their positions, both (batch, seq).

    accepts_position_ids: of the model. dtype: that the model computes in, for a mask.
    """
    if way == "joined rows":
        return join_rows(input_ids, position_ids)
    inputs = {"input_ids": input_ids}
    if accepts_position_ids:
        inputs["position_ids"] = position_ids
    if way == "mask":
        inputs["attention_mask"] = document_mask(position_ids, dtype)
    return inputs


def usual_inputs(
    isolation: Isolation | None,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    *,
    model: str,
    attention: str | None,
    accepts_position_ids: bool,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor | int]:
    """What a model is called with for whole sequences and, where there are some, their positions, both (batch, seq).

    isolation: None where positions are not said to be those of packed documents. model: its name. attention: what it
    attends with. The others as for `packed_inputs`.
    """
    if position_ids is None:
        return {"input_ids": input_ids}
    if isolation is None and not accepts_position_ids:
        raise ValueError(
            f"position_ids: {model} has no notion of them (it derives positions from the order of the tokens). Leave "
            "them out, or call isolate_documents() first for packed documents."
        )
    way = usual_way(attention) if isolation is None else isolation.way
    return packed_inputs(way, input_ids, position_ids, accepts_position_ids=accepts_position_ids, dtype=dtype)


def document_begins(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents begin, bool (batch, seq): with each row, and where positions do not go on by one."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins


def document_mask(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores, (batch, 1, seq, seq): 0 for earlier tokens of the same document."""
    documents = document_begins(position_ids).cumsum(dim=1)  # (batch, seq)
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    # bfloat16's lowest number, which float32 has too: FSDP2 casts inputs, and a cast must not make it infinite.
    hidden = torch.finfo(torch.bfloat16).min
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, hidden)[:, None]


def join_rows(input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """The inputs of a packed batch (batch, seq) as one row (1, batch x seq), with the bounds of its documents.

    Bounds are int32 (documents + 1,). Their greatest distance is given as `seq`, which is never less: the true one
    would wait for the device, and compile anew for every value.
    """
    batch, seq = input_ids.shape
    begins = document_begins(position_ids).flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(begins, (0, 1), value=batch * seq).to(torch.int32)
    return {
        "input_ids": input_ids.reshape(1, -1),
        "position_ids": position_ids.reshape(1, -1),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": seq,
        "max_length_k": seq,
    }


def find_isolation(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str | None
) -> Isolation:
    """The way in which the twin computes packed documents as it computes each alone, or why there is none.

    attn_implementation: of the real model. Flash kernels need a GPU: a stand-in that gets the same arguments takes
    their part. Others that need one (flex_attention) get the masks that "sdpa" gets, which runs in their place.
    """
    on_twin, ways = attn_implementation, (usual_way(attn_implementation), "mask")
    if takes_joined_rows(attn_implementation):
        on_twin, ways = stand_in_for_flash(), ways[:1]
    elif attn_implementation not in ("sdpa", "eager"):
        on_twin = None
    reasons = []
    for way in ways:
        reason = _why_documents_leak(hf_config, model_class, on_twin, way)
        if reason is None:
            return Isolation(way)
        reasons.append(reason)
    return Isolation(None, f"{model_class.__name__} {reasons[0]}")  # with the mask it is no better


@torch.enable_grad()
def _why_documents_leak(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], attn_implementation: str | None, way: Way
) -> str | None:
    try:
        twin = build_twin(hf_config, model_class, attn_implementation=attn_implementation)
        accepts_position_ids = describe_decoder(twin).accepts_position_ids
        if way == "positions" and not accepts_position_ids:
            return "takes no position_ids"
        input_ids, position_ids = packed_example()
        bounds = document_bounds()
        alone = [
            twin(input_ids=input_ids[row : row + 1, start:end], use_cache=False).logits[0] for row, start, end in bounds
        ]
        expected = torch.cat(alone)  # (rows x seq, vocabulary)
        _sum_loss(expected, input_ids, bounds).backward()
        expected_gradients = gradients(twin)
        twin.zero_grad()
        inputs = packed_inputs(
            way, input_ids, position_ids, accepts_position_ids=accepts_position_ids, dtype=twin.dtype
        )
        packed = twin(**inputs, use_cache=False).logits.flatten(0, 1)
        _sum_loss(packed, input_ids, bounds).backward()
    except MODEL_ERRORS as error:
        return f"does not run on packed documents ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    return _difference(alone, packed) or _gradient_difference(expected_gradients, gradients(twin))


def packed_example() -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and positions that restart with every document, both (rows, seq)."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, VOCABULARY_SIZE - 3, (len(_ROWS), sum(_ROWS[0])), generator=generator)
    return input_ids, torch.stack([torch.cat([torch.arange(length) for length in row]) for row in _ROWS])


def document_bounds() -> list[tuple[int, int, int]]:
    """(row, start, end) of every document of `packed_example`, in order."""
    return [
        (row, sum(lengths[:place]), sum(lengths[: place + 1]))
        for row, lengths in enumerate(_ROWS)
        for place in range(len(lengths))
    ]


def _sum_loss(logits: torch.Tensor, input_ids: torch.Tensor, bounds: list[tuple[int, int, int]]) -> torch.Tensor:
    """Summed loss of logits (rows x seq, vocabulary); no document predicts the first token of the next."""
    labels = input_ids.clone()
    for row, start, _ in bounds:
        labels[row, start] = IGNORE_INDEX
    return sum_cross_entropy(logits, shift_labels(labels))


def _difference(alone: list[torch.Tensor], packed: torch.Tensor) -> str | None:
    scale = max(logits.detach().abs().max() for logits in alone)
    for expected, logits in zip(alone, packed.split([len(logits) for logits in alone]), strict=True):
        error = ((logits - expected).detach().abs().max() / scale).item()
        if not error <= LOGIT_TOLERANCE:
            return f"mixes documents: logits of one change by {error:.1e} (relative) with what stands beside it"
    return None


def _gradient_difference(expected: dict[str, torch.Tensor], packed: dict[str, torch.Tensor]) -> str | None:
    errors = relative_errors(expected, packed)
    worst = max(errors, key=errors.get)
    if errors[worst] <= GRADIENT_TOLERANCE:
        return None
    return f"mixes documents: the gradient of {worst} changes by {errors[worst]:.1e} (relative) with the packing"
