"""How far features move: the transformation against plain turns and shifts, and the mean square of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.run import Run
from bezoar.evaluation.filters import Scores
from bezoar.filters.feature_consistency import FeatureConsistency
from bezoar.ops.consistency import consistency, turned_and_shifted
from tests.filters.planted import toy
from tests.toys import images, trained


class Drawing(torch.Generator):
    """Stands for a generator; :func:`fixed` says what is drawn."""


def fixed(monkeypatch: pytest.MonkeyPatch, turn: float, down: float, right: float) -> None:
    """Draws in [-1, 1] of the share of the largest turn and shifts."""
    draws = torch.tensor([turn, down, right])

    def rand(rows: int, count: int, generator: torch.Generator) -> torch.Tensor:
        del generator
        assert rows == 3
        return ((draws + 1) / 2)[:, None].expand(3, count).clone()

    monkeypatch.setattr("bezoar.ops.consistency.torch.rand", rand)


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
def test_quarter_turns_are_those_of_the_grid(monkeypatch, quarters):
    x = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6) / 216
    fixed(monkeypatch, quarters / 2, 0.0, 0.0)
    found = turned_and_shifted(x, 180.0, 0.0, torch.Generator())
    assert any(torch.allclose(found, torch.rot90(x, sign * quarters, (2, 3))) for sign in (1, -1))
    if abs(quarters) == 1:
        assert not torch.allclose(found, torch.rot90(x, 2, (2, 3)))


def test_half_turn_of_an_oblong_image(monkeypatch):
    x = torch.rand(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    fixed(monkeypatch, 1.0, 0.0, 0.0)
    torch.testing.assert_close(turned_and_shifted(x, 180.0, 0.0, torch.Generator()), x.flip((2, 3)))


def test_shift_comes_with_zeros(monkeypatch):
    x = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    fixed(monkeypatch, 0.0, 1.0, -0.5)
    found = turned_and_shifted(x, 180.0, 0.2, torch.Generator())
    expected = torch.zeros_like(x)
    expected[:, :, 2:, :9] = x[:, :, :8, 1:]
    torch.testing.assert_close(found, expected)


def test_each_image_is_turned_by_itself():
    x = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    found = turned_and_shifted(x, 180.0, 0.2, torch.Generator().manual_seed(0))
    assert len({one.sum().item() for one in found}) == 6
    torch.testing.assert_close(turned_and_shifted(x, 0.0, 0.0, torch.Generator()), x)


class Pixels(nn.Module):
    """Its features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def test_it_is_the_mean_square_over_features_and_draws():
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    run = Run(seed=4)
    found = consistency(Pixels(), Examples(x, torch.zeros(5).long(), 3), run, degrees=90.0, shift=0.3, repeats=2)
    generator = run.generator("consistency")
    squares = [((turned_and_shifted(x, 90.0, 0.3, generator) - x) ** 2).flatten(1).mean(1) for _ in range(2)]
    torch.testing.assert_close(found, (sum(squares) / 2).double())


def test_draws_depend_on_the_seed_alone():
    data = Examples(*images(40, seed=1), 6)
    first = consistency(trained(True), data, Run(seed=4), degrees=180.0, shift=0.2)
    torch.manual_seed(99)
    assert torch.equal(first, consistency(trained(True), data, Run(seed=4), degrees=180.0, shift=0.2))
    assert not torch.equal(first, consistency(trained(True), data, Run(seed=5), degrees=180.0, shift=0.2))
    assert not bool(consistency(trained(True), data, Run(), degrees=0.0, shift=0.0).any())


def test_filter_ranks_by_how_far_the_features_move():
    data, bad = toy(7)
    found = FeatureConsistency(rate=0.1, repeats=2)(trained(True), data, Run(seed=1))
    assert int(found.suspect.sum()) == 90
    assert float(found.score[found.suspect].min()) >= float(found.score[~found.suspect].max())
    assert found.flagged is None
    mean = found.score[data.labels == 3].mean()
    assert found.statistic[3] == pytest.approx(float(mean))
    assert 0 <= Scores.of(found.score.numpy(), bad.numpy()).auroc <= 1


@pytest.mark.parametrize(
    ("setting", "value"), [("rate", 0.0), ("rate", 1.0), ("degrees", 181.0), ("shift", -0.1), ("repeats", 0)]
)
def test_bad_settings(setting, value):
    with pytest.raises(SettingError, match=f"FeatureConsistency.{setting} must be"):
        FeatureConsistency(**{setting: value})
