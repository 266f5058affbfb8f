"""D-ST and DBD: their losses against plain computations, and that a backdoor does not get in."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import DataError, SettingError
from bezoar.core.examples import Examples
from bezoar.core.run import Run
from bezoar.core.training import Trained
from bezoar.ops.augment import crop
from bezoar.ops.objective import Batch
from bezoar.ops.recipe import Recipe
from bezoar.trainers._mixmatch import MixMatch, sharpened
from bezoar.trainers._two_stage import Contrast, OnTheHead, learn_features, learn_head, symmetric_cross_entropy
from bezoar.trainers.d_st import DST, between_means, mixed_cross_entropy
from bezoar.trainers.dbd import DBD
from tests.filters.planted import toy
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, net

BRIEF = {"lr": 3e-3, "optimizer": "adam", "batch": 100, "pad": 0}
D_ST = BRIEF | {"epochs": 6, "apart_epochs": 1, "head_epochs": 15, "head_lr": 0.02}
DBD_ = BRIEF | {"epochs": 6, "head_epochs": 4, "head_lr": 0.005, "semi_epochs": 8, "semi_batch": 60}


def build() -> nn.Module:
    return net(0)


# Losses.


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_symmetric_cross_entropy(alpha, beta):
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    expected = []
    for row, label in zip(z.softmax(1).tolist(), y.tolist(), strict=True):
        reverse = -sum(p * (0.0 if k == label else math.log(1e-4)) for k, p in enumerate(row))
        expected.append(-alpha * math.log(row[label]) + beta * reverse)
    assert symmetric_cross_entropy(z, y, alpha, beta).tolist() == pytest.approx(expected)


def test_sure_and_wrong_costs_what_log_zero_counts_as():
    z = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    assert float(symmetric_cross_entropy(z, torch.tensor([1]), 0.0, 1.0)) == pytest.approx(-math.log(1e-4))
    assert float(symmetric_cross_entropy(z, torch.tensor([0]), 0.0, 1.0)) == pytest.approx(0, abs=1e-5)


def test_means_of_the_labels_are_turned_apart():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [4.0, 4.0], [2.0, 2.0]], requires_grad=True)
    y = torch.tensor([0, 0, 1, 2, 2])
    # Cosines 0, 1/sqrt 2 and 1/sqrt 2, each twice among nine.
    found = between_means(features, y)
    assert float(found.detach()) == pytest.approx(4 / math.sqrt(2) / 9)
    (slope,) = torch.autograd.grad(found, features)
    stepped = (features - 0.1 * slope).detach()
    assert float(between_means(stepped, y)) < float(found.detach())
    assert float(between_means(features[:2], y[:2]).detach()) == 0.0


@pytest.mark.parametrize("poison", [[False, True, False], [False] * 3, [True] * 3])
def test_mixed_cross_entropy(poison):
    z, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 3])
    bad = torch.tensor(poison)
    expected = 0.0
    if not all(poison):
        expected += float(F.cross_entropy(z[~bad], y[~bad]))
    if any(poison):
        expected -= 0.25 * float(F.cross_entropy(z[bad], y[bad]))
    assert float(mixed_cross_entropy(z, y, bad, 0.25)) == pytest.approx(expected, abs=1e-6)


# MixMatch.


def test_sharpening_is_the_power_that_sums_to_one():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(sharpened(p, 0.5), p**2 / (p**2).sum())
    torch.testing.assert_close(sharpened(p, 1.0), p)


def batch_of(data: Examples, count: int) -> Batch:
    rows = torch.arange(count)
    return Batch(data.x[rows], data.labels[rows], rows, lambda x: x, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("labelled", [5, 0, 12], ids=["some", "none", "all"])
def test_mixmatch_step(labelled):
    """From the paper: guesses, mixtures whose larger share is the first one's, cross-entropy and square error."""
    data, model = toy(7)[0], net(0).eval()
    counts = torch.arange(900) < labelled
    mixing = MixMatch(lambda model: counts, LABELS, every=False, temperature=0.5, mix=0.75, weight=15.0)
    mixing.epoch(model, 3, 10)
    batch = batch_of(data, 12)
    found = mixing.loss(model, batch)
    with torch.no_grad():
        guess = model(data.x[labelled:12]).softmax(1) ** 2
        guess = guess / guess.sum(1, keepdim=True)
    x = torch.cat([data.x[:labelled], data.x[labelled:12], data.x[labelled:12]])
    target = torch.cat([F.one_hot(data.labels[:labelled], LABELS).float(), guess, guess])
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randperm(len(x), generator=generator)
    share = mixing._share(generator)
    assert 0.5 <= share <= 1
    logits = model(share * x + (1 - share) * x[pairs])
    target = share * target + (1 - share) * target[pairs]
    expected = torch.zeros(())
    if labelled:
        expected = expected + F.cross_entropy(logits[:labelled], target[:labelled])
    if labelled < 12:
        expected = expected + 15.0 * 0.3 * ((logits[labelled:].softmax(1) - target[labelled:]) ** 2).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("every", "times"), [(True, 3), (False, 1)])
