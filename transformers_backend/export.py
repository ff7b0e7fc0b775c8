"""`scripts/export.py`: a checkpoint of a run -> a folder that `AutoModelForCausalLM.from_pretrained` loads.

The model is never held whole: each process reads the tensors of one output file from the checkpoint, converts them to
the published layout and writes the file. Under torchrun the files are dealt to the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path

import torch

from parallelize.distributed import (
    first_rank_first,
    initialize,
    launched_world_size,
    rank_and_world_size,
    same_outcome,
    shutdown,
)
from transformers_backend.errors import is_meant_for_the_user
from transformers_backend.metrics import setup_logging
from transformers_backend.saved_checkpoint import SavedCheckpoint, run_tokenizer
from transformers_backend.weights import DEFAULT_FILE_SIZE, write_export

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TIMEOUT_SECONDS = 4 * 3600  # one rank may write a large file while another waits; a failing one tells the others


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 what cannot be exported (said in one message)."""
    options = _parse(arguments)
    with contextlib.ExitStack() as opened:
        if launched_world_size() > 1:
            initialize(torch.device("cpu"), timeout_seconds=_TIMEOUT_SECONDS)
            opened.callback(shutdown)
        rank, _ = rank_and_world_size()
        setup_logging(rank)
        try:
            output, files = export_checkpoint(
                options.checkpoint,
                options.output,
                dtype=options.dtype,
                max_file_size=options.max_file_size,
                tokenizer=options.tokenizer,
            )
        except (ValueError, OSError, ImportError) as error:
            if not is_meant_for_the_user(error):
                raise
            if rank == 0:  # every rank has the same one
                print(f"error: {error}", file=sys.stderr)
            return 2
    if rank == 0:
        size = sum((output / name).stat().st_size for name in files) / 10**9
        print(f"exported to {output}: {len(files)} weight file{'s' * (len(files) > 1)}, {size:.3g} GB")
    return 0


def export_checkpoint(
    checkpoint: str,
    output: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_file_size: int = DEFAULT_FILE_SIZE,
    tokenizer: str | None = None,
) -> tuple[Path, list[str]]:
    """Export a checkpoint; every rank calls it. Returns the folder and the names of its weight files.

    checkpoint: as `SavedCheckpoint` takes it. output: a local folder; None is `<checkpoint>-hf`. dtype: None keeps
    the checkpoint's own. tokenizer: a folder or hub id, or "none" for no tokenizer; None is the run's.
    """
    if output is not None and "://" in output:
        raise ValueError(f"OUTPUT {output}: must be a local folder; upload it afterwards.")
    with same_outcome(OSError, ValueError, ImportError), first_rank_first():  # it may download config and tokenizer
        saved = SavedCheckpoint(checkpoint)
        loaded_tokenizer = None if tokenizer == "none" else run_tokenizer(saved.config, tokenizer)
    if output is None and not saved.is_local:
        raise ValueError(f"{saved.folder}: the export of a remote checkpoint needs the name of a local folder, OUTPUT.")
    folder = Path(output).expanduser() if output is not None else Path(f"{saved.folder}-hf")
    files = write_export(
        saved,
        saved.blueprint,
        saved.decoder,
        folder,
        tokenizer=loaded_tokenizer,
        generation_config=saved.generation_config,
        dtype=dtype,
        max_file_size=max_file_size,
    )
    return folder, files


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/export.py",
        description="Write the weights of a checkpoint as a folder that from_pretrained loads. Several processes "
        "(torchrun --nproc-per-node N scripts/export.py ...) share the work.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a step-N folder, or the newest of a run's; a path or s3://...")
    add("output", metavar="OUTPUT", nargs="?", help="folder to write (default: CHECKPOINT-hf)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    default_size = f"{DEFAULT_FILE_SIZE // 10**9}GB"
    size_help = "of one safetensors file, such as 500MB (default %(default)s)"
    add("--max_file_size", default=default_size, metavar="SIZE", help=size_help)
    add("--tokenizer", metavar="NAME", help='folder or hub id, or "none" to write none (default: the run\'s)')
    options = parser.parse_args(arguments)
    size = re.fullmatch(r"([1-9]\d*) ?([KMG]B)?", options.max_file_size)
    if size is None:
        parser.error(f"--max_file_size {options.max_file_size}: must be bytes, or a number with KB, MB or GB")
    options.max_file_size = int(size[1]) * _UNITS[size[2] or ""]
    options.dtype = getattr(torch, options.dtype) if options.dtype else None
    return options
