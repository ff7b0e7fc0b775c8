"""`torchrun -m transformers_backend.train [CONFIG.toml] [--section.key value ...]`: what scripts/train.sh runs."""

from __future__ import annotations

import logging
import os
import sys

from transformers_backend.errors import is_meant_for_the_user
from transformers_backend.job_config import load_job_config
from transformers_backend.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    """Run one job; returns the exit status: 0 done, 2 a job that cannot work as configured (said in one message)."""
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:  # every rank reads the same config, and one of them says what it ignores
        logging.getLogger("transformers_backend.job_config").setLevel(logging.ERROR)
    try:
        trainer = Trainer(load_job_config(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError, ImportError) as error:
        if not is_meant_for_the_user(error):
            raise
        # Nearly always every rank found the same; a line of each shows the one that did not.
        print(f"error: {error}" if is_first else f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    try:
        trainer.train()
    finally:
        trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
