"""The parity report: each model's twin, parallelised on local gloo processes, against plain Transformers.

`scripts/verify.sh MODEL_TYPE_OR_ID ... [--all-dense] [--fsdp 2] [--tp 2] [--pp 2] [--cp 2] [--compile] [--kernels]`:
`command.py` reads that and prints, `setting.py` is what was asked for, `compare.py` runs the processes and compares,
`report.py` is a model's line in the terminal and in docs/MODELS.md, `share.py` measures how much of a model tensor
parallelism splits, `pipeline.py` knows what a pipeline needs and what its ranks hold, `context.py` which sequences and
packed documents are tried where ranks share them. For every model, in the same worker processes one after another:

1. plain Transformers computes the loss and every gradient of one global batch, on one device, in fp32;
2. the wrapper, parallelised, computes them from each data rank's rows, in two accumulated micro-batches (with
   a pipeline: batches of several), and both clip them; another batch is evaluated, and
   where ranks share sequences, packed documents are compared with each of them alone;
3. the twin is saved with Transformers' `save_pretrained`, loaded into sharded parameters, its first loss compared,
   exported again, and the export compared bit by bit through `AutoModelForCausalLM.from_pretrained`.

A model passes, fails, or is refused with a reason. The exit status is 1 if any fails, and 2 for a name that can be no
model.
"""

from transformers_backend.verify.command import main
from transformers_backend.verify.compare import DENSE_MODEL_TYPES, PRETRAINED_LOSS_TOLERANCE, verify
from transformers_backend.verify.report import Report

__all__ = ["DENSE_MODEL_TYPES", "PRETRAINED_LOSS_TOLERANCE", "Report", "main", "verify"]
