"""`python -m transformers_backend.verify`, which scripts/verify.sh starts."""

import sys

from transformers_backend.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
