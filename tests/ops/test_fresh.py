"""The same architecture with new first weights, or a clear refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.ops.fresh import fresh
from tests.purifiers.nets import NAMES, SIDE, make
from tests.toys import trained


class Normalised(nn.Module):
    """A buffer that is no statistic of what was learned."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.full((3, 1, 1), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x - self.mean)


def test_nothing_is_left_of_what_was_learned():
    model = Normalised(trained(backdoored=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = fresh(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert made.training
    after = made.state_dict()
    assert torch.equal(after.pop("mean"), before["mean"])
    norms = [name for name, value in after.items() if "running_mean" in name]
    assert norms
    assert all(not bool(after[name].any()) for name in norms)
    for name, value in made.named_parameters():
        assert bool(value.isfinite().all())
        assert value.requires_grad
        if value.ndim > 1:
            assert not torch.equal(value, before[name]), name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        again = fresh(model)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_any_network_or_a_clear_refusal(name):
    if name != "vit":
        assert fresh(make(name))(torch.rand(2, 3, SIDE, SIDE)).shape == (2, 6)
        return
    with pytest.raises(UnsupportedModel, match="place of SmallViT cannot be drawn anew") as refusal:
        fresh(make(name))
    assert "spectral-signatures" in refusal.value.hint


def test_attention_draws_its_weights():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    made = fresh(nn.Sequential(layer, nn.Linear(8, 2)))
    assert all(bool(p.isfinite().all()) for p in made.parameters())


def test_weights_that_are_computed_from_others_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(UnsupportedModel, match="cannot be drawn anew"):
        fresh(model)
