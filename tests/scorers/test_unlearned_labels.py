"""The label that outlives unlearning: what is counted, and that the model itself stays."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.run import Progress, Run
from bezoar.ops.unlearning import epoch_of, predicted_counts, steps_of_epoch
from bezoar.purifiers.rnp import RNP
from bezoar.scorers.unlearned_labels import UnlearnedLabels, excess
from tests.purifiers.nets import CLASSES, NAMES, deeper, few, make, toy_clean
from tests.toys import LABELS, TARGET, trained


@functools.cache
def state(name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in make(name).state_dict().items()}


def test_excess_is_the_logarithm_of_more_often_than_before():
    ratios = excess(torch.tensor([9, 0, 0]), torch.tensor([3, 3, 3]))
    assert ratios.tolist() == pytest.approx([math.log(10 / 4), math.log(1 / 4), math.log(1 / 4)])
    assert excess(torch.tensor([500]), torch.tensor([50]))[0] == pytest.approx(math.log(10), abs=0.02)


def test_planted_label_outlives_the_clean_task():
    run = Run(seed=3)
    found = UnlearnedLabels(lr=0.003)(deeper(8, 5), toy_clean(), run)
    assert found.leader == TARGET
    assert found.model == found.labels[TARGET] > 0
    assert run.notes["suspected_label"] == TARGET
    assert run.notes["unlearned_accuracy"] <= 1 / 3


def test_nothing_unlearned_nothing_exceeds():
    run = Run()
    found = UnlearnedLabels(lr=0.0, epochs=1)(trained(True).eval(), toy_clean(), run)
    assert found.suspect is False
    assert all(abs(value) < 0.35 for value in found.labels.values()), "but for what BatchNorm statistics moved"
    assert "raise epochs" in run.warnings[0]


def test_sees_the_unlearned_model_that_rnp_sees():
    ours, theirs = Run(seed=3), Run(seed=3)
    UnlearnedLabels(lr=0.003)(deeper(8, 5), toy_clean(), ours)
    RNP(unlearn_lr=0.003, recover_epochs=1)(copy.deepcopy(deeper(8, 5)), toy_clean(), theirs)
    assert ours.notes["suspected_share"] > 0.3
    for name in ("suspected_label", "suspected_share", "unlearned_accuracy", "unlearn_epochs"):
        assert ours.notes[name] == theirs.notes[name]


def test_defaults_are_those_of_rnp():
    ours, theirs = UnlearnedLabels().config(), RNP().config()
    theirs |= {name: theirs[f"unlearn_{name}"] for name in ("lr", "epochs", "accuracy")}
    del ours["majority"]
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize(("count", "batch", "steps"), [(500, 128, 4), (180, 128, 4), (1, 128, 4), (1000, 100, 10)])
def test_steps_of_an_epoch(count, batch, steps):
    assert steps_of_epoch(count, batch) == steps
    x, y = torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.long)
    recipe, device = RNP(pad=0).augmentation(), torch.device("cpu")
    assert len(list(epoch_of(x, y, batch, recipe, torch.Generator(), device))) == steps


def test_counts_are_of_all_images():
    model, clean = trained(True), toy_clean()
    counts = predicted_counts(model, clean.x, LABELS, batch=7)
    assert counts.sum() == len(clean.x)
    with torch.no_grad():
        assert counts.tolist() == torch.bincount(model(clean.x).argmax(1), minlength=LABELS).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_architectures_and_the_model_stays(name):
    model, told = make(name), []
    run = Run(progress=Progress(report=lambda *what: told.append(what[1:3])))
    found = UnlearnedLabels(epochs=2, lr=0.05)(model, few(24), run)
    assert found.labels.keys() == set(range(CLASSES))
    assert all(torch.equal(value, state(name)[key]) for key, value in model.state_dict().items())
    assert told
    assert all(done <= total for done, total in told)


@pytest.mark.parametrize("count", [100, 10, 1])
def test_few_images(count):
    found = UnlearnedLabels(epochs=2)(trained(True), toy_clean(count), Run())
    assert all(math.isfinite(value) for value in found.labels.values())


def test_ascent_that_diverges_says_nothing():
    run = Run()
    found = UnlearnedLabels(lr=1e30, clip=0.0, accuracy=0.0)(trained(True), toy_clean(), run)
    assert "diverged" in run.warnings[-1]
    assert set(found.labels.values()) == {0.0}
    assert found.suspect is False


def test_two_labels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 2))
    clean = toy_clean()
    clean = type(clean)(x=clean.x, y=clean.y % 2, held_x=clean.x, held_y=clean.y % 2, num_classes=2)
    assert len(UnlearnedLabels(epochs=2)(model, clean, Run()).labels) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", -1.0), ("epochs", 0), ("accuracy", 1.1), ("clip", -1.0), ("momentum", 1.0), ("batch", 1)),
        *(("pad", -1), ("majority", 0.0)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"UnlearnedLabels.{name} must be"):
        UnlearnedLabels(**{name: value})
