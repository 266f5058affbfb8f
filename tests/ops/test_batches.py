"""Batches by steps and by passes: what is drawn, and that a seed decides it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.ops.batches import drawn, passes
from bezoar.ops.recipe import Recipe


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(count)
    return (y / max(count, 1)).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone(), y


@given(st.integers(1, 40), st.integers(1, 20))
def test_a_pass_meets_every_example_once(count, batch):
    x, y = numbered(count)
    parts = list(passes(x, y, batch, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat([labels for _, labels in parts]).tolist()) == list(range(count))
    assert all(torch.equal(images, x[labels]) for images, labels in parts)
    assert max(len(labels) for _, labels in parts) <= batch


def test_single_last_example_is_left_out_where_batchnorm_trains():
    x, y = numbered(9)
    sizes = [len(labels) for _, labels in passes(x, y, 4, torch.Generator(), least=2)]
    assert sizes == [4, 4]
    assert [len(labels) for _, labels in passes(x[:1], y[:1], 4, torch.Generator(), least=2)] == [1]


def test_draws_have_full_batches_from_few_examples_and_depend_on_the_seed():
    x, y = numbered(3)
    draws = [list(drawn(x, y, 16, 5, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert [len(labels) for _, labels in draws[0]] == [16] * 5
    assert all(torch.equal(x[labels], images) for images, labels in draws[0])
    labels = [torch.stack([labels for _, labels in one]) for one in draws]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_recipe_augments():
    x, y = numbered(8)
    images, labels = next(drawn(x, y, 64, 1, torch.Generator().manual_seed(0), recipe=Recipe(pad=2)))
    assert images.shape == (64, 1, 4, 4)
    assert not torch.equal(images, x[labels])
