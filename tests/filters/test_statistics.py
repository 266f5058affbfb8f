"""Each filter's statistic against a plain computation of its own."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from scipy.linalg import expm, sqrtm
from scipy.stats import ortho_group

from bezoar.core.errors import DataError, SettingError
from bezoar.core.run import Run
from bezoar.filters._classes import principal, stands_out, two_means
from bezoar.filters.activation_clustering import ActivationClustering, margin, silhouette
from bezoar.filters.beatrix import Beatrix, Bounds, deviation, gram, two_sample
from bezoar.filters.clean_distance import CleanDistance
from bezoar.filters.scan import SCAn, decompose, untangle
from bezoar.filters.spectral_signatures import SpectralSignatures, largest, spectral_scores
from bezoar.filters.spectre import SPECTRE, _fourth_moment, components_tried, que, robust_rows, whitened
from bezoar.filters.union import Union
from tests.filters.planted import CLASSES, WIDTH, clean_of, features, handing, judged, source


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def two_clouds(seed: int = 0, small: int = 12, large: int = 40, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two clouds, and which are of the small one."""
    second = torch.arange(small + large) < small
    return rows(small + large, width, seed) + 8.0 * second[:, None], second


turns = st.integers(0, 2**31).map(lambda seed: torch.from_numpy(ortho_group.rvs(5, random_state=seed)))


@pytest.mark.parametrize(("count", "width"), [(50, 5), (5, 50)])
def test_principal_directions_are_those_of_the_singular_value_decomposition(count, width):
    x = rows(count, width)
    x = x - x.mean(0)
    directions, variances = principal(x, 3)
    _, singular, right = np.linalg.svd(x.numpy(), full_matrices=False)
    np.testing.assert_allclose(variances, singular[:3] ** 2 / count, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(directions.numpy() * right[:3].T, axis=0)), 1, rtol=1e-9)


def test_directions_without_variance_are_left_out():
    x = torch.zeros(10, 4, dtype=torch.float64)
    assert principal(x, 3)[0].shape == (4, 0)
    x[:, 1] = torch.arange(10) - 4.5
    assert principal(x, 3)[0].shape == (4, 1)


@pytest.mark.parametrize("seed", range(5))
def test_two_means_are_as_good_as_the_best_of_many_random_starts(seed):
    x = rows(60, 3, seed)
    found = two_means(x)
    assert found is not None
    own = min(float(((x[g] - x[g].mean(0)) ** 2).sum()) for g in [slice(None)])
    inertia = sum(float(((x[g] - x[g].mean(0)) ** 2).sum()) for g in (found.second, ~found.second))
    best = own
    for start in range(50):
        _, groups = kmeans2(x.numpy(), 2, minit="++", seed=start)
        best = min(
            best,
            sum(float(((x[groups == k] - x[groups == k].mean(0)) ** 2).sum()) for k in (0, 1) if (groups == k).any()),
        )
    assert inertia <= best * 1.03
    assert int(found.second.sum()) <= 30


def test_two_means_of_equal_rows_are_none():
    assert two_means(torch.ones(7, 3, dtype=torch.float64)) is None
    assert two_means(torch.ones(1, 3, dtype=torch.float64)) is None


def test_second_group_is_the_small_one():
    x, second = two_clouds()
    found = two_means(x)
    assert found is not None
    assert torch.equal(found.second, second)
    torch.testing.assert_close(found.means[1], x[second].mean(0))


def test_standing_out_is_the_anomaly_index_of_the_paper():
    """SCAn, and Beatrix: |J - median| / (1.4826 MAD); here above the median only."""
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert stands_out(values)[4] == pytest.approx((100 - 3) / 1.4826 / 1.0, rel=1e-4)
    assert stands_out(values)[0] < 0
    assert stands_out([1.0, 1.0, 1.0, 2.0]) == [0.0, 0.0, 0.0, 1e6]
    assert stands_out([]) == []


# Spectral signatures


def test_spectral_score_is_the_squared_projection_on_the_top_singular_vector():
    x = rows(30, 6)
    centred = x.numpy() - x.numpy().mean(0)
    top = np.linalg.svd(centred, full_matrices=False)[2][0]
    np.testing.assert_allclose(spectral_scores(x.float()), (centred @ top) ** 2, rtol=1e-4)


@given(turn=turns)
def test_spectral_score_does_not_see_rotations(turn):
    x = rows(20, 5, 3)
    torch.testing.assert_close(spectral_scores(x @ turn), spectral_scores(x))


