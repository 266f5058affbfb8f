"""Scores of the guards against computations with NumPy, and thresholds against what they promise."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.core.errors import DataError, SettingError, UnsupportedModel
from bezoar.core.guarding import FittedGuard, fewest, seer, threshold
from bezoar.core.method import Clean
from bezoar.core.registry import methods
from bezoar.core.run import Run
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger
from bezoar.guards.activation_filter import ActivationFilter
from bezoar.guards.mahalanobis import Mahalanobis
from bezoar.guards.scale_up import ScaleUp
from bezoar.guards.strip import STRIP
from bezoar.ops.head import find_head
from tests.purifiers.nets import NAMES, SIDE, examples, make
from tests.toys import LABELS, SIZE, TARGET, images, trained, trigger

every_guard = pytest.mark.parametrize("guard", methods("guards").values(), ids=methods("guards").keys())


def linear(seed: int = 0) -> nn.Module:
    """A linear net for 3 labels and 2 x 2 grey images."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(3 * torch.randn(3, 4, generator=generator))
        layer.bias.copy_(torch.randn(3, generator=generator))
    return nn.Sequential(nn.Flatten(), layer)


def grey(count: int, seed: int = 1) -> Clean:
    """Random grey images of 2 x 2 pixels, a third of them held out."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(count, 1, 2, 2, generator=generator), torch.arange(count) % 3
    cut = 2 * count // 3
    return Clean(x=x[:cut], y=y[:cut], held_x=x[cut:], held_y=y[cut:], num_classes=3)


def toy(count: int = 240) -> Clean:
    x, y = images(count, seed=7)
    return Clean(
        x=x[: count // 2], y=y[: count // 2], held_x=x[count // 2 :], held_y=y[count // 2 :], num_classes=LABELS
    )


def answers(model: nn.Module, x: np.ndarray) -> np.ndarray:
    weight, bias = (p.detach().double().numpy() for p in model.parameters())
    return x.reshape(len(x), -1) @ weight.T + bias


@pytest.mark.parametrize("superimpose", ["add", "blend"])
def test_strip_is_minus_the_mean_entropy_in_bits(superimpose):
    model, clean = linear(), grey(60)
    fitted = STRIP(images=7, superimpose=superimpose, weight=0.3)(model, clean, Run(seed=2))
    overlay = fitted.state["overlay"].double().numpy()
    assert len(overlay) == 7
    assert all(any(np.array_equal(o, x) for x in clean.x.double().numpy()) for o in overlay)
    expected = []
    for image in clean.held_x.double().numpy():
        mixed = np.clip(image + overlay, 0, 1) if superimpose == "add" else 0.7 * image + 0.3 * overlay
        raised = np.exp(answers(model, mixed))
        p = raised / raised.sum(1, keepdims=True)
        expected.append((p * np.log2(p)).sum(1).mean())
    np.testing.assert_allclose(fitted.score(clean.held_x), expected, atol=1e-5)


def test_strip_of_certain_and_of_undecided_answers():
    class Fixed(nn.Module):
        def __init__(self, row):
            super().__init__()
            self.row = nn.Parameter(torch.tensor(row))

        def forward(self, x):
            return self.row.expand(len(x), -1)

    clean = grey(30)
    certain = STRIP(images=5)(Fixed([0.0, 1000.0, 0.0, 0.0]), clean, Run())
    undecided = STRIP(images=5)(Fixed([1.0, 1.0, 1.0, 1.0]), clean, Run())
    assert certain.score(clean.held_x).tolist() == [0.0] * 10
    np.testing.assert_allclose(undecided.score(clean.held_x), -2.0, atol=1e-6)  # 2 bits


def test_strip_says_that_it_has_too_few_images():
    run = Run()
    fitted = STRIP()(linear(), grey(30), run)
    assert len(fitted.state["overlay"]) == 20
    assert "20 are there" in run.warnings[0]


def consistency(model: nn.Module, x: np.ndarray, factors: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    label = answers(model, x).argmax(1)
    agree = [answers(model, np.clip(factor * x, 0, 1)).argmax(1) == label for factor in factors]
    return label, np.mean(agree, axis=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_scale_up_is_the_share_of_factors_that_keep_the_label(normalise):
    model, clean, factors = linear(3), grey(90), (1.5, 2.0, 3.0, 5.0)
    fitted = ScaleUp(factors=factors, normalise=normalise, floor=0.01)(model, clean, Run())
    label, share = consistency(model, clean.held_x.double().numpy(), factors)
    assert len(set(share.tolist())) > 2
    if normalise:
        known = consistency(model, clean.x.double().numpy(), factors)[1]
        groups = [known[clean.y.numpy() == k] for k in range(3)]
        mean, deviation = np.array([g.mean() for g in groups]), np.array([max(g.std(), 0.01) for g in groups])
        share = (share - mean[label]) / deviation[label]
    np.testing.assert_allclose(fitted.score(clean.held_x), share, atol=1e-5)


def test_scale_up_divides_by_the_floor_and_lends_statistics_to_unseen_labels():
    clean = grey(90)
    clean = Clean(clean.x, clean.y.clamp(max=1), clean.held_x, clean.held_y, 4)
    run = Run()
    fitted = ScaleUp(floor=10.0)(nn.Sequential(*linear(), nn.Linear(3, 4)), clean, run)
    step = torch.diff(fitted.state["table"], dim=1)
    torch.testing.assert_close(step, torch.full_like(step, 0.2 / 10))
    assert "[2, 3]" in run.warnings[0]


class ByBrightness(nn.Module):
    """Labels 0 to 3 from dark to bright, except where the last pixel is white: label 0, however bright the rest."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.tensor([0.1, 0.3, 0.5, 0.7]))

    def forward(self, x):
        out = -100 * (x.mean((1, 2, 3))[:, None] - self.places).square()
        out[:, 0] = out[:, 0] + 100 * (x[:, 0, -1, -1] > 0.99)
        return out


