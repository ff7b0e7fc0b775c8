"""`torchrun -m transformers_backend.train [CONFIG.toml] [--section.key value ...]`: one rank of a run.

scripts/train.sh starts it through `launch.py`, or as it is where something else has started the processes.
"""

from __future__ import annotations

import os
import signal
import sys

from transformers_backend.errors import is_refusal, report
from transformers_backend.job_config import load_job_config
from transformers_backend.metrics import setup_logging
from transformers_backend.signals import die_with_parent
from transformers_backend.trainer import Trainer

FAILED = 1
CANNOT_WORK = 2
INTERRUPTED = 128 + signal.SIGINT


def main(arguments: list[str] | None = None) -> int:
    """Run one job; returns the exit status.

    0: done, or stopped by a signal; 1: it failed, in set-up or on the way; 2: it was refused before its first step, so
    that starting it again is no use; 130: Ctrl-C before the first step. An error is reported once (see errors.py); one
    without a report is raised.
    """
    setup_logging(int(os.environ.get("RANK", "0")))  # before the config, whose warnings are for one rank to say
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    trainer = None
    try:
        trainer = Trainer(load_job_config(sys.argv[1:] if arguments is None else arguments))
        trainer.train()
    except KeyboardInterrupt:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # else the launcher says it
            print("SIGINT: stopped before the first step; there is nothing to save", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # whatever it is, it is reported once and ends this rank
        if not report(error):
            raise
        return CANNOT_WORK if trainer is None and is_refusal(error) else FAILED
    finally:
        if trainer is not None:
            trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
