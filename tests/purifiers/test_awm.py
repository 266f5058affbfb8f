"""AWM: masks between 0 and 1, their gradient, the bound of the change, and what becomes of the backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.purifiers.awm import AWM, _cropped, _Masking
from tests.purifiers.nets import CLASSES, NAMES, examples, make
from tests.toys import LABELS, SIZE, acc, asr, images, trained


def clean(count: int, seed: int = 7) -> Clean:
    x, y = images(count, seed=seed)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True)).requires_grad_(True)


def masking(count: int = 60, one_shot: bool = False, **settings) -> _Masking:
    return _Masking(AWM(**settings), suspect().eval(), clean(count), Run(), one_shot)


def test_backdoor_goes():
    run, held_out = Run(), images(240, seed=8)
    model = AWM()(suspect(), clean(180), run)
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.9
    assert run.notes["masked_weights"] == sum(m.weight.numel() for m in model if isinstance(m, nn.Conv2d))


def test_only_hidden_weights_change_and_none_grows_or_turns():
    model, old = AWM(epochs=2)(suspect(), clean(180), Run()), trained(backdoored=True).state_dict()
    for name, value in model.state_dict().items():
        if name in ("0.weight", "4.weight"):
            assert not torch.equal(value, old[name])
            mask = value / old[name]
            assert float(mask.min()) >= 0
            assert float(mask.max()) <= 1
        else:
            assert torch.equal(value, old[name]), name


def test_change_stays_within_the_bound():
    for bound in (0.001, 0.02, 0.3255):
        change = masking(bound=bound).worst_change()
        assert float(change.abs().mean()) <= bound * (1 + 1e-5)
    values = 3 * 32 * 32
    assert masking().bound * values == pytest.approx(1000)
    assert masking(one_shot=True).bound * values == pytest.approx(100)


def test_change_lowers_the_accuracy():
    found = masking(180)
    x, y = images(120, seed=8)
    assert acc(found.model, (x + found.worst_change()).clamp(0, 1), y) < acc(found.model, x, y) - 0.2


def test_perfectly_fitted_batch_keeps_the_masks_at_one():
    """Without the changed images and the sum of masks there is nothing to learn once the loss is 0."""
    model = suspect()
    with torch.no_grad():
        model[-1].weight.mul_(1000)
        model[-1].bias.mul_(1000)
    x, _ = images(60, seed=7)
    y = model.eval()(x).argmax(1)
    run = Run()
    AWM(epochs=2, alpha=1.0, sparsity=0.0)(model, Clean(x=x, y=y, held_x=x, held_y=y, num_classes=LABELS), run)
    old = trained(backdoored=True).state_dict()
    torch.testing.assert_close(model[0].weight, old["0.weight"], rtol=0, atol=0)
    assert (run.notes["below_half"], run.notes["switched_off"]) == (0, 0)


def test_sparsity_alone_switches_weights_off():
    run = Run()
    AWM(epochs=4, inner_epochs=2, lr=0.1, batch=6, sparsity=1e3)(suspect(), clean(60), run)
    assert run.notes["switched_off"] > 0.9 * run.notes["masked_weights"]


def test_gradient_of_the_masks_is_that_of_autograd():
    found = masking(60, lr=1e-3, sparsity=0.0, alpha=0.7)
    x, y = images(30, seed=9)
    change = torch.full((1, 3, SIZE, SIZE), 0.05)
    model = copy.deepcopy(found.model)
    masks = [
        torch.ones_like(found.original[0], requires_grad=True),
        torch.ones_like(found.original[1], requires_grad=True),
    ]
    weights = {"0.weight": masks[0] * found.original[0], "4.weight": masks[1] * found.original[1]}
    loss = sum(
        share * nn.functional.cross_entropy(torch.func.functional_call(model, weights, (given,)), y)
        for share, given in ((0.7, x), (0.3, (x + change).clamp(0, 1)))
    )
    wanted = torch.autograd.grad(loss, masks)
    told = found._step(torch.optim.Adam(found.masks, lr=1e-3), x, y, change)
    assert told == pytest.approx(float(loss.detach()), rel=1e-5)
    for mask, slope in zip(found.masks, wanted, strict=True):
        torch.testing.assert_close(mask.grad, slope, rtol=1e-3, atol=1e-6)


def test_settings_of_one_shot():
    few, many = masking(6, one_shot=True), masking(60)
    assert (few.batch, few.alpha, len(few.x), few.steps) == (32, 0.99, 60, 15)
    assert (many.batch, many.alpha, len(many.x), many.steps) == (128, 0.9, 60, 15), "three batches"
    assert torch.equal(few.y[:6], few.y[54:])
    own = masking(6, one_shot=True, batch=3, alpha=0.5, copies=0, bound=0.1)
    assert (own.batch, own.alpha, len(own.x), own.bound) == (3, 0.5, 6, 0.1)


def test_crops_keep_range_and_shape_and_differ():
    x, _ = images(12, seed=3)
    found = _cropped(x, False, torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    assert float(found.min()) >= float(x.min()) - 1e-6
    assert float(found.max()) <= float(x.max()) + 1e-6
    assert float((found - x).abs().flatten(1).mean(1).min()) > 1e-3
    flat = torch.full((4, 3, 8, 8), 0.25)
    torch.testing.assert_close(_cropped(flat, True, torch.Generator()), flat)


@pytest.mark.parametrize("count", [1, 6, 50])
def test_small_sets(count):
    model = AWM(epochs=2)(suspect(), clean(count), Run())
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_every_net(name):
    x, y = examples(12)
    data = Clean(x=x, y=y, held_x=x, held_y=y, num_classes=CLASSES)
    run, before = Run(), make(name).state_dict()
    model = AWM(epochs=1, inner_epochs=2, batch=6)(make(name), data, run)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(before[k].ndim >= 2 for k in moved), "weights, never shifts or statistics"
    assert run.notes["masked_weights"] == sum(before[k].numel() for k in before if masked(k, before))


def masked(name: str, state: dict[str, torch.Tensor]) -> bool:
    matrices = [k for k, v in state.items() if v.ndim >= 2 and k != "place"]
    return name in matrices and name != matrices[-1]


def test_net_without_a_hidden_layer_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, LABELS))
    with pytest.raises(UnsupportedModel, match="no hidden layer"):
        AWM()(model, clean(6), Run())


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("inner_epochs", 0), ("batch", 0), ("lr", -1.0), ("alpha", 1.5), ("bound", 0.0), ("copies", -1)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"AWM.{name} must be"):
        AWM(**{name: value})
