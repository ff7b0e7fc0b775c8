"""Continues prompts with a saved model: python scripts/generate.py CHECKPOINT_OR_FOLDER --prompt "Once upon"

    python scripts/generate.py outputs --prompt "def main():"                       the newest checkpoint of a run
    python scripts/generate.py outputs/checkpoint/step-1000-hf --prompt "Once upon" --temperature 0
    python scripts/generate.py Qwen/Qwen3-0.6B --prompt "What is a mesh?" --chat

The work is in transformers_backend/generate.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs straight from a checkout

from transformers_backend.generate import main

if __name__ == "__main__":
    sys.exit(main())