def test_the_share_that_is_taken_out_is_the_papers():
    x, y, _ = features(500)
    found = judged(SpectralSignatures(epsilon=0.08), x, y)
    assert torch.bincount(y[found.suspect]).tolist() == [12] * 5  # 1.5 * 0.08 * 100
    assert largest(torch.tensor([1.0, 3.0, 2.0, 3.0]), 0.5).tolist() == [1, 3]
    assert len(largest(torch.rand(100), 0.15)) == 15


@pytest.mark.parametrize("settings", [{"epsilon": 0}, {"epsilon": 0.7}, {"margin": 0.5}, {"margin": 11}])
def test_settings_out_of_range_are_refused(settings):
    for method in (SpectralSignatures, SPECTRE):
        with pytest.raises(SettingError):
            method(**settings)


# Activation clustering


def plain_silhouette(x: np.ndarray, second: np.ndarray) -> float:
    found = []
    for i in range(len(x)):
        own = [np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i and second[j] == second[i]]
        other = [np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if second[j] != second[i]]
        a, b = (np.mean(own) if own else 0.0), np.mean(other)
        found.append((b - a) / max(a, b) if own else 0.0)
    return float(np.mean(found))


@pytest.mark.parametrize("small", [1, 2, 9])
def test_silhouette_is_rousseeuws(small):
    x, second = two_clouds(small=small, large=15)
    assert silhouette(x, second) == pytest.approx(plain_silhouette(x.numpy(), second.numpy()))
    assert silhouette(x, torch.zeros(len(x), dtype=torch.bool)) == 0.0


def test_independent_components_are_whitened():
    reduced = ActivationClustering(dims=3, reduce="ica").reduced(rows(80, 6) * torch.arange(1, 7))
    torch.testing.assert_close(reduced.T @ reduced / 80, torch.eye(3, dtype=torch.float64))
    kept = ActivationClustering(dims=3, reduce="pca").reduced(rows(80, 6) * torch.arange(1, 7))
    assert (kept.T @ kept / 80).diagonal().tolist() == sorted((kept.T @ kept / 80).diagonal().tolist(), reverse=True)


@given(turn=turns)
def test_a_rotation_of_the_components_moves_nobody(turn):
    """Why the rotation of ICA may be left out."""
    x, _ = two_clouds(width=5)
    one, other = two_means(x), two_means(x @ turn)
    assert one is not None
    assert other is not None
    assert torch.equal(one.second, other.second)
    torch.testing.assert_close(margin(x, one), margin(x @ turn, other))


@pytest.mark.parametrize(
    ("rule", "share", "flagged"),
    [
        ("size", 0.2, True),
        ("size", 0.5, False),
        ("silhouette", 0.5, True),
        ("both", 0.5, False),
        ("both", 0.2, True),
    ],
)
def test_rules_of_activation_clustering(rule, share, flagged):
    x, y, bad = features(500, poison=share)
    found = judged(ActivationClustering(rule=rule, dims=2, smallest=0.3), x, y)
    assert (2 in found.flagged) is flagged
    if flagged and share < 0.5:
        assert torch.equal(found.suspect & (y == 2), bad)


# SCAn


