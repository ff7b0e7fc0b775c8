"""Linear cross-entropy with the vocabulary over ranks, against all of it on one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallelize.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from parallelize.tensor_parallel.collectives import enter
from parallelize.tensor_parallel.vocabulary import VocabularyShard
from tests.distributed.workers import WorkerPool


def _errors(vocabulary: int) -> list[float]:
    """Of the loss and of this rank's gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 5), (vocabulary, 5), (vocabulary,)]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    targets = torch.randint(vocabulary, (9,), generator=generator)
    targets[2:4] = -100
    options = {"scale": 0.7, "softcap": 2.0, "z_loss": 0.1}
    expected = linear_cross_entropy_reference(whole[0], whole[1], targets, whole[2], **options)
    grad_hidden, *of_head = torch.autograd.grad(expected, whole)
    shard = VocabularyShard.of(vocabulary, dist.group.WORLD)
    own = slice(shard.first, shard.first + shard.size)
    hidden, weight, bias = [t.detach().clone().requires_grad_() for t in (whole[0], whole[1][own], whole[2][own])]
    loss = linear_cross_entropy(
        enter(hidden, shard.group), weight, targets, bias, first=shard.first, group=shard.group, **options
    )
    ours = torch.autograd.grad(loss, [hidden, weight, bias])
    pairs = [(loss, expected), *zip(ours, [grad_hidden, *(gradient[own] for gradient in of_head)], strict=True)]
    return [(value - wanted).abs().max().item() if value.numel() else 0.0 for value, wanted in pairs]


@pytest.mark.parametrize("vocabulary", [40, 7, 1], ids=["even", "uneven", "a rank without any"])
def test_vocabulary_over_two_ranks(two: WorkerPool, vocabulary: int):
    for errors in two.run(_errors, vocabulary):
        assert max(errors) < 1e-12
