"""`scripts/generate.py`: text from a checkpoint, an exported folder or a hub id.

The model is read into one device's memory, and the rest is left to Transformers' `generate`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from parallelize.distributed import pick_device
from transformers_backend.decoder import describe_decoder, learned_positions
from transformers_backend.errors import is_meant_for_the_user
from transformers_backend.saved_checkpoint import NoCheckpointError, SavedCheckpoint, command_tokenizer, run_tokenizer
from transformers_backend.weights import check_weight_files

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 what cannot be sampled from (said in one message)."""
    options = _parse(arguments)
    try:
        model, tokenizer = load_generator(
            options.source,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
        prompts = [encode_prompt(tokenizer, prompt, chat=options.chat) for prompt in options.prompt]
        for tokens in prompts:
            _check_prompt(model, tokens, options.max_new_tokens)
        for index, tokens in enumerate(prompts):
            text = continue_tokens(
                model,
                tokenizer,
                tokens,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                whole=not options.chat,
            )
            print(text if index == 0 else f"\n{text}", flush=True)
    except (ValueError, OSError, ImportError) as error:
        if not is_meant_for_the_user(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_generator(
    source: str,
    *,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a checkpoint, a folder that `save_pretrained` wrote or a hub id, on one device, and its tokenizer.

    tokenizer: a folder or hub id in the place of the source's own. dtype: None keeps that of the weights. Raises a
    ValueError for what is neither, and for weights that are damaged or do not make up the model.
    """
    device = pick_device()
    folder = Path(source).expanduser()
    if "://" not in source and not folder.exists():
        if not _HUB_ID.fullmatch(source) or source.count("/") > 1:
            raise ValueError(f"{source}: no such folder. Name a checkpoint, an exported folder or a hub id.")
    elif not (folder / "config.json").is_file():
        try:
            saved = SavedCheckpoint(source)
        except NoCheckpointError as error:
            raise ValueError(
                f"{error} A model's folder would have a config.json, which is not there either."
            ) from error
        return saved.load_model(device, dtype=dtype), run_tokenizer(saved.config, tokenizer)
    else:
        check_weight_files(folder)
        source = str(folder)
    return (
        _load_pretrained(source, dtype, trust_remote_code).to(device).eval(),
        command_tokenizer(tokenizer or source, trust_remote_code=trust_remote_code),
    )


def _load_pretrained(name: str, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except ValueError as error:  # no causal language model, code that is not trusted ...
        raise ValueError(f"{name}: cannot be loaded: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{name}: {len(missing)} of the model's tensors are not in its files ({', '.join(missing[:3])} ...), so it "
            "would answer from random weights. Export or download it again."
        )
    return model


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> list[int]:
    """The tokens of a prompt as training has them at the start of a document, or of a user's turn in a chat."""
    if not chat:
        tokens = tokenizer(prompt, verbose=False)["input_ids"]
        return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens
    if tokenizer.chat_template is None:
        raise ValueError("--chat: the tokenizer has no chat template. Leave --chat out, or name one with --tokenizer.")
    messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise ValueError(f"--chat: the tokenizer's chat template refuses the prompt: {error}.") from error


def _check_prompt(model: PreTrainedModel, tokens: list[int], max_new_tokens: int) -> None:
    if not tokens:
        raise ValueError('--prompt "": no token to begin with; give at least a word.')
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokens) >= rows:
        raise ValueError(
            f"--prompt: its token {max(tokens)} is none of the model's, which has {rows}: the tokenizer is another "
            "model's. Name the right one with --tokenizer."
        )
    try:
        longest = learned_positions(model, describe_decoder(model))
    except ValueError:  # a model that cannot be trained here may well generate
        longest = None
    if longest is not None and len(tokens) + max_new_tokens > longest:
        raise ValueError(
            f"--max_new_tokens {max_new_tokens}: with a prompt of {len(tokens)} tokens it passes the {longest} "
            f"positions that {type(model).__name__} has learned; at most {max(longest - len(tokens), 0)} fit."
        )


@torch.no_grad()
def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    whole: bool = True,
) -> str:
    """Continue `tokens` with Transformers' `generate`, and return the text: whole, or the new part only.

    temperature: 0 takes the likeliest token every time; else tokens are drawn from the whole distribution, or the
    likeliest ones that make up `top_p` of it, with `seed`.
    """
    input_ids = torch.tensor([tokens], device=model.device)  # (1, tokens)
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), None),
        **(greedy if temperature == 0 else draws),
    )[0]
    return tokenizer.decode(output if whole else output[len(tokens) :], skip_special_tokens=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/generate.py", description="Continue prompts with a saved model.")
    add = parser.add_argument
    source = "a step-N folder, or the newest of a run's folder; an exported folder; or a hub id"
    add("source", metavar="CHECKPOINT_OR_FOLDER", help=source)
    add("--prompt", action="append", required=True, help="the text to continue; may be given again")
    add("--max_new_tokens", type=int, default=200, metavar="N", help="default %(default)s")
    add("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token (default %(default)s)")
    top_p = "draw from the likeliest tokens that make up this share (default %(default)s: all)"
    add("--top_p", type=float, default=1.0, metavar="P", help=top_p)
    add("--seed", type=int, default=0, metavar="S", help="default %(default)s")
    add("--chat", action="store_true", help="put the prompt into the tokenizer's chat template, print the answer")
    add("--tokenizer", metavar="NAME", help="folder or hub id (default: the model's own)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the weights")
    add("--trust_remote_code", action="store_true", help="run model code that a repository brings")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {options.max_new_tokens}: must be at least 1")
    if not options.temperature >= 0:
        parser.error(f"--temperature {options.temperature}: must be at least 0")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top_p {options.top_p}: must be above 0 and at most 1")
    options.dtype = getattr(torch, options.dtype) if options.dtype else None
    return options
