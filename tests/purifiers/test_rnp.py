"""RNP: what unlearning forgets, how masks are learned, and which channels of the original are shut."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.run import Progress, Run
from bezoar.ops.unlearning import stop_at
from bezoar.purifiers._masks import Learned, beyond, gates_of
from bezoar.purifiers.rnp import RNP, note_label
from tests.purifiers.nets import NAMES, deeper, few, form, hooks, make, same, toy_clean
from tests.toys import LABELS, TARGET, acc, asr, images, trained


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True))


@functools.cache
def unlearned(backdoored: bool = True, lr: float = 0.001) -> tuple[nn.Module, Run]:
    model, run = copy.deepcopy(trained(backdoored=backdoored)), Run(seed=3)
    RNP(unlearn_lr=lr, unlearn_epochs=9, unlearn_accuracy=0.6).unlearn(model, toy_clean(), run)
    return model.eval(), run


def test_backdoor_outlives_the_clean_task():
    """Verify (b), as far as a net of 48 channels holds the two apart."""
    model, run = unlearned()
    held_out = images(300, seed=8)
    assert acc(model, *held_out) < 0.75
    assert asr(model, *held_out) > acc(model, *held_out)
    assert run.notes["unlearned_accuracy"] <= 0.6
    assert run.warnings == []


def test_learning_rate_falls_and_unlearning_stops_where_it_should():
    run = Run(seed=3)
    RNP(unlearn_lr=0.0, unlearn_epochs=2).unlearn(suspect(), toy_clean(), run)
    assert run.notes["unlearn_epochs"] == 2
    assert "raise unlearn_epochs" in run.warnings[0]
    run = Run(seed=3)
    RNP(unlearn_lr=0.0, unlearn_accuracy=1.0).unlearn(suspect(), toy_clean(), run)
    assert (run.notes["unlearn_epochs"], run.warnings) == (1, [])


@pytest.mark.parametrize(("classes", "accuracy"), [(10, 0.2), (43, 0.1), (5, 0.4), (2, 0.75), (3, 2 / 3)])
def test_twice_chance_counts_as_unlearned(classes, accuracy):
    assert stop_at(classes) == pytest.approx(accuracy)


@given(st.integers(2, 2000))
def test_the_stop_lies_between_chance_and_certainty(classes):
    assert 1 / classes < stop_at(classes) < 1


def test_alpha_is_no_more_than_a_factor_on_the_learning_rate():
    """Verify (a)."""
    model, _ = unlearned()
    slow = RNP(alpha=0.2, lr=0.2, recover_epochs=2).recover(copy.deepcopy(model), toy_clean(), Run(seed=3))
    same = RNP(alpha=1.0, lr=0.04, recover_epochs=2).recover(copy.deepcopy(model), toy_clean(), Run(seed=3))
    for name, mask in slow.masks.items():
        torch.testing.assert_close(mask, same.masks[name], rtol=1e-3, atol=1e-4)
    assert any(bool((mask < 0.99).any()) for mask in slow.masks.values())


def test_recovering_leaves_the_unlearned_weights_and_statistics():
    model = copy.deepcopy(unlearned()[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned = RNP(recover_epochs=2).recover(model, toy_clean(), Run(seed=3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for masks in (learned.masks, learned.means):
        assert all(float(mask.min()) >= 0 and float(mask.max()) <= 1 for mask in masks.values())


def test_masks_bring_the_accuracy_back():
    model, (x, y) = copy.deepcopy(unlearned()[0]), images(180, seed=7)
    learned = RNP().recover(model, toy_clean(), Run(seed=3))
    gates = gates_of(model, toy_clean())
    before = nn.functional.cross_entropy(model.train()(x), y).detach()
    with gates.applied(gain=learned.masks), torch.no_grad():
        after = nn.functional.cross_entropy(model(x), y)
    assert float(after) < 0.6 * float(before)


class Constant(nn.Module):
    """Always gives one label, but for every so many images."""

    def __init__(self, label: int, every: int) -> None:
        super().__init__()
        self.label, self.every = label, every
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(x), LABELS) + self.weight
        out[:, self.label] = 1
        out[:: self.every, 0] = 2
        return out


def test_majority_of_the_predictions_is_the_suspect():
    """Verify (c)."""
    run = Run()
    note_label(Constant(4, every=3), toy_clean(), run)
    assert (run.notes["suspected_label"], run.notes["suspected_share"]) == (4, pytest.approx(2 / 3, abs=1e-4))


def test_no_label_dominates_in_a_benign_model():
    """Verify (d)."""
    model, _ = unlearned(backdoored=False)
    run = Run()
    note_label(model, toy_clean(), run)
    assert run.notes["suspected_share"] < 0.5


def learned(values: list[list[float]], means: list[list[float]] | None = None) -> Learned:
    def tensors(lists: list[list[float]]) -> dict[str, torch.Tensor]:
        return {str(number): torch.tensor(one) for number, one in enumerate(lists)}

    return Learned(tensors(values), tensors(means or values))


def test_ties_go_to_the_channel_that_fell_first():
    ranks, lowest = learned([[0.0, 0.7], [0.0, 0.0, 0.3]], [[0.4, 0.9], [0.1, 0.2, 0.5]]).ranks()
    assert {name: rank.tolist() for name, rank in ranks.items()} == {"0": [2, 4], "1": [0, 1, 3]}
    assert lowest.tolist() == pytest.approx([0, 0, 0, 0.3, 0.7])
    assert {name: gain.tolist() for name, gain in beyond(ranks, 2).items()} == {"0": [1, 1], "1": [0, 0, 1]}


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 24)
)
def test_pruned_channels_are_those_with_the_lowest_masks(values, count):
    """Verify (e)."""
    ranks, _ = learned(values).ranks()
    gains = torch.cat(list(beyond(ranks, count).values()))
    masks = torch.cat([torch.tensor(one) for one in values])
    shut, open_ = masks[gains == 0], masks[gains == 1]
    assert len(shut) == min(count, len(masks))
    assert not len(shut) or not len(open_) or float(shut.max()) <= float(open_.min())


def test_fixed_threshold_shuts_gains_of_the_original_and_keeps_its_shifts():
    model, original, run = suspect(), trained(backdoored=True), Run()
    masks = {"1": torch.linspace(0, 1, 16), "5": torch.linspace(0, 1, 32)}
    RNP(threshold=0.2).prune(model, Learned(masks, masks), toy_clean(), run)
    for name, mask in masks.items():
        norm, old = model[int(name)], original[int(name)]
        assert torch.equal(norm.weight, old.weight * (mask > 0.2))
        assert torch.equal(norm.bias, old.bias)
        assert torch.equal(norm.running_var, old.running_var)
    assert run.notes["pruned"] == int((masks["1"] <= 0.2).sum() + (masks["5"] <= 0.2).sum())
    assert run.notes["pruned"] >= 10
    assert run.notes["channels"] == 48
    assert 0.15 < run.notes["threshold"] <= 0.2


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.5])
def test_chosen_pruning_stays_within_the_tolerance(tolerance):
    model, run, (x, y) = suspect(), Run(), images(180, seed=7)
    masks = {"1": torch.linspace(0.3, 0.9, 16), "5": torch.linspace(0, 0.9, 32)}
    RNP(tolerance=tolerance).prune(model, Learned(masks, masks), toy_clean(), run)
    assert acc(model, x, y) >= (1 - tolerance) * acc(trained(backdoored=True), x, y)
    assert run.notes["pruned"] > 0 or tolerance == 0
    assert run.notes["pruned"] == sum(int((model[at].weight == 0).sum()) for at in (1, 5))


def test_masks_near_one_are_never_pruned():
    run, masks = Run(), {"1": torch.full((16,), 0.96), "5": torch.full((32,), 1.0)}
    model = suspect()
    RNP().prune(model, Learned(masks, masks), toy_clean(), run)
    assert (run.notes["pruned"], run.notes["threshold"]) == (0, None)
    assert "Nothing is pruned" in run.warnings[0]
    assert same(model, trained(backdoored=True))


def test_backdoor_goes_and_its_label_is_named():
    model, run = copy.deepcopy(deeper(8, 5)), Run(seed=3)
    held_out = images(300, seed=8)
    assert asr(model, *held_out) > 0.85
    RNP(unlearn_lr=0.003)(model, toy_clean(), run)
    assert asr(model, *held_out) < 0.3
    assert acc(model, *held_out) > 0.93
    assert run.notes["suspected_label"] == TARGET


@pytest.mark.parametrize("count", [100, 10, 1])
def test_few_images(count):
    model, run, told = suspect(), Run(seed=3), []
    run.progress = Progress(report=lambda *what: told.append(what[1:3]))
    RNP()(model, toy_clean(count), run)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert len(told) >= 80, "an epoch has at least 4 steps"
    assert all(done <= total for done, total in told)
    assert acc(model, *images(300, seed=8)) > (0.99 if count == 1 else 0.9)
    assert bool(run.warnings) == (count < 50)


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    model, run = make(name), Run()
    before = form(model)
    out = RNP(unlearn_epochs=2, recover_epochs=3, unlearn_lr=0.03, lr=1.0, threshold=0.999)(model, few(24), run)
    assert form(out) == before
    assert bool(torch.isfinite(out(few(8).x)).all())
    assert 0 < run.notes["pruned"] <= run.notes["channels"]
    assert hooks(out) == 0


def test_ascent_that_diverges_prunes_nothing():
    model, run = suspect(), Run()
    RNP(unlearn_lr=1e30, clip=0.0, unlearn_accuracy=0.0)(model, toy_clean(), run)
    assert "diverged" in run.warnings[-1]
    assert same(model, trained(backdoored=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("unlearn_lr", -1.0), ("unlearn_epochs", 0), ("unlearn_accuracy", 1.1), ("clip", -1.0), ("alpha", 0.0)),
        *(("recover_epochs", 0), ("lr", -1.0), ("momentum", 1.0), ("batch", 1), ("pad", -1)),
        *(("threshold", 1.1), ("tolerance", -0.1)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"RNP.{name} must be"):
        RNP(**{name: value})
