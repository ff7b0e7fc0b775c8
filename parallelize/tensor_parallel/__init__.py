"""Tensor parallelism: the matrices, the embedding and the loss of a model split over the ranks of the "tp" mesh."""