def test_examples_are_divided_once_or_before_each_epoch(every, times):
    asked = []

    def divide(model: nn.Module) -> torch.Tensor:
        asked.append(model)
        return torch.ones(900, dtype=torch.bool)

    mixing = MixMatch(divide, LABELS, every=every, temperature=0.5, mix=0.75, weight=15.0)
    for number in range(3):
        mixing.epoch(net(0), number, 3)
    assert len(asked) == times
    again = MixMatch(divide, LABELS, every=False, temperature=0.5, mix=0.75, weight=15.0)
    again.load_state_dict(mixing.state_dict())
    assert torch.equal(again.labelled, mixing.labelled)
    assert again.risen == mixing.risen == pytest.approx(2 / 3)


# Stages.


def test_features_are_learned_without_the_head_and_the_head_without_the_features():
    data, run = toy(7)[0], Run(seed=1)
    model = net(0)
    recipe = Recipe(epochs=1, batch=100, lr=1e-3, optimizer="adam")
    first = {name: value.clone() for name, value in model.state_dict().items()}
    learn_features(model, data, recipe, Contrast(0.5, False), run, None)
    second = {name: value.clone() for name, value in model.state_dict().items()}
    objective = OnTheHead(lambda z, y, _index: F.cross_entropy(z, y))
    learn_head(model, data, recipe, objective, run, None)
    for name, value in model.state_dict().items():
        moved_first = not torch.equal(first[name], second[name])
        moved_second = not torch.equal(second[name], value)
        assert moved_first is not name.startswith("9."), name
        assert moved_second is name.startswith("9."), name
    assert all(p.requires_grad for p in model.parameters())


