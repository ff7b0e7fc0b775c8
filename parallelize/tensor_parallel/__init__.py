"""Tensor parallelism: every rank of the "tp" mesh computes with its part of the heads, features and vocabulary."""
