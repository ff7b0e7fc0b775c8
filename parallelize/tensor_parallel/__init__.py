"""Tensor parallelism: weights split over ranks that compute one model together. Start with `plan.py`."""

from parallelize.tensor_parallel.apply import apply_tensor_parallel
from parallelize.tensor_parallel.plan import Region, Segment, Split, TensorPlan

__all__ = ["Region", "Segment", "Split", "TensorPlan", "apply_tensor_parallel"]
