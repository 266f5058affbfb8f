"""FIP and Fast FIP: the objective, what is trained, what it costs, and what becomes of sharpness and backdoor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.curvature import hessian, top_eigenvalue
from bezoar.purifiers.fast_fip import FastFIP, Spectrum, matrices
from bezoar.purifiers.fip import FIP
from tests.purifiers.nets import CLASSES, LARGE, NAMES, examples, make
from tests.toys import LABELS, acc, asr, images, trained

BOTH = pytest.mark.parametrize("method", [FIP, FastFIP])


def clean(count: int) -> Clean:
    x, y = images(count, seed=7)
    return Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=LABELS)


def suspect() -> nn.Module:
    return copy.deepcopy(trained(backdoored=True)).requires_grad_(True)


def sharpness(model: nn.Module) -> float:
    x, y = images(120, seed=9)
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    product = hessian(F.cross_entropy(model(x), y), parameters)
    return top_eigenvalue(product, parameters, torch.Generator().manual_seed(0), steps=30)


@pytest.mark.parametrize("name", [*NAMES, *LARGE])
def test_no_change_of_the_spectrum_gives_the_weights(name):
    model = make(name)
    spectrum = Spectrum(model, 1.0)
    named = dict(model.named_parameters())
    for weight, value in spectrum.weights(spectrum.tensors).items():
        assert value.shape == named[weight].shape
        torch.testing.assert_close(value, named[weight], rtol=0, atol=1e-5)
    x, _ = examples(4)
    torch.testing.assert_close(spectrum.forward(spectrum.tensors, x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_count_of_what_is_trained(name):
    model = make(name)
    shapes = [(p.shape[0], p[0].numel()) for p in matrices(model).values()]
    alone = sum(t.numel() for t in Spectrum(copy.deepcopy(model), 1.0).tensors.values())
    assert alone == sum(min(shape) for shape in shapes)
    vectors = sum(p.numel() for p in model.parameters()) - sum(a * b for a, b in shapes)
    assert sum(t.numel() for t in Spectrum(model, 1.0, rest=True).tensors.values()) == alone + vectors


def test_singular_values_move_by_scale_and_stay_above_zero():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 6, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    spectrum = Spectrum(model, 2.0)
    made = spectrum.weights({"weight": torch.tensor([0.5, 0.0, -0.1, -100.0])})["weight"]
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(made)
    wanted = torch.stack([before[0] + 1.0, before[1], before[2] - 0.2, torch.tensor(0.0)])
    torch.testing.assert_close(after, wanted.sort(descending=True).values, rtol=1e-4, atol=1e-5)


@BOTH
def test_sharpness_and_backdoor_fall(method):
    run, held_out = Run(), images(240, seed=8)
    model = method(smooth=0.1, steps=150)(suspect(), clean(180), run)
    assert acc(model, *held_out) > 0.95
    assert asr(model, *held_out) <= asr(suspect(), *held_out)
    assert sharpness(model) < 0.5 * sharpness(suspect())
    assert run.notes["fisher_trace_after"] < 0.5 * run.notes["fisher_trace_before"]


def test_trace_term_lowers_the_trace():
    found = {}
    for smooth in (0.0, 0.1):
        run = Run()
        FIP(smooth=smooth, anchor=0.0, every=1, steps=40)(suspect(), clean(180), run)
        found[smooth] = run.notes["fisher_trace_after"]
    assert found[0.1] < 0.7 * found[0.0]


@BOTH
def test_anchor_holds(method):
    moved, old = {}, suspect()
    for anchor in (0.0, 1e4):
        model = method(anchor=anchor, smooth=0.0, steps=40, lr=1e-3)(suspect(), clean(60), Run())
        pairs = zip(model.parameters(), old.parameters(), strict=True)
        moved[anchor] = sum(float((a - b).detach().square().sum()) for a, b in pairs)
    assert moved[1e4] < 0.7 * moved[0.0]


def test_without_both_terms_it_is_sgd():
    """Eval mode, no augmentation: the first step is the gradient of the plain cross-entropy."""
    data = clean(1)
    model = FIP(smooth=0.0, anchor=0.0, steps=1, batch=3, lr=0.1, pad=0, clip=0.0)(suspect(), data, Run())
    old = suspect()
    F.cross_entropy(old(data.x), data.y).backward()
    for new, parameter in zip(model.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(new, parameter - 0.1 * parameter.grad, rtol=1e-5, atol=1e-7)


def test_anchor_and_trace_enter_the_step_with_their_weights():
    """One image and its own label: the trace's estimate is then exact, and the anchor is 0 at the start."""
    data = clean(1)
    settings = {"steps": 1, "batch": 1, "lr": 0.1, "pad": 0, "clip": 0.0, "labels": "given"}
    model = FIP(smooth=0.3, anchor=5.0, every=2, **settings)(suspect(), data, Run())
    old = suspect()
    parameters = list(old.parameters())
    loss = F.cross_entropy(old(data.x), data.y)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    whole = loss + 0.3 * 2 * sum(s.square().sum() for s in slopes)
    for new, parameter, slope in zip(
        model.parameters(), parameters, torch.autograd.grad(whole, parameters), strict=True
    ):
        torch.testing.assert_close(new, parameter - 0.1 * slope, rtol=1e-4, atol=1e-6)


