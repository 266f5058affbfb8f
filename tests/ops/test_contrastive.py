"""Contrastive losses against a plain computation, the views, and the embedding of any network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.ops.contrastive import Embedding, contrastive_loss, head_input, one_label, part_of, view
from tests.purifiers.nets import NAMES, SIDE, make
from tests.toys import LABELS, SIZE, images, net


def unit(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def plain_loss(first: torch.Tensor, second: torch.Tensor, temperature: float, pairs: list[list[bool]]) -> float:
    """View by view, as in the papers."""
    z, count = [*first.tolist(), *second.tolist()], len(first)

    def likeness(i: int, j: int) -> float:
        return math.exp(sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature)

    total = 0.0
    for i in range(2 * count):
        others = [j for j in range(2 * count) if j != i]
        whole = sum(likeness(i, j) for j in others)
        own = [j for j in others if pairs[i % count][j % count] or i % count == j % count]
        total -= sum(math.log(likeness(i, j) / whole) for j in own) / len(own)
    return total / (2 * count)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_of_simclr(temperature):
    first, second = unit(5, 3, 0), unit(5, 3, 1)
    expected = plain_loss(first, second, temperature, [[False] * 5 for _ in range(5)])
    assert float(contrastive_loss(first, second, temperature)) == pytest.approx(expected)


def test_loss_of_simclr_of_two_pairs_by_hand():
    """Both views alike, the pairs at right angles: each has e^2 of e^2 + 2 where the temperature is 1/2."""
    z = torch.eye(2, dtype=torch.float64)
    assert float(contrastive_loss(z, z, 0.5)) == pytest.approx(-math.log(math.e**2 / (math.e**2 + 2)))


def test_supervised_loss_with_labels_that_are_trusted():
    first, second = unit(6, 3, 2), unit(6, 3, 3)
    y, trusted = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([True, True, True, False, True, False])
    together = one_label(y, trusted)
    assert together.tolist() == [[bool(trusted[i] and trusted[j] and y[i] == y[j]) for j in range(6)] for i in range(6)]
    expected = plain_loss(first, second, 0.1, together.tolist())
    assert float(contrastive_loss(first, second, 0.1, together)) == pytest.approx(expected)
    none = one_label(y, torch.zeros(6, dtype=torch.bool))
    torch.testing.assert_close(contrastive_loss(first, second, 0.1, none), contrastive_loss(first, second, 0.1))


@given(st.permutations(range(6)))
def test_order_of_the_images_does_not_matter(order):
    first, second, y = unit(6, 4, 4), unit(6, 4, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    together, rows = one_label(y, torch.ones(6, dtype=torch.bool)), torch.tensor(order)
    found = contrastive_loss(first[rows], second[rows], 0.2, together[rows][:, rows])
    torch.testing.assert_close(found, contrastive_loss(first, second, 0.2, together))


def test_large_likeness_does_not_overflow():
    z = unit(4, 3, 6).float()
    assert bool(contrastive_loss(z, z, 1e-3).isfinite())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_views_are_images_drawn_for_each_alone(channels):
    x = torch.rand(1, channels, SIZE, SIZE + 3, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1)
    found = view(x, torch.Generator().manual_seed(1), mirrored=True)
    assert found.shape == x.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert len({one.sum().item() for one in found}) == 8
    assert torch.equal(found, view(x, torch.Generator().manual_seed(1), mirrored=True))
    assert torch.equal(x[0], x[1]), "not in place"


def test_some_views_have_no_colours():
    x = images(300, seed=1)[0]
    found = view(x, torch.Generator().manual_seed(0))
    grey = ((found - found[:, :1]).abs().flatten(1).amax(1) < 1e-6).float().mean()
    assert 0.1 < float(grey) < 0.3


def test_smaller_parts_differ_more_from_the_whole():
    x = images(40, seed=1)[0]
    apart = [float((part_of(x, torch.Generator().manual_seed(3), least) - x).abs().mean()) for least in (1.0, 0.05)]
    assert apart[0] < 0.7 * apart[1]


def test_part_is_a_box_of_the_image():
    """On a ramp the values of a part are a ramp between two places inside."""
    x = torch.linspace(0, 1, 24).expand(6, 1, 24, 24)
    found = part_of(x, torch.Generator().manual_seed(3), 0.2)
    steps = found[:, 0, 0].diff(dim=1)
    inner = steps[:, 2:-2]
    torch.testing.assert_close(inner, inner.mean(1, keepdim=True).expand_as(inner), rtol=1e-3, atol=1e-5)
    assert bool((inner > 0).all())
    torch.testing.assert_close(found[:, 0], found[:, 0, :1].expand(-1, 24, -1))


@pytest.mark.parametrize("name", NAMES)
def test_embedding_of_any_network(name):
    model = make(name).train()
    x = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    made = Embedding(model, x[:1])
    assert model.training
    found = made(x)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    found.sum().backward()
    head = {id(p) for p in made.head.parameters()}
    missing = [n for n, p in model.named_parameters() if p.grad is None and id(p) not in head]
    assert missing == []
    assert all(p.grad is None for p in made.head.parameters())
    assert len({*made.state_dict()}) == len([*model.state_dict()]) + 4, "the head is not kept twice"


def test_what_goes_into_the_head_gives_the_logits():
    model = net(0).eval()
    x = images(5, seed=1)[0]
    torch.testing.assert_close(model[-1](head_input(model, model[-1], x)), model(x))
    with pytest.raises(UnsupportedModel):
        head_input(model, nn.Linear(3, LABELS), x)