def plain_decompose(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """EM as in the paper, example by example, with pseudo-inverses."""
    x = x - x.mean(0)
    means = {k: x[y == k].mean(0) for k in set(y.tolist())}
    for _ in range(200):
        u = np.stack([means[k] for k in y.tolist()])
        between, within = np.cov(u.T), np.cov((x - u).T)
        inverse = np.linalg.pinv(within)
        means = {
            k: within @ np.linalg.pinv((y == k).sum() * between + within) @ between @ inverse @ x[y == k].sum(0)
            for k in means
        }
    return within, between


def test_covariances_are_those_of_the_em():
    x, y, _ = features(100, seed=5)
    x = x[:, :4].double()
    found = decompose(x, y, ridge=0.0)
    within, between = plain_decompose(x.numpy(), y.numpy())
    np.testing.assert_allclose(found.within, within, rtol=1e-3, atol=1e-3 * np.abs(within).max())
    np.testing.assert_allclose(found.between, between, rtol=1e-3, atol=1e-3 * np.abs(between).max())
    turned = found.basis.T @ found.within @ found.basis
    torch.testing.assert_close(turned, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.basis.T @ found.between @ found.basis, torch.diag(found.power), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.back @ found.basis, torch.eye(4, dtype=torch.float64))


def test_statistic_is_the_likelihood_ratio():
    x, y, _ = features(100, seed=5)
    metric = decompose(x[:, :4].double(), y, ridge=0.0)
    cloud, second = two_clouds()
    statistic, odds = untangle(cloud, metric.power, cloud[~second])
    count, power = len(cloud), np.diag(metric.power.numpy())
    single = np.linalg.inv(count * power + np.eye(4)) @ power @ cloud.numpy().sum(0)

    def ratio(row: np.ndarray, mean: np.ndarray) -> float:
        return float(-((row - mean) ** 2).sum() / 2)

    means = [cloud[group].mean(0).numpy() for group in (~second, second)]
    two = [ratio(row, means[int(s)]) for row, s in zip(cloud.numpy(), second.tolist(), strict=True)]
    one = [ratio(row, single) for row in cloud.numpy()]
    assert statistic == pytest.approx(2 * (np.mean(two) - np.mean(one)))
    assert torch.equal(odds > 0, second)
    assert float(odds[0]) == pytest.approx(ratio(cloud[0].numpy(), means[1]) - ratio(cloud[0].numpy(), means[0]))


def test_suspicious_group_is_the_one_with_fewer_clean_examples_whatever_its_size():
    cloud, second = two_clouds()
    power = torch.ones(4, dtype=torch.float64)
    assert torch.equal(untangle(cloud, power, cloud[second])[1] > 0, ~second)
    assert torch.equal(untangle(cloud, power, cloud[:0])[1] > 0, second)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_scan_finds_also_more_poison_than_clean_examples(share):
    x, y, bad = features(600, poison=share)
    found = judged(SCAn(), x, y)
    assert found.flagged == (2,)
    assert torch.equal(found.suspect, bad)


def test_feature_that_no_clean_example_excites_counts():
    x, y, bad = features(400, poison=0.2)
    known, labels, _ = features(200, seed=77)
    dead = torch.zeros(len(x), 1)
    dead[bad] = 0.3
    clean = x.clone()
    clean[bad] = x[(y == 2) & ~bad][: int(bad.sum())]  # nothing else gives them away
    wide = torch.cat([clean, dead], 1)
    metric = decompose(torch.cat([known, torch.zeros(len(known), 1)], 1).double(), labels, 1e-3)
    place = (wide[y == 2] - wide.mean(0)).double() @ metric.basis
    assert torch.equal(untangle(place, metric.power, place[:0])[1] > 0, bad[y == 2])


# SPECTRE


def test_whitening_makes_those_that_are_kept_standard():
    x = rows(60, 4) * torch.tensor([1.0, 5, 0.1, 2]) + 3
    kept = torch.arange(60) < 40
    white = whitened(x, kept)
    torch.testing.assert_close(torch.cov(white[kept].T, correction=0), torch.eye(4, dtype=torch.float64))
    root = np.linalg.inv(sqrtm(np.cov(x[kept].numpy().T, ddof=0)))
    np.testing.assert_allclose(white, (x - x[kept].mean(0)).numpy() @ root, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_que_score_is_that_of_the_matrix_exponential(alpha):
    x = rows(50, 4) * torch.tensor([1.0, 1.2, 2, 1])
    spread = np.cov(x.numpy().T, ddof=0)
    weight = expm(alpha * (spread - np.eye(4)) / (np.linalg.norm(spread, 2) - 1))
    expected = [row @ weight @ row / np.trace(weight) for row in x.numpy()]
    np.testing.assert_allclose(que(x, alpha), expected, rtol=1e-9)


def test_que_score_without_sharpness_is_the_squared_norm():
    x = rows(50, 4)
    torch.testing.assert_close(que(x, 0.0), (x**2).mean(1))


def test_fourth_moment_is_that_of_the_whole_matrix():
    x = rows(300, 3)
    x[:20] *= 3
    products = np.stack([np.kron(row, row) for row in x.numpy()])
    whole = products.T @ products / 300 - np.outer(np.eye(3).ravel(), np.eye(3).ravel())
    value, direction = _fourth_moment(x)
    values, vectors = np.linalg.eigh(whole)
    assert value == pytest.approx(values[-1], rel=1e-2)
    assert abs(float((direction.ravel() * torch.from_numpy(vectors[:, -1])).sum())) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_robust_covariance_drops_what_was_planted_and_no_more_than_allowed(rounds):
    x = rows(400, 5)
    x[:20] = 0.1 * x[:20] + 30 * torch.nn.functional.one_hot(torch.tensor(2), 5)
    kept = robust_rows(x - x.mean(0), 0.05, rounds)
    assert int((~kept).sum()) <= 40
    assert not bool(kept[:20].any())
    assert bool(robust_rows(x[:, :1], 0.05, rounds).all()), "one component is not whitened"


def test_components_tried_are_the_squares_of_the_code():
    assert components_tried(64) == [1, 4, 9, 16, 25, 36, 49, 64]
    assert components_tried(1) == [1]
    assert components_tried(0) == []


def test_spectre_takes_out_of_the_suspicious_label_alone_unless_told():
    x, y, bad = features(500, poison=0.1)
    found = judged(SPECTRE(), x, y)
    assert set(y[found.suspect].tolist()) == {2}
    assert int(found.suspect.sum()) == 15
    assert torch.bincount(y[judged(SPECTRE(labels="all"), x, y).suspect]).tolist() == [15] * 5


def test_spectre_finds_what_the_spectral_signature_hides():
    """Its point: poison along a direction of small variance, which the largest one drowns."""
    x, y, _ = features(1000)
    generator = torch.Generator().manual_seed(4)
    x[:, 0] += 0.15 * torch.randn(1000, generator=generator)
    bad = torch.zeros(1000, dtype=torch.bool)
    bad[(y == 2).nonzero().flatten()[:14]] = True
    x[bad, 5] += 0.15
    spectral, spectre = (judged(method(epsilon=0.07), x, y) for method in (SpectralSignatures, SPECTRE))
    assert float(spectral.suspect[bad].double().mean()) < 0.5
    assert float(spectre.suspect[bad].double().mean()) > 0.9


# Beatrix


def plain_gram(maps: np.ndarray, order: int) -> list[float]:
    """Channel by channel, of one example."""
    found = []
    for i, j in itertools.combinations_with_replacement(range(len(maps)), 2):
        value = sum(maps[i, s] ** order * maps[j, s] ** order for s in range(maps.shape[1]))
        found.append(math.copysign(abs(value) ** (1 / order), value))
    return found


@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_gram_entries_are_those_of_the_paper(order):
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 4)))
    for one, entries in zip(maps.numpy(), gram(maps, order), strict=True):
        np.testing.assert_allclose(entries, plain_gram(one, order), rtol=1e-9)