def test_scale_up_flags_a_trigger_that_outlasts_amplification():
    generator = torch.Generator().manual_seed(0)
    x = 0.9 * torch.rand(200, 1, 4, 4, generator=generator) * torch.linspace(0.3, 1, 200)[:, None, None, None]
    model = ByBrightness()
    y = model(x).argmax(1)
    clean = Clean(x[::2], y[::2], x[1::2], y[1::2], 4)
    bad = x[y > 0].clone()
    bad[:, :, -1, -1] = 1.0
    for made in (ScaleUp(normalise=False), ScaleUp()):
        fitted = made(model, clean, Run())
        limit = fitted.threshold(0.1).value
        assert (fitted.score(bad) > limit).all()
        assert (fitted.score(x) > limit).float().mean() <= 0.1


def test_activation_filter_is_the_mean_of_the_neurons_that_the_trigger_raises_most():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3))
    clean = grey(90)
    planted = MaskedTrigger(torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]), torch.ones(1, 2, 2))
    fitted = ActivationFilter(share=0.05)(model, clean, Run(), {1: planted})
    weight, bias = model[1].weight.detach().double().numpy(), model[1].bias.detach().double().numpy()

    def features(x: torch.Tensor) -> np.ndarray:
        return np.maximum(x.double().numpy().reshape(len(x), -1) @ weight.T + bias, 0)

    others = clean.x[clean.y != 1]
    order = np.argsort(-(features(planted(others)).mean(0) - features(others).mean(0)))[:3]  # 5 % of 50, rounded up
    assert set(fitted.state["neurons"][0].tolist()) == set(order.tolist())
    known, profile = features(clean.x)[:, order].mean(1), features(clean.held_x)[:, order].mean(1)
    np.testing.assert_allclose(fitted.score(clean.held_x), (profile - known.mean()) / known.std(), atol=1e-4)


