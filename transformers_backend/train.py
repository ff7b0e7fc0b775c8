"""`torchrun -m transformers_backend.train [CONFIG.toml] [--section.key value ...]`: the program behind scripts/train.sh."""

from __future__ import annotations

import sys

from transformers_backend.job_config import load_job_config
from transformers_backend.trainer import Trainer


def main(arguments: list[str] | None = None) -> int:
    """Run one job; returns the exit status: 0 done, 2 a configuration that cannot work (said in one message)."""
    try:
        trainer = Trainer(load_job_config(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        trainer.train()
    finally:
        trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