def test_all_orders_of_a_single_place_are_alike():
    maps = torch.rand(3, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(gram(maps, 5), gram(maps, 1))


@given(factor=st.floats(0.1, 10))
def test_gram_entries_grow_with_the_square(factor):
    maps = torch.rand(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(gram(factor * maps, 4), factor**2 * gram(maps, 4))


def test_deviation_is_how_far_entries_lie_beyond():
    bounds = Bounds(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([2.0, -1.0, 0.0]), 0.0)
    grams = torch.tensor([[0.5, -1.5, 0.0], [3.0, -3.0, 0.0]])
    # Two channels: three entries, averaged over half of four.
    torch.testing.assert_close(deviation(grams[:, :3], Bounds(*_with(bounds), 1e-9)), torch.tensor([0.5, 1.0]) / 2)


def _with(bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    return bounds.low, bounds.high


def test_bounds_are_median_and_ten_deviations():
    grams = torch.tensor([[1.0], [2.0], [3.0], [4.0], [100.0]])
    bounds = Beatrix(floor=0.5).bounds(grams)
    assert (float(bounds.low), float(bounds.high)) == (3 - 10, 3 + 10)
    assert bounds.floor == pytest.approx(1.5, abs=1e-5)


def test_threshold_is_exceeded_by_the_share_that_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    grams = [torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    made = Beatrix(width=1.0, false_alarms=0.1)
    limit = made.limit(grams)
    assert 0.03 < float((sum(deviation(g, made.bounds(g)) for g in grams) / 2 > limit).double().mean()) < 0.17


def test_two_sample_statistic_is_that_of_the_kernel():
    one, other = rows(6, 3, 1), rows(9, 3, 2) + 1
    both = np.concatenate([one.numpy(), other.numpy()])
    squared = ((both[:, None] - both[None]) ** 2).sum(-1)
    width = np.sort(squared.ravel())[(len(squared.ravel()) - 1) // 2]
    kernel = np.exp(-squared / (width / 2)) + np.exp(-squared / width)
    expected = kernel[:6, :6].mean() + kernel[6:, 6:].mean() - 2 * kernel[:6, 6:].mean()
    assert two_sample(one, other) == pytest.approx(expected * 54 / 15)
    assert two_sample(one, other[:0]) == 0.0


def test_labels_without_clean_examples_are_named():
    from tests.filters.planted import clean_of, handing, source

    x, y, _ = features(200)
    known, labels, _ = features(200, seed=77)
    run = Run()
    Beatrix()(handing(), source(x, y), run, clean_of(known[labels != 1], labels[labels != 1]))
    assert any("fewer than 2 clean examples" in warning and "[1]" in warning for warning in run.warnings)


def test_clean_distance_is_the_mahalanobis_distance_over_what_clean_examples_exceed():
    x, y, bad = features(300, poison=0.1)
    made = CleanDistance(false_alarms=0.05, shrinkage=0.3)
    found = judged(made, x, y)
    known, labels, _ = (value.numpy() for value in features(40 * CLASSES, seed=77))

    def distances(of: np.ndarray, of_labels: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        chosen, own = known[fitted].astype(float), labels[fitted]
        mean = np.stack([chosen[own == k].mean(0) for k in range(CLASSES)])
        off = chosen - mean[own]
        covariance = off.T @ off / len(off)
        covariance += 0.3 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        away = of.astype(float) - mean[of_labels]
        return np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away) / WIDTH

    # A fifth of each label in turn, held against the rest.
    place = np.arange(len(labels)) // CLASSES
    turn = (labels * (len(labels) // CLASSES) + place) % 5
    own = np.empty(len(labels))
    for part in range(5):
        rows = turn == part
        own[rows] = distances(known[rows], labels[rows], ~rows)
    limit = np.sort(own)[int(0.95 * len(own))]
    np.testing.assert_allclose(found.score, distances(x.numpy(), y.numpy(), np.ones(len(labels), bool)) / limit, 1e-3)
    assert torch.equal(found.suspect, found.score > 1)
    assert bool(found.suspect[bad].all())


def test_clean_distance_sees_a_single_poisoned_example():
    x, y, _ = features(300)
    x[2] += 0.4 * torch.nn.functional.one_hot(torch.tensor(7), WIDTH)
    found = judged(CleanDistance(), x, y)
    assert int(found.score.argmax()) == 2
    assert bool(found.suspect[2])
    assert float(found.suspect.double().mean()) < 0.05
    assert found.flagged is None


def test_clean_distance_leaves_labels_without_clean_examples_alone():
    x, y, _ = features(100)
    known, labels, _ = features(200, seed=77)
    run = Run()
    found = CleanDistance()(handing(), source(x, y), run, clean_of(known[labels != 1], labels[labels != 1]))
    assert bool((found.score[y == 1] == 0).all())
    assert any("without a clean example" in warning and "[1]" in warning for warning in run.warnings)
    with pytest.raises(DataError, match="at least 2"):
        CleanDistance()(handing(), source(x, y), Run(), clean_of(known[:1], labels[:1]))


@pytest.mark.parametrize("bad", [{"false_alarms": 0.0}, {"false_alarms": 1.0}, {"shrinkage": 0.0}])
def test_clean_distance_refuses_settings(bad):
    with pytest.raises(SettingError, match=next(iter(bad))):
        CleanDistance(**bad)


def test_union_takes_out_what_any_of_its_filters_would():
    x, y, bad = features(600, poison=0.1)
    x[1] += 0.4 * torch.nn.functional.one_hot(torch.tensor(3), WIDTH)  # alone in its label, so no crowd
    scan, distance = judged(SCAn(), x, y), judged(CleanDistance(), x, y)
    run = Run()
    found = judged(Union(), x, y, run=run)
    crowd = scan.suspect & torch.isin(y, torch.tensor(scan.flagged))
    assert bool(crowd[bad].all())
    assert not crowd[1]
    assert torch.equal(found.suspect, crowd | distance.suspect)
    assert bool(found.suspect[1])
    assert (found.flagged, found.confined, found.decides) == (scan.flagged, False, False)
    assert found.statistic == scan.statistic
    lower = torch.stack([(one.score[None] < one.score[:, None]).double().mean(1) for one in (scan, distance)]).amax(0)
    torch.testing.assert_close(found.score, crowd.double() + distance.suspect.double() + lower)
    assert run.notes["filters"]["clean-distance"]["taken_out"] == int(distance.suspect.sum())


def test_union_of_filters_that_decide_decides():
    x, y, _ = features(300)
    found = judged(Union(filters=("scan", "beatrix")), x, y)
    assert (found.flagged, found.decides) == ((), True)
    assert Union(filters=("spectre", "spectral-signatures")).needs_clean is False
    assert Union(filters=("spectre", "beatrix")).needs_clean is True


@pytest.mark.parametrize("names", [("scan",), ("scan", "scan"), ("scan", "union"), ("scan", "scann")])
def test_union_refuses_names(names):
    with pytest.raises(SettingError):
        Union(filters=names)
