"""Tensor parallelism: weights split over ranks that compute one model together.

Read `plan.py` (what a plan says), `collectives.py` (the six communications), `apply.py` (the styles), `sequence.py`
(activations between regions), `vocabulary.py` (embedding and loss), `packing.py` (fused parameters), `randomness.py`
(dropout), `overlap.py` (asynchronous exchanges) in this order.
"""

from parallelize.tensor_parallel.apply import apply_tensor_parallel
from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan

__all__ = ["Region", "Segment", "Split", "TensorPlan", "apply_tensor_parallel"]
