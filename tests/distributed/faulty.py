"""Runs transformers_backend.train with a fault in one rank: `launch ... faulty.py FAULT STEP CONFIG.toml`.

The last rank commits FAULT after step STEP, once: a restarted run finds the mark that it leaves in the dump folder.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from transformers_backend import Trainer, train


def _hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent's, or it would wait half a minute and kill
    time.sleep(600)


FAULTS = {"is killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": _hang}


class FaultyTrainer(Trainer):
    fault, at_step = sys.argv[1], int(sys.argv[2])

    def train_step(self):
        result = super().train_step()
        mark = Path(self.dump_folder) / "fault"
        if self.step == self.at_step and self.rank == self.world_size - 1 and not mark.exists():
            mark.write_text(str(os.getpid()))
            FAULTS[self.fault]()
        return result


if __name__ == "__main__":
    train.Trainer = FaultyTrainer
    sys.exit(train.main(sys.argv[3:]))
