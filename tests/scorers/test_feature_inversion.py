"""Feature inversion: smooth changes of images, features that a few of them pass through, and what is scored."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.evidence import Scores
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.scorers._transform import Smooth, distortion
from bezoar.scorers.feature_inversion import FeatureInversion, Known, _Search
from tests.purifiers.nets import CLASSES, NAMES, few, hooks, make, toy_clean
from tests.toys import LABELS, TARGET, trained

BRIEF = FeatureInversion(steps=4, batch=4)
SPACE = Smooth((3, 12, 12), warp=4, colour=6)


@functools.cache
def toy(backdoored: bool) -> Scores:
    return FeatureInversion(steps=100)(trained(backdoored), toy_clean(), Run(seed=3))


def still(count: int = 1) -> dict[str, Tensor]:
    return {"flow": torch.zeros(count, 2, 4, 4), "shift": torch.zeros(count, 3, 6, 6)}


def test_no_change_is_no_change():
    x = few(3).x[..., :12, :12]
    torch.testing.assert_close(SPACE.stamp(still(), x)[0], x, rtol=0, atol=1e-5)


def test_even_flow_moves_by_its_pixels():
    x, moved = torch.rand(2, 3, 12, 12), still()
    moved["flow"][:, 0] = 2 / SPACE.unit  # along x
    moved["flow"][:, 1] = 1 / SPACE.unit
    out = SPACE.stamp(moved, x)[0]
    torch.testing.assert_close(out[..., :-1, :-2], x[..., 1:, 2:], rtol=0, atol=1e-4)


def test_even_shift_is_added_and_clipped():
    x, tinted = torch.rand(2, 3, 12, 12), still(2)
    tinted["shift"][1, 0] = 0.5
    out = SPACE.stamp(tinted, x)
    torch.testing.assert_close(out[1, :, 0], (x[:, 0] + 0.5).clamp(max=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, :, 1:], x[None, :, 1:].expand(2, -1, -1, -1, -1), rtol=0, atol=1e-5)


def test_distortion_is_a_root_mean_square():
    x = torch.zeros(2, 1, 2, 2)
    assert distortion(torch.stack([x, x + 0.3]), x).tolist() == pytest.approx([0, 0.3], abs=1e-5)


def test_start_depends_on_the_label_alone():
    one, all_of_them = SPACE.start([4], Run(seed=1)), SPACE.start([2, 4], Run(seed=1))
    assert torch.equal(one["flow"][0], all_of_them["flow"][1])
    assert not torch.equal(one["flow"], SPACE.start([4], Run(seed=2))["flow"])


def test_features_are_known_by_label():
    model, clean = trained(True), toy_clean()
    known = Known.of(model, clean, Run())
    with torch.no_grad():
        features = model[:-1](clean.x)
    torch.testing.assert_close(known.means[2], features[clean.y == 2].mean(0))
    torch.testing.assert_close(known.spread, features.std(0).clamp(min=1e-6))
    assert known.head is model[-1]


def search(labels: list[int]) -> _Search:
    model, clean, run = trained(True), toy_clean(), Run(seed=3)
    return _Search(FeatureInversion(), model, clean, run, SPACE, Known.of(model, clean, run), labels)


def test_features_outside_the_mask_are_those_of_other_images():
    model, x, one = trained(True), toy_clean().x[:4], search([1])
    swap = torch.tensor([1, 2, 3, 0])
    with frozen(model), torch.no_grad():
        one.mask.fill_(-50.0)
        closed = one._run(x, swap, plain=False)[2][0]
        one.mask.fill_(50.0)
        changed, _, opened = one._run(x, swap, plain=False)
        torch.testing.assert_close(closed, model(x)[swap], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(opened[0], model(changed[0]), rtol=1e-4, atol=1e-4)


def test_changes_are_brought_back_to_their_bound():
    one, x = search([0, 1]), toy_clean().x[:8]
    with torch.no_grad():
        one.parameters["shift"][0] = 0.4
        one._bound(x)
        sizes = distortion(SPACE.stamp(one.parameters, x), x)
    assert 0.05 < float(sizes[0]) < 0.13
    assert float(sizes[1]) < 0.1


def test_planted_label_leads_and_the_clean_toy_scores_lower():
    assert toy(True).leader == TARGET
    assert toy(True).model == toy(True).labels[TARGET]
    assert toy(True).model > toy(False).model + 0.2
    assert all(-1 <= value <= 1 for value in toy(True).labels.values())


def test_chunks_of_labels_change_nothing():
    whole = BRIEF(trained(True), toy_clean(), Run(seed=3)).labels
    parts = FeatureInversion(steps=4, batch=4, pixels_per_pass=1)(trained(True), toy_clean(), Run(seed=3)).labels
    assert whole.keys() == parts.keys() == set(range(LABELS))
    np.testing.assert_allclose(list(whole.values()), list(parts.values()), atol=0.05)


class Odd(nn.Module):
    """Multiplies what its last linear layer gives, so that this is not the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(432, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return 50 * self.head(x.flatten(1)).square()


def test_without_a_linear_head_it_works_without_features():
    run = Run()
    found = BRIEF(Odd(), toy_clean(), run)
    assert "without features" in run.warnings[0]
    assert len(found.labels) == LABELS


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    model = make(name)
    found = BRIEF(model, few(24), Run())
    assert found.labels.keys() == set(range(CLASSES))
    assert all(np.isfinite(value) for value in found.labels.values())
    assert hooks(model) == 0


def test_same_seed_same_scores():
    first, again = (BRIEF(trained(True), toy_clean(), Run(seed=5)) for _ in range(2))
    assert first.labels == again.labels


@pytest.mark.parametrize("count", [1, 3])
def test_few_images(count):
    assert all(np.isfinite(value) for value in BRIEF(trained(True), toy_clean(count), Run()).labels.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("batch", 1), ("lr", 0.0), ("warp", 1), ("colour", 1), ("size", 0.0), ("share", 1.1)),
        *(("deviation", 0.0), ("level", 1.0), ("pixels_per_pass", 0)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"FeatureInversion.{name} must be"):
        FeatureInversion(**{name: value})