@functools.cache
def known_to_d_st() -> tuple[Trained, Run]:
    """D-ST where the examples move as they should."""
    data, bad = toy(7)

    class Knowing(DST):
        def _moved(self, model: nn.Module, *_: object) -> torch.Tensor:
            noise = torch.rand(900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            return bad.double() + 0.5 * noise

    run = Run(seed=1)
    return Knowing(**D_ST, clean_share=0.4, poison_share=0.1)(build, data, run), run


def test_d_st_keeps_the_backdoor_out():
    found, run = known_to_d_st()
    held_out = images(300, seed=8)
    assert acc(found.model, *held_out) > 0.9
    assert asr(found.model, *held_out) < 0.2
    _, bad = toy(7)
    assert len(found.suspects) == 90 == run.notes["taken_for_poison"]
    assert bool(bad[found.suspects].all())
    assert run.notes["taken_for_clean"] == 360
    assert found.ranked_by == sorted(found.ranked_by, reverse=True)
    assert any("6 epochs of features are few" in text for text in run.warnings)


def test_d_st_by_itself_is_a_training():
    data, _ = toy(7)
    run = Run(seed=1)
    found = DST(**D_ST | {"epochs": 2, "head_epochs": 2})(build, data, run)
    assert len(found.suspects) == 45
    assert not found.model.training
    assert all(bool(value.isfinite().all()) for value in found.model.state_dict().values())
    assert bool(found.suspicion.score.isfinite().all())


def cropped(x: torch.Tensor, generator: torch.Generator, mirrored: bool = False) -> torch.Tensor:
    """A view for the toy, whose labels are colours: those of photographs take them away."""
    return crop(x, 3, generator)


@functools.cache
def decoupled() -> tuple[Trained, Run]:
    run = Run(seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bezoar.trainers._two_stage.view", cropped)
        return DBD(**DBD_ | {"epochs": 8, "head_epochs": 6, "semi_epochs": 8})(build, toy(7)[0], run), run


def test_dbd_learns_with_half_of_the_labels():
    """A backdoor stays out on real images alone: the features of the toy are its pixels, patch and all."""
    found, run = decoupled()
    assert acc(found.model, *images(300, seed=8)) > 0.85
    assert sum(run.notes["without_label"].values()) == 450
    assert len(found.suspects) == 0
    assert any("8 epochs of features are few" in text for text in run.warnings)


def test_dbd_trusts_the_labels_of_the_lowest_losses():
    data, _ = toy(7)
    model = net(3).eval()
    chosen = DBD(**DBD_, credible=0.3)._credible(model, data, Run())
    with torch.no_grad():
        losses = symmetric_cross_entropy(model(data.x), data.labels, 0.1, 1.0)
    assert int(chosen.sum()) == 270
    assert float(losses[chosen].max()) <= float(losses[~chosen].min())


@pytest.mark.parametrize("kind", [DST, DBD])
def test_too_few_examples(kind):
    share = "credible" if kind is DBD else "poison_share"
    with pytest.raises(DataError, match="are too few to divide"):
        kind(**BRIEF, **{share: 0.05})(build, Examples(*images(12, seed=1), LABELS), Run())


def test_label_without_a_clean_example_is_told():
    data, _ = toy(7)

    class Blind(DST):
        def _moved(self, model: nn.Module, *_: object) -> torch.Tensor:
            return (data.labels == TARGET).double() + 1e-3 * torch.arange(900)

    run = Run(seed=1)
    Blind(**D_ST | {"epochs": 1, "head_epochs": 1})(build, data, run)
    assert any(f"no example of label {TARGET} is taken for clean" in text for text in run.warnings)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        *((DST, "first_epochs", 0), (DST, "apart_epochs", -1), (DST, "first_lr", 0.0), (DST, "degrees", 190.0)),
        *((DST, "shift", 1.1), (DST, "repeats", 0), (DST, "clean_share", 0.0), (DST, "clean_share", 0.96)),
        *((DST, "temperature", 0.0), (DST, "head_epochs", 0), (DST, "head_lr", 0.0), (DST, "unlearning", -1.0)),
        *((DST, "epochs", 0), (DST, "poison_share", 1.0), (DST, "batch", 0)),
        *((DBD, "epochs", 0), (DBD, "temperature", 0.0), (DBD, "credible", 1.0), (DBD, "divided", "always")),
        *((DBD, "semi_batch", 1), (DBD, "mix", 0.0), (DBD, "guess_weight", -1.0), (DBD, "reverse", 0.0)),
    ],
)
def test_bad_settings(kind, setting, value):
    with pytest.raises(SettingError, match=f"{kind.__name__}.{setting} must be"):
        kind(**{setting: value})


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        *((DST(**D_ST | {"epochs": 2, "head_epochs": 2}), phase) for phase in ("apart", "features", "last layer")),
        *((DBD(**DBD_ | {"epochs": 2, "semi_epochs": 2}), phase) for phase in ("features", "last layer", "all of it")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_killed_training_ends_in_the_same_weights(method, phase, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    data = Examples(toy(7)[0].x[:300], toy(7)[0].labels[:300], LABELS)
    killed = Run(seed=1)

    def kill(name: str, done: int, total: int, note: str) -> None:
        if name == phase and done >= total // 2:
            raise KeyboardInterrupt

    killed.progress.report = kill
    with pytest.raises(KeyboardInterrupt):
        method(build, data, killed, tmp_path)
    found, whole = method(build, data, Run(seed=1), tmp_path), method(build, data, Run(seed=1))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


@pytest.mark.parametrize("method", [DST(**D_ST | {"epochs": 1}), DBD(**DBD_ | {"epochs": 1, "semi_epochs": 1})])
def test_nets_without_batch_statistics(method):
    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 32), nn.ReLU(), nn.Linear(32, LABELS))

    found = method(linear, toy(7)[0], Run(seed=1))
    assert all(bool(value.isfinite().all()) for value in found.model.state_dict().values())
