"""Batched inversion: the same as label by label, whatever the order, the chunks, or an interruption."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace
from bezoar.core.surgery import frozen
from bezoar.ops.cost import CostController
from bezoar.ops.invert import Inversion, InversionSettings, target_loss
from tests.toys import LABELS, SIZE, images

STEPS = 20


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = (nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(150, LABELS))
        network = nn.Sequential(*layers)
        network(images(60, seed=1)[0])  # statistics of their own
    with frozen(network) as quiet:
        yield quiet


@pytest.fixture(scope="module")
def data():
    return images(48, seed=5)


def search(model, data, labels: Sequence[int], run: Run | None = None, seed: int = 4, **settings) -> Inversion:
    settings = {"batch": 8, "lr": 0.2, **settings}
    return Inversion(
        model,
        *data,
        list(labels),
        space=MaskedSpace((3, SIZE, SIZE), start_mask=0.12),
        controller=CostController(init_cost=0.05, patience=2, from_zero=False, reach=0.6),
        settings=InversionSettings(**settings),
        seed=seed,
        run=run or Run(),
    )


def after(inversion: Inversion, steps: int = STEPS) -> Inversion:
    for _ in range(steps):
        inversion.step()
    return inversion


def everything(inversion: Inversion) -> dict[str, Tensor]:
    """All tensors whose first axis is the label."""
    return {
        **{f"now.{k}": v.detach() for k, v in inversion.parameters.items()},
        **{f"best.{k}": v for k, v in inversion.best.items()},
        **{f"cost.{k}": v for k, v in inversion.cost.items()},
        "success": inversion.success,
        "done": inversion.done,
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], exact: bool = False) -> None:
    for name, value in wanted.items():
        tolerance = 0.0 if exact or not value.is_floating_point() else 2e-3
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def together(model, data):
    return everything(after(search(model, data, range(LABELS))))


def test_something_happened(model, data, together):
    start = everything(search(model, data, range(LABELS)))
    assert all((together[f"now.{k}"] - start[f"now.{k}"]).abs().amax() > 0.5 for k in ("mask", "pattern"))
    assert torch.isfinite(together["cost.best"]).any()


@pytest.mark.parametrize("label", range(LABELS))
def test_batched_is_label_by_label(label, model, data, together):
    alone = everything(after(search(model, data, [label])))
    assert_same(alone, {k: v[label : label + 1] for k, v in together.items()})


def test_order_of_labels_does_not_matter(model, data, together):
    order = [4, 0, 5, 2, 1, 3]
    assert_same(everything(after(search(model, data, order))), {k: v[order] for k, v in together.items()})


@pytest.mark.parametrize("labels_a_pass", [1, 4])
def test_chunks_do_not_matter(labels_a_pass, model, data, together):
    pixels = labels_a_pass * 8 * SIZE * SIZE
    chunked = search(model, data, range(LABELS), pixels_per_pass=pixels)
    assert len(chunked._chunks(8)) == -(-LABELS // labels_a_pass)
    assert_same(everything(after(chunked)), together)


def test_dropping_labels_does_not_disturb_the_rest(model, data):
    kept = [1, 3, 4]
    wanted = everything(after(search(model, data, kept)))
    run = Run()
    found = after(search(model, data, range(LABELS), run), STEPS // 2)
    found.keep(kept)
    assert found.labels == kept
    assert_same(everything(after(found, STEPS // 2)), wanted)
    assert run.image_gradients == 8 * (STEPS // 2) * (LABELS + len(kept))


def test_interrupted_and_continued(model, data, together):
    file = io.BytesIO()
    torch.save(after(search(model, data, range(LABELS)), 7).state(), file)
    file.seek(0)
    again = search(model, data, range(LABELS))
    again.restore(torch.load(file, weights_only=True))
    assert again.steps == 7
    assert_same(everything(after(again, STEPS - 7)), together, exact=True)


def test_interrupted_after_labels_were_dropped(model, data):
    straight = after(search(model, data, range(LABELS)), 5)
    straight.keep([5, 2])
    file = io.BytesIO()
    torch.save(straight.state(), file)
    file.seek(0)
    again = search(model, data, range(LABELS))
    again.restore(torch.load(file, weights_only=True))
    assert again.labels == [5, 2]
    assert_same(everything(after(again, 5)), everything(after(straight, 5)), exact=True)


def test_model_gets_no_gradients(model, data):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after(search(model, data, [0, 1]), 2)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_every_image_is_seen_once_a_pass(model, data):
    counted = search(model, (torch.arange(48.0).view(48, 1, 1, 1).expand(48, 3, SIZE, SIZE), data[1]), [0])
    seen = []
    for step in range(12):
        counted.steps = step
        seen.append(counted._batch()[0][:, 0, 0, 0])
    assert sorted(torch.cat(seen[:6]).tolist()) == list(range(48))
    assert sorted(torch.cat(seen[6:]).tolist()) == list(range(48))
    assert not torch.equal(torch.cat(seen[:6]), torch.cat(seen[6:]))


# Losses


def test_cross_entropy_is_torchs():
    out, target = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    assert torch.equal(target_loss(out, target, "ce"), F.cross_entropy(out, target, reduction="none"))


def test_linear_loss_is_linear_in_the_probability():
    out, target = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    p = out.double().softmax(1)[torch.arange(9), target]
    torch.testing.assert_close(target_loss(out, target, "linear").double(), 16.118 * (1 - p), rtol=1e-5, atol=1e-5)
    sure = torch.tensor([[-50.0, 50.0]])
    assert float(target_loss(sure, torch.tensor([1]), "linear")) == 0
    assert float(target_loss(sure, torch.tensor([0]), "linear")) == pytest.approx(16.118, abs=1e-3)


class Pixels(nn.Module):
    """Logits are linear in 6 x 6 grey images: label k looks at pixel ``places[k]``, or none, with weight ``gain``."""

    def __init__(self, places: Sequence[tuple[int, int] | None], gain: float, bias: Sequence[float]) -> None:
        super().__init__()
        weight = torch.zeros(len(places), 1, 6, 6)
        for label, place in enumerate(places):
            if place is not None:
                weight[label, 0, *place] = gain
        self.weight, self.bias = nn.Parameter(weight.flatten(1)), nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight, self.bias)


def on_pixels(model: nn.Module, x: Tensor, y: Tensor, labels: Sequence[int], cost: float, **settings) -> Inversion:
    return Inversion(
        model,
        x,
        y,
        list(labels),
        space=MaskedSpace((1, 6, 6), start_mask=0.3),
        controller=CostController(init_cost=cost, multiplier=1.5, from_zero=False),
        settings=InversionSettings(**settings),
        seed=0,
        run=Run(),
    )


def test_images_of_the_label_itself_count_for_nothing():
    """Label 0 has image 0 alone; its loss and its success rate come from the other three images."""
    model = Pixels([(0, 0), (5, 5)], 1.0, [0.0, 0.3])
    x, y = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 1])
    with frozen(model):
        found = on_pixels(model, x, y, [0], cost=0.1, batch=4)
        values = {k: v.detach().clone().requires_grad_() for k, v in found.parameters.items()}
        found.step()
        stamped = found.space.stamp(values, x[1:])[0]
        loss = target_loss(model(stamped), torch.zeros(3, dtype=torch.long), "ce").mean()
        (loss + 0.1 * found.space.size(values)[0]).backward()
    for name, value in values.items():
        torch.testing.assert_close(found.parameters[name].grad, value.grad)
    assert float(found.success) == pytest.approx(float((model(stamped).argmax(1) == 0).double().mean()))


def test_batch_of_the_label_alone_leaves_the_rate_as_it_is():
    model = Pixels([(0, 0), (5, 5)], 1.0, [0.0, 0.3])
    found = on_pixels(model, torch.full((4, 1, 6, 6), 0.5), torch.zeros(4, dtype=torch.long), [0], cost=0.1)
    found.success[:] = 0.5
    before = found.parameters["pattern"].detach().clone()
    found.step()
    assert float(found.success) == 0.5
    assert torch.equal(found.parameters["pattern"], before), "nothing to learn from these images but the size"


def test_mask_gradient_is_the_finite_difference():
    """In float64, of the whole objective: loss on other labels plus weight times size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
        x, y = torch.rand(5, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 2])
    model.requires_grad_(False)
    found = on_pixels(model, x, y, [2, 0], cost=0.07, batch=5)
    found.parameters = {k: v.detach().double().requires_grad_() for k, v in found.parameters.items()}
    found.best = {k: v.double() for k, v in found.best.items()}
    start = {k: v.detach().clone() for k, v in found.parameters.items()}
    found.optimizer = torch.optim.SGD(list(found.parameters.values()), lr=0.0)
    found.step()

    def objective(values: dict[str, Tensor]) -> float:
        stamped = found.space.stamp(values, x)
        losses = [
            target_loss(model(stamped[row][y != label]), torch.full((int((y != label).sum()),), label), "ce").mean()
            for row, label in enumerate((2, 0))
        ]
        return float(sum(losses) + 0.07 * found.space.size(values).sum())

    for name in ("mask", "pattern"):
        for place in ((0, 0, 1, 2), (1, 0, 5, 5), (1, 0, 3, 0)):
            moved = []
            for step in (1e-5, -1e-5):
                values = {k: v.clone() for k, v in start.items()}
                values[name][place] += step
                moved.append(objective(values))
            expected = (moved[0] - moved[1]) / 2e-5
            assert float(found.parameters[name].grad[place]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_mask_concentrates_on_the_pixel_that_decides():
    model = Pixels([None, (2, 4), None], 12.0, [6.0, 0.0, 6.0])
    x, y = torch.rand(32, 1, 6, 6, generator=torch.Generator().manual_seed(2)), torch.arange(32) % 3
    x[:, 0, 2, 4] = 0.0
    with frozen(model):
        found = after(on_pixels(model, x, y, [1], cost=0.3, batch=16), 120)
    trigger = found.trigger(0)
    assert float(trigger.mask[0, 2, 4]) > 0.5, "12 times the pixel must exceed 6"
    assert float(trigger.pattern[0, 2, 4]) > 0.9
    assert trigger.size - float(trigger.mask[0, 2, 4]) < 0.1, "nothing anywhere else"
