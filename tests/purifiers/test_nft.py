"""NFT: bounds of the masks, MixUp, the penalty and the schedule, and what comes of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.run import Run
from bezoar.ops.augment import mixup
from bezoar.purifiers import _masks, nft
from bezoar.purifiers.nft import NFT, mixed_loss
from tests.purifiers.nets import NAMES, deeper, few, form, hooks, make, same, toy_clean
from tests.toys import acc, asr, images, trained


def test_bounds_of_the_public_code():
    """Verify (a)."""
    assert [round(bound, 3) for bound in NFT().bounds(8)] == [0.485, 0.294, 0.179, 0.108, 0.066, 0.04, 0.024, 0.015]


def test_masks_of_one_change_not_a_bit():
    """Verify (a)."""
    for name in NAMES:
        model, x = make(name), few(4).x
        gates = NFT(first=True).gates(model, few(4))
        with torch.no_grad():
            plain = model(x)
            with gates.applied():
                assert torch.equal(model(x), plain), name
        gates.fold()
        assert same(model, make(name)), name


@pytest.mark.parametrize("name", ["wrn-10-1", "vit", "plain"])
def test_every_mask_stays_within_its_bounds(name, monkeypatch):
    """Verify (a): after each step, and some masks reach their bound."""
    seen: list[dict[str, torch.Tensor]] = []

    def watched(masks, losses, steps, *, progress, **rest):
        def tell(done, loss):
            seen.append({key: mask.detach().clone() for key, mask in masks.items()})
            progress(done, loss)

        return _masks.learn(masks, losses, steps, progress=tell, **rest)

    monkeypatch.setattr(nft, "learn", watched)
    NFT(steps=8, lr=200.0, lr_floor=200.0)(make(name), few(24), Run())
    bounds = NFT().bounds(len(seen[0]))
    assert len(seen) == 8
    lowest = [min(float(masks[key].min()) for masks in seen) for key in seen[0]]
    assert all(low >= bound * (1 - 1e-6) for low, bound in zip(lowest, bounds, strict=True))
    assert any(math.isclose(low, bound, rel_tol=1e-5) for low, bound in zip(lowest, bounds, strict=True))
    assert all(float(mask.max()) <= 1 for masks in seen for mask in masks.values())


@given(st.floats(0.1, 3), st.integers(0, 1000))
def test_mixed_loss_is_the_weighted_sum_over_both_labels(alpha, seed):
    """Verify (b), with any share: whatever goes to neither label is lost."""
    source = torch.Generator().manual_seed(seed)
    x, y = torch.rand(6, 3, 2, 2, generator=source), torch.randint(4, (6,), generator=source)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    mixed, pairs, share = mixup(x, alpha, torch.Generator().manual_seed(seed))
    logs = model(mixed).log_softmax(1)
    wanted = -sum(share * logs[i, y[i]] + (1 - share) * logs[i, y[pairs[i]]] for i in range(6)) / 6
    loss = mixed_loss(model, x, y, alpha, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_mixing_nothing_is_plain_cross_entropy(monkeypatch):
    """Verify (b)."""
    x, y = few(6).x, few(6).y
    model, source = make("plain"), torch.Generator()
    plain = F.cross_entropy(model(x), y)
    assert torch.equal(mixed_loss(model, x, y, 0.0, source), plain)
    monkeypatch.setattr(nft, "mixup", lambda x, _alpha, _source: (x, torch.arange(6).flip(0), 1.0))
    torch.testing.assert_close(mixed_loss(model, x, y, 1.0, source), plain)


def test_no_learning_rate_changes_the_statistics_alone():
    """Verify (c)."""
    model = NFT(steps=5, lr=0.0, lr_floor=0.0)(copy.deepcopy(trained(backdoored=True)), toy_clean(), Run())
    before = trained(backdoored=True).state_dict()
    changed = {
        name.split(".")[-1] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_only_gains_change():
    model = NFT(steps=10)(copy.deepcopy(trained(backdoored=True)), toy_clean(), Run())
    before = trained(backdoored=True).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if "running" not in name and "tracked" not in name} == {"5.weight"}
    ratio = model[5].weight / trained(backdoored=True)[5].weight
    assert 0.485 < float(ratio.detach().min()) < 1
    assert float(ratio.detach().max()) <= 1 + 1e-6


def test_the_stem_has_a_mask_where_asked_for():
    model = make("wrn-10-1")
    assert len(NFT(first=True).gates(model, few(2)).sites) == len(NFT().gates(model, few(2)).sites) + 1
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 6)).eval()
    assert len(NFT().gates(one, few(2)).sites) == 1, "else nothing would be left"


def test_learning_rate_falls_in_five_stairs_of_a_cosine():
    rates = [NFT().lr_at(step) for step in range(1000)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=0.02)
    for stair in range(5):
        assert rates[200 * stair : 200 * stair + 200] == pytest.approx([optimizer.param_groups[0]["lr"]] * 200)
        optimizer.step()
        schedule.step()


def penalised(count: int, penalty: float, monkeypatch) -> float:
    losses: list[float] = []

    def first(masks, loss_of, *_steps, **_rest):
        with torch.no_grad():
            for mask in masks.values():
                mask.fill_(0.75)
        losses.append(float(loss_of().detach()))

    monkeypatch.setattr(nft, "learn", first)
    NFT(penalty=penalty, mixup=0.0)(copy.deepcopy(trained(backdoored=True)), toy_clean(count), Run())
    return losses[0]


@pytest.mark.parametrize(("count", "per_class"), [(180, 30), (60, 10), (6, 1), (3, 1)])
def test_penalty_is_the_distance_over_the_images_per_class(count, per_class, monkeypatch):
    """32 channels at 0.75: a summed distance of 8."""
    difference = penalised(count, 1.0, monkeypatch) - penalised(count, 0.0, monkeypatch)
    assert difference == pytest.approx(8 / per_class, rel=1e-3)


def test_backdoor_of_a_net_with_few_channels_weakens():
    """Five layers leave bounds of 0.485 to 0.108: the paper's nets have 16 layers and more."""
    model, held_out = copy.deepcopy(deeper(8, 5)), images(300, seed=8)
    before = asr(model, *held_out)
    NFT(steps=400)(model, toy_clean(), Run(seed=3))
    assert asr(model, *held_out) < 0.7 * before
    assert acc(model, *held_out) > 0.95


@pytest.mark.parametrize("count", [100, 10, 1])
def test_few_images(count):
    model, run = copy.deepcopy(trained(backdoored=True)), Run()
    NFT(steps=60)(model, toy_clean(count), run)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert acc(model, *images(300, seed=8)) > 0.9
    assert run.notes["channels"] == 32


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    model = make(name)
    before = form(model)
    out = NFT(steps=3, batch=16)(model, few(24), Run())
    assert form(out) == before
    assert bool(torch.isfinite(out(few(8).x)).all())
    assert not same(out, make(name))
    assert hooks(out) == 0
    assert all(parameter.requires_grad for parameter in out.parameters())


def test_loss_that_is_not_finite_ends_the_training():
    clean, run = few(24), Run()
    clean.x.fill_(float("nan"))
    model = NFT(steps=3)(make("plain"), clean, run)
    assert same(model, make("plain"))
    assert "no longer finite" in run.warnings[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("lr_floor", -1.0),
        ("mixup", -1.0),
        ("penalty", -1.0),
        ("bound", 1.1),
        ("decay", -1.0),
        ("batch", 1),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"NFT.{name} must be"):
        NFT(**{name: value})