def test_fast_is_at_least_three_times_cheaper():
    costs = {}
    for method in (FIP, FastFIP):
        run = Run()
        made = method()
        method(steps=made.steps // 50)(suspect(), clean(60), run)
        setup = 2 * 60  # the Fisher information before and after
        costs[method] = 50 * (run.image_gradients - setup) + setup
    assert costs[FIP] >= 3 * costs[FastFIP]


def test_fast_moves_along_the_singular_vectors_alone():
    model, old = FastFIP(steps=5, rest=False)(suspect(), clean(60), Run()), trained(backdoored=True).state_dict()
    for name, value in model.state_dict().items():
        if value.ndim < 2:
            assert torch.equal(value, old[name]), name
            continue
        left, _, right = torch.linalg.svd(old[name].flatten(1), full_matrices=False)
        inner = left.T @ value.flatten(1) @ right.T
        assert float((inner - torch.diag(inner.diagonal())).abs().max()) < 1e-4
        assert not torch.equal(value, old[name])


@BOTH
@pytest.mark.parametrize("count", [1, 6])
def test_small_sets(method, count):
    model = method(steps=6)(suspect(), clean(count), Run())
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_every_net(method, name):
    x, y = examples(12)
    data = Clean(x=x, y=y, held_x=x, held_y=y, num_classes=CLASSES)
    before = make(name)
    model = method(steps=2, batch=8)(make(name), data, Run())
    state, old = model.state_dict(), before.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in old.items()}
    assert all(torch.equal(state[k], v) for k, v in before.named_buffers()), "statistics stay"
    moved = sum(not torch.equal(state[k], v) for k, v in before.named_parameters())
    assert moved > len(list(before.parameters())) // 2
    assert torch.isfinite(model(x)).all()


def test_half_precision_comes_back():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make("normed").to(torch.bfloat16)

        def forward(self, x):
            return self.net(x.to(self.net[0].weight.dtype)).float()

    x, y = examples(6)
    data = Clean(x=x, y=y, held_x=x, held_y=y, num_classes=CLASSES)
    model = FIP(steps=2)(Half(), data, Run())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(x)).all()


def test_training_that_diverges_says_so():
    with pytest.raises(SettingError, match="diverged at step 2"):
        FIP(lr=1e30, clip=0.0, anchor=0.0)(suspect(), clean(60), Run())


def test_net_without_a_matrix_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModel, match="no weight matrix"):
        FastFIP()(model, clean(6), Run())


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch", 0), ("every", 0), ("lr", -1.0), ("smooth", -1.0), ("momentum", 1.0), ("labels", "true")],
)
def test_settings_out_of_range(method, name, value):
    with pytest.raises(SettingError, match=f"{method.__name__}.{name} must be"):
        method(**{name: value})
    with pytest.raises(SettingError, match="scale must be above 0"):
        FastFIP(scale=0.0)