def test_activation_filter_takes_the_worst_of_several_triggers():
    model, clean = trained(backdoored=True), toy()
    faint = AdditiveTrigger(0.1 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    each = [ActivationFilter()(model, clean, Run(), {k: t}) for k, t in ((TARGET, trigger()), (0, faint))]
    both = ActivationFilter()(model, clean, Run(), {TARGET: trigger(), 0: faint})
    expected = torch.maximum(*(one.score(clean.held_x) for one in each))
    torch.testing.assert_close(both.score(clean.held_x), expected)


@pytest.mark.parametrize(("width", "count"), [(1, 1), (99, 1), (100, 1), (101, 2), (512, 6), (2048, 21)])
def test_activation_filter_watches_one_percent(width, count):
    assert ActivationFilter().count(width) == count


def hidden(width: int = 7) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    with torch.no_grad():  # so that it answers all labels
        model[3].bias -= model(grey(60).x).mean(0)
    return model


@pytest.mark.parametrize("count", [90, 9], ids=["more images than features", "fewer"])
def test_mahalanobis_is_the_distance_to_the_mean_of_the_answered_label(count):
    model, clean = hidden(), grey(count)
    fitted = Mahalanobis(shrinkage=0.2)(model, clean, Run())
    weight, bias = (p.detach().double().numpy() for p in model[1].parameters())

    def seen(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        features = np.maximum(x.double().numpy().reshape(len(x), -1) @ weight.T + bias, 0)
        return features, model(x).argmax(1).numpy()

    features, label = seen(clean.x)
    mean = np.stack([features[label == k].mean(0) if (label == k).any() else features.mean(0) for k in range(3)])
    off = features - mean[label]
    covariance = off.T @ off / len(off)
    covariance += 0.2 * np.trace(covariance) / 7 * np.eye(7)
    features, label = seen(clean.held_x)
    off = features - mean[label]
    expected = np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off) / 7
    np.testing.assert_allclose(fitted.score(clean.held_x), expected, rtol=1e-4)


def test_mahalanobis_of_labels_that_no_clean_image_gets_and_of_one_image_each():
    model, clean, run = hidden(), grey(60), Run()
    with torch.no_grad():
        model[3].bias[2] = -100.0
    fitted = Mahalanobis()(model, clean, run)
    assert "[2]" in run.warnings[0]
    torch.testing.assert_close(fitted.state["mean"][2], model[:3](clean.x).mean(0))
    _, first = np.unique(model(clean.x).argmax(1).numpy(), return_index=True)
    single = Clean(clean.x[first], clean.y[first], clean.held_x, clean.held_y, 3)
    held = Mahalanobis()(model, single, Run()).held
    assert torch.isfinite(held).all()
    assert held.unique().numel() > 1


def test_mahalanobis_refuses_features_that_are_not_finite():
    model = hidden()
    with torch.no_grad():
        model[1].bias[0] = math.nan
    with pytest.raises(UnsupportedModel, match="not finite"):
        Mahalanobis()(model, grey(60), Run())


@pytest.mark.parametrize(
    ("made", "caught"), [(ActivationFilter(), 0.95), (STRIP(superimpose="blend"), 0.8), (Mahalanobis(), 0.95)], ids=str
)
def test_toy_backdoor_is_flagged(made, caught):
    model, (x, y) = trained(backdoored=True), images(300, seed=8)
    fitted = made(model, toy(), Run(seed=1), {TARGET: trigger()} if made.needs_triggers else None)
    limit = fitted.threshold(0.05)
    assert limit.count == 120
    assert (fitted.score(trigger()(x[y != TARGET])) > limit.value).float().mean() > caught
    assert (fitted.score(x) > limit.value).float().mean() < 0.1


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (STRIP, {"images": 0}),
        (STRIP, {"superimpose": "mix"}),
        (STRIP, {"weight": 0.0}),
        (STRIP, {"weight": 1.0}),
        (ScaleUp, {"factors": ()}),
        (ScaleUp, {"factors": (3.0, 1.0)}),
        (ScaleUp, {"floor": 0.0}),
        (ActivationFilter, {"share": 0.0}),
        (ActivationFilter, {"share": 1.1}),
        (Mahalanobis, {"shrinkage": 0.0}),
    ],
)
def test_bad_setting_is_refused(kind, settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        kind(**settings)


# Any architecture, any batch.


def on_nets(guard: type, name: str) -> tuple[FittedGuard, torch.Tensor]:
    model, (x, y) = make(name), examples(60)
    planted = {1: MaskedTrigger(torch.ones(1, SIDE, SIDE) * 0.2, torch.ones(3, SIDE, SIDE))}
    made = guard(images=6) if guard is STRIP else guard()
    clean = Clean(x[:30], y[:30], x[30:], y[30:], 6)
    return made(model, clean, Run(), planted if made.needs_triggers else None), x


@every_guard
@pytest.mark.parametrize("name", NAMES)
def test_works_on_any_architecture_and_one_image_at_a_time(guard, name):
    fitted, x = on_nets(guard, name)
    whole = fitted.score(x[:8])
    assert whole.shape == (8,)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(torch.cat([fitted.score(row[None]) for row in x[:8]]), whole, atol=1e-4, rtol=1e-4)


@every_guard
def test_bytes_score_as_pixels_in_0_to_1(guard):
    fitted, x = on_nets(guard, "normed")
    levels = (255 * x[:5]).round().to(torch.uint8)
    torch.testing.assert_close(fitted.score(levels), fitted.score(levels.float() / 255))
    clean = Clean((255 * x[:30]).to(torch.uint8), examples(60)[1][:30], x[30:], x[30:, 0, 0, 0].long(), 6)
    triggers = {1: AdditiveTrigger(torch.full((3, SIDE, SIDE), 0.2))}
    assert torch.isfinite(guard()(make("normed"), clean, Run(), triggers).held).all()


@every_guard
def test_other_shapes_and_no_images(guard):
    fitted, x = on_nets(guard, "plain")
    assert fitted.score(x[:0]).shape == (0,)
    with pytest.raises(DataError, match="expected images of shape"):
        fitted.score(x[:, :, :8])


@every_guard
def test_needs_held_out_images(guard):
    x, y = examples(12)
    with pytest.raises(SettingError, match="threshold"):
        guard()(make("plain"), Clean(x, y, x[:0], y[:0], 6), Run(), {1: AdditiveTrigger(0 * x[0])})


def test_model_that_gives_nan_is_refused():
    model = linear()
    with torch.no_grad():
        model[1].bias[0] = math.nan
    with pytest.raises(UnsupportedModel, match="not finite"):
        STRIP()(model, grey(60), Run())


def test_hook_hears_its_own_thread_alone():
    model, x = make("plain"), examples(2)[0]
    body, head = nn.Sequential(*list(model)[:-1]), find_head(model, x[:1])
    see, other = seer(model, head), 0.5 * x
    wanted = see(x)[1]

    class Slow(nn.Module):
        def forward(self, x):
            out = body(x)
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: model(other))
                thread.start()
                thread.join()
            return head(out)

    seen = seer(Slow(), head)(x)[1]
    assert torch.equal(seen, wanted)
    assert not head._forward_pre_hooks


