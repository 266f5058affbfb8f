"""Plain training and strong augmentation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bezoar.core.errors import BudgetSpent, SettingError
from bezoar.core.examples import Examples
from bezoar.core.run import Run
from bezoar.ops.augment import cutmix, mixup
from bezoar.ops.fit import Recipe, fit
from bezoar.ops.objective import Batch
from bezoar.trainers.plain import Plain
from bezoar.trainers.strong_augmentation import Mixing, StrongAugmentation
from tests.toys import LABELS, acc, images, net


def examples(count: int = 300) -> Examples:
    return Examples(*images(count, seed=3), LABELS)


def test_plain_is_the_training_loop():
    data = examples()
    found = Plain(epochs=2, batch=50, lr=0.05, pad=1)(lambda: net(0), data, Run(seed=4))
    expected = net(0)
    fit(expected, data.x, data.labels, Recipe(epochs=2, batch=50, lr=0.05, pad=1, weight_decay=5e-4), seed=4)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert len(found.suspects) == 0
    assert found.losses is None


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "both"])
def test_mixed_training_learns_and_goes_on_after_a_kill(mix, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    method = StrongAugmentation(mix=mix, epochs=8, batch=50, lr=0.05, pad=0)
    killed = Run(seed=4)

    def kill(name: str, done: int, total: int, note: str) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    killed.progress.report = kill
    with pytest.raises(KeyboardInterrupt):
        method(lambda: net(0), examples(), killed, tmp_path)
    found = method(lambda: net(0), examples(), Run(seed=4), tmp_path).model
    whole = method(lambda: net(0), examples(), Run(seed=4)).model
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in found.state_dict().items())
    assert acc(found, *images(300, seed=8)) > 0.8


def test_without_mixing_it_is_plain_cross_entropy():
    data, model = examples(), net(0).eval()
    batch = Batch(data.x[:8], data.labels[:8], torch.arange(8), lambda x: x, torch.Generator().manual_seed(0))
    found = Mixing("cutmix", 1.0, 0.0).loss(model, batch)
    torch.testing.assert_close(found, F.cross_entropy(model(data.x[:8]), data.labels[:8]))


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_loss_is_weighted_by_the_shares(mix):
    data, model = examples(), net(0).eval()
    batch = Batch(data.x[:8], data.labels[:8], torch.arange(8), lambda x: x, torch.Generator().manual_seed(5))
    found = Mixing(mix, 1.0, 1.0).loss(model, batch)
    same = torch.Generator().manual_seed(5)
    torch.rand(2, generator=same)
    mixed, pairs, share = (cutmix if mix == "cutmix" else mixup)(data.x[:8], 1.0, same)
    targets = share * F.one_hot(data.labels[:8], LABELS) + (1 - share) * F.one_hot(data.labels[pairs], LABELS)
    torch.testing.assert_close(found, F.cross_entropy(model(mixed), targets.float()))


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_one_box_and_counts_it(seed):
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 9, 7).clone()
    mixed, pairs, share = cutmix(x, 1.0, torch.Generator().manual_seed(seed))
    pasted = mixed != x
    for row, other in enumerate(pairs.tolist()):
        assert set(mixed[row].unique().tolist()) <= {float(row), float(other)}
        if other != row:
            inside = pasted[row, 0].nonzero()
            assert len(inside) == round((1 - share) * 63)
            if len(inside):
                height, width = (inside.max(0).values - inside.min(0).values + 1).tolist()
                assert height * width == len(inside)
    again = cutmix(x, 1.0, torch.Generator().manual_seed(seed))
    assert torch.equal(again[0], mixed)
    assert x[1].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        *((Plain, "epochs", 0), (Plain, "schedule", "linear"), (Plain, "batch", 0), (Plain, "weight_decay", -1.0)),
        *((StrongAugmentation, "mix", "cutout"), (StrongAugmentation, "alpha", 0.0)),
        *((StrongAugmentation, "probability", 1.5), (StrongAugmentation, "epochs", 0)),
    ],
)
def test_bad_settings(method, setting, value):
    with pytest.raises(SettingError, match=f"{setting} must be"):
        method(**{setting: value})


def test_budget_ends_a_training():
    run = Run(budget=1e-9)
    with pytest.raises(BudgetSpent):
        Plain(epochs=1)(lambda: net(0), examples(), run)
