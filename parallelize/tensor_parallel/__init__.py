"""Tensor parallelism: weights split over ranks that compute one model together.

Read in this order: `plan.py` (what a plan says), `collectives.py` (the six communications), `styles.py` (what modules
do), `sequence.py` (activations between regions), `vocabulary.py` (embedding and loss), `packing.py` (fused
parameters), `apply.py` (all of it put together).
"""

from parallelize.tensor_parallel.apply import apply_tensor_parallel
from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan
from parallelize.tensor_parallel.sequence import Stack

__all__ = ["Region", "Segment", "Split", "Stack", "TensorPlan", "apply_tensor_parallel"]