# Thresholds.

scores = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(-1e3, 1e3, width=32), min_size=1)


@given(scores, st.floats(0.001, 0.999))
def test_threshold_keeps_the_fpr_or_refuses_it(values, fpr):
    held = torch.tensor(values)
    if len(values) < fewest(fpr):
        with pytest.raises(SettingError, match="held-out clean images"):
            threshold(held, fpr)
        return
    found = threshold(held, fpr)
    assert found.count == len(values)
    assert found.flagged == int((held > found.value).sum())
    assert found.flagged / found.count <= fpr
    # Rounding decides nothing: no clean score lies at the threshold.
    assert not bool((held == found.value).any())


@pytest.mark.parametrize("count", [19, 20, 37, 100])
@pytest.mark.parametrize("fpr", [0.05, 0.1, 0.3])
def test_threshold_keeps_the_fpr_for_a_new_image_on_average(count, fpr):
    values = torch.randperm(count + 1, generator=torch.Generator().manual_seed(count)).float()
    flagged = [
        float(values[new]) > threshold(torch.cat([values[:new], values[new + 1 :]]), fpr).value
        for new in range(count + 1)
    ]
    assert sum(flagged) / (count + 1) <= fpr
    assert sum(flagged) / (count + 1) > fpr - 2 / (count + 1) - 1e-9  # and hardly stricter than it must be


@pytest.mark.parametrize(("fpr", "least"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.01, 99), (0.001, 999)])
def test_threshold_says_how_many_images_it_needs(fpr, least):
    assert fewest(fpr) == least
    assert threshold(torch.arange(least).float(), fpr).count == least
    with pytest.raises(SettingError, match=f"needs at least {least} held-out"):
        threshold(torch.arange(least - 1).float(), fpr)


def test_one_percent_of_twenty_images_is_refused():
    with pytest.raises(SettingError, match=r"1.00% needs at least 99 .* got 20") as caught:
        threshold(torch.arange(20).float(), 0.01)
    assert "4.8%" in caught.value.hint


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, math.nan])
def test_threshold_refuses_what_is_no_rate(fpr):
    with pytest.raises(SettingError, match="fpr"):
        threshold(torch.arange(100).float(), fpr)
