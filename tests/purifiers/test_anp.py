"""ANP: the disturbance, what the masks minimise, and the backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.core.run import Run
from bezoar.purifiers._masks import gates_of
from bezoar.purifiers.anp import ANP, disturbed
from tests.purifiers.nets import NAMES, deeper, few, form, hooks, make, same, toy_clean
from tests.toys import acc, asr, images, trained


def setting(name: str = "normed") -> tuple:
    """A net with frozen weights, its gates, masks with gradients, images and labels."""
    model = make(name).requires_grad_(False)
    gates = gates_of(model, few(2))
    masks = {key: gain.clone().requires_grad_() for key, gain in gates.gain.items()}
    return model, gates, masks, few(24).x, few(24).y


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_noise_the_gradient_is_that_of_scaled_gains():
    """Verify: eps 0, alpha 1; the gradient of a gain times the gain."""
    model, gates, masks, x, y = setting()
    ANP(eps=0.0, alpha=1.0).loss(model, gates, masks, x, y, source()).backward()
    plain = make("normed")
    F.cross_entropy(plain(x), y).backward()
    for name, mask in masks.items():
        norm = plain.get_submodule(name)
        torch.testing.assert_close(mask.grad, norm.weight.grad * norm.weight.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_disturbance_gives_the_same_outputs(name):
    """Verify: to the bit."""
    model, gates, masks, x, _ = setting(name)
    nothing = {key: torch.zeros_like(mask) for key, mask in masks.items()}
    with torch.no_grad():
        plain = model(x)
        with disturbed(gates, masks, nothing, nothing):
            assert torch.equal(model(x), plain)


def test_disturbed_channel_has_mask_plus_noise_and_a_scaled_shift():
    model, gates, masks, _, _ = setting()
    gain = {key: torch.full_like(mask, 0.25) for key, mask in masks.items()}
    shift = {key: torch.full_like(mask, -0.5) for key, mask in masks.items()}
    halves = {key: torch.full_like(mask, 0.5) for key, mask in masks.items()}
    norm, x = model[1], torch.rand(2, 8, 4, 4)
    with disturbed(gates, halves, gain, shift):
        found = norm(x)
    wanted = F.batch_norm(x, norm.running_mean, norm.running_var, 0.75 * norm.weight, 0.5 * norm.bias)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_the_disturbance_raises_the_loss(name):
    """Verify: on average over draws."""
    model, gates, masks, x, y = setting(name)
    method, losses = ANP(eps=0.2), []
    with torch.no_grad():
        clean = float(F.cross_entropy(model(x), y))
    for seed in range(5):
        noise = method.disturbance(model, gates, masks, x, y, source(seed))
        with torch.no_grad(), disturbed(gates, masks, *noise):
            losses.append(float(F.cross_entropy(model(x), y)))
    assert sum(losses) / 5 > clean


def test_signs_of_the_steps_are_those_of_the_slopes():
    """One step of eps from a known start, against the gradient taken another way."""
    model, gates, masks, x, y = setting()
    method, draws = ANP(eps=0.3), source(4)
    start = [method._drawn(masks, draws), method._drawn(masks, draws)]
    found = method.disturbance(model, gates, masks, x, y, source(4))
    with disturbed(gates, masks, *start):
        F.cross_entropy(model(x), y).backward()
    for begin, end in zip(start, found, strict=True):
        for name in masks:
            torch.testing.assert_close(end[name], begin[name].detach() + 0.3 * begin[name].grad.sign())


@pytest.mark.parametrize(("project", "ascents"), [(False, 1), (True, 1), (True, 3)])
def test_size_of_the_disturbance(project, ascents):
    model, gates, masks, x, y = setting()
    noise = ANP(eps=0.4, project=project, ascents=ascents).disturbance(model, gates, masks, x, y, source())
    largest = max(float(one.abs().max()) for part in noise for one in part.values())
    assert largest <= 0.4 + 1e-6 if project else 0.4 < largest <= 0.8 + 1e-6
    assert all(mask.grad is None for mask in masks.values()), "the ascent leaves the masks alone"


def test_noise_is_drawn_anew():
    model, gates, masks, x, y = setting()
    generator, method = source(), ANP(eps=0.4)
    first, second = (method.disturbance(model, gates, masks, x, y, generator)[0] for _ in range(2))
    assert not any(torch.equal(first[name], second[name]) for name in masks)


def test_both_losses_count_as_alpha_says():
    model, gates, masks, x, y = setting()
    clean, worst, mixed = (
        float(ANP(alpha=alpha).loss(model, gates, masks, x, y, source()).detach()) for alpha in (1.0, 0.0, 0.2)
    )
    assert mixed == pytest.approx(0.2 * clean + 0.8 * worst, rel=1e-5)
    assert worst > clean


def test_learning_leaves_the_model_and_its_statistics():
    model = copy.deepcopy(trained(backdoored=True))
    learned = ANP(steps=5).learned(model, toy_clean(), Run())
    assert same(model, trained(backdoored=True))
    assert any(bool((mask < 1).any()) for mask in learned.masks.values())
    assert all(float(mask.min()) >= 0 and float(mask.max()) <= 1 for mask in learned.masks.values())


def test_backdoor_goes():
    model, held_out = copy.deepcopy(deeper(16, 10)), images(300, seed=8)
    assert asr(model, *held_out) > 0.95
    ANP(steps=200)(model, toy_clean(), Run(seed=3))
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.95


@pytest.mark.parametrize("count", [100, 10, 1])
def test_few_images(count):
    model, run = copy.deepcopy(trained(backdoored=True)), Run(seed=3)
    ANP(steps=30)(model, toy_clean(count), run)
    assert acc(model, *images(300, seed=8)) > (0.99 if count == 1 else 0.9)
    assert bool(run.warnings) == (count < 50)


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    model, run = make(name), Run()
    before = form(model)
    out = ANP(steps=3, batch=16, lr=1.0, threshold=0.999)(model, few(24), run)
    assert form(out) == before
    assert bool(torch.isfinite(out(few(8).x)).all())
    assert 0 < run.notes["pruned"] <= run.notes["channels"]
    assert hooks(out) == 0


class Breaks(nn.Sequential):
    """Answers a few times."""

    left = 6

    def forward(self, x):
        Breaks.left -= 1
        if Breaks.left < 0:
            raise RuntimeError("the model broke")
        return super().forward(x)


def test_no_hook_is_left_after_a_failure():
    model = Breaks(*make("normed"))
    with pytest.raises(RuntimeError, match="the model broke"):
        ANP()(model, few(24), Run())
    assert hooks(model) == 0
    assert all(not {"weight", "bias"} & module.__dict__.keys() for module in model.modules())


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("ascents", 0), ("eps", -0.1), ("alpha", 1.5), ("lr", -1.0), ("batch", 1), ("tolerance", 2.0)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"ANP.{name} must be"):
        ANP(**{name: value})
