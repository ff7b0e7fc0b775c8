"""Exports a checkpoint for from_pretrained: python scripts/export.py CHECKPOINT [OUTPUT] [--dtype bfloat16]

    python scripts/export.py outputs/checkpoint/step-1000              to outputs/checkpoint/step-1000-hf
    python scripts/export.py outputs my_model --dtype bfloat16         the newest checkpoint of a run
    torchrun --nproc-per-node 4 scripts/export.py outputs my_model     four processes share the files

It needs no GPU and the memory of one output file a process. The work is in transformers_backend/export.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

from transformers_backend.export import main

if __name__ == "__main__":
    sys.exit(main())
