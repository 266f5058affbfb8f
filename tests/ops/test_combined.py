"""Several sources of evidence as one p-value: against independent computations, and on made-up nets."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.trigger import MaskedTrigger
from bezoar.evidence import COMBINED, CONCENTRATION, MASKS
from bezoar.ops.combined import (
    CLEAN,
    PAIRS,
    CleanNet,
    Tail,
    apart,
    clean_nets,
    clean_sources,
    combine,
    concentration,
    label_scores,
    spread,
    verdict,
)

TRIGGER = MaskedTrigger(torch.zeros(1, 10, 10), torch.zeros(3, 10, 10))
SOURCES = ("masks", "margin")


def found(size: float, status: str = "complete") -> LabelScan:
    return LabelScan(size, 1.0, status, True, TRIGGER)


def made_up(generator: np.random.Generator, labels: int = 10) -> dict[str, dict[int, float]]:
    """A clean net: two sources that see the same thing in part."""
    shared = generator.normal(size=labels)
    return {
        source: dict(enumerate((scale * (shared + generator.normal(size=labels))).tolist()))
        for source, scale in zip(SOURCES, (1.0, 0.2), strict=True)
    }


def reference(count: int = 40, labels: int = 10, seed: int = 1) -> list[CleanNet]:
    generator = np.random.default_rng(seed)
    nets = [made_up(generator, labels) for _ in range(count)]
    return [CleanNet(f"net-{n}", {s: tuple(one[s].values()) for s in SOURCES}) for n, one in enumerate(nets)]


def test_apart_is_over_the_foremost_of_the_others_in_units_of_their_spread():
    values = np.asarray([1.0, 4.0, 2.0, 10.0])
    # Of the last: the others are 1, 4 and 2, median 2, deviations 1, 2 and 0.
    width = math.sqrt((3 * 1.4826**2 + 3 * 0.5**2) / 6)
    assert [apart(values, 0.5, rank)[3] for rank in (1, 2, 3)] == pytest.approx([6 / width, 8 / width, 9 / width])
    assert spread(np.asarray([1.0, 2.0, 4.0])) == pytest.approx(1.4826)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12), st.floats(-3, 3), st.floats(0.1, 4))
def test_apart_does_not_depend_on_the_scale(values, shift, scale):
    given_ = np.asarray(values)
    assert apart(scale * given_ + shift, scale * 0.7) == pytest.approx(apart(given_, 0.7), abs=1e-6)


def test_search_as_scores():
    scan = Scan((SeedScan(0, {0: found(20.0), 1: found(5.0), 2: found(10.0), 3: found(1.0, "failed")}, True),), 4, 100)
    scores = label_scores(scan)
    assert scores.labels[1] == pytest.approx(math.log(10 / 5))
    assert scores.labels[0] == pytest.approx(math.log(5 / 20))
    assert scores.labels[3] == 0.0  # small, but it never worked
    assert (scores.model, scores.leader) == (pytest.approx(math.log(2)), 1)


def test_search_as_scores_takes_the_median_over_seeds():
    sizes = (2.0, 5.0, 8.0)
    seeds = tuple(SeedScan(n, {0: found(10.0), 1: found(10.0), 2: found(s)}, True) for n, s in enumerate(sizes))
    assert label_scores(Scan(seeds, 3, 100)).labels[2] == pytest.approx(math.log(10 / 5))


def masked(*places: tuple[int, int], status: str = "complete") -> LabelScan:
    """A trigger with a pixel at each place of a 28 x 28 image."""
    mask = torch.zeros(1, 28, 28)
    for row, column in places:
        mask[0, row, column] = 1
    return LabelScan(float(len(places)), 1.0, status, True, MaskedTrigger(mask, torch.zeros(1, 28, 28)))


def test_concentration_is_the_share_of_the_densest_window():
    spread_out = [(0, 0), (0, 20), (20, 0), (20, 20)]
    labels = {
        0: masked((5, 5), (5, 10), (10, 5), (10, 10)),  # all four in a window of 6 x 6
        1: masked((5, 5), (5, 11), (11, 5), (11, 11)),  # one apart by a pixel: a quarter
        2: masked(*spread_out),
        3: masked((5, 5), (5, 6), status="failed"),
        4: masked((3, 3), (4, 4), (20, 20), (0, 20)),  # a half
    }
    scores = concentration(Scan((SeedScan(0, labels, True),), 5, 784)).labels
    assert scores[0] == pytest.approx(math.log(1 / math.sqrt(0.25 * 0.5)))  # of the others' 0.25, 0.25, 0.5 and 1
    assert scores[1] == pytest.approx(math.log(0.25 / math.sqrt(0.5)))
    assert scores[4] == pytest.approx(math.log(0.5 / math.sqrt(0.25)))
    assert scores[3] == 0.0  # it never worked


def test_surprise_counts_in_the_bulk_and_is_exponential_beyond():
    values = np.arange(1.0, 101.0)
    tail = Tail(values)
    assert tail.surprise(np.asarray([50.5]))[0] == pytest.approx(-math.log10(51 / 101))
    bound = float(np.quantile(values, 0.9))  # 90.1: ten values lie beyond, 5.4 further in the mean
    expected = -math.log10(10 / 100) + (150 - bound) / 5.4 * math.log10(math.e)
    assert tail.surprise(np.asarray([150.0]))[0] == pytest.approx(expected)


@given(st.lists(st.floats(-5, 5), min_size=20, max_size=60, unique=True), st.floats(-8, 20), st.floats(0, 5))
def test_surprise_grows(values, value, more):
    tail = Tail(np.asarray(values))
    low, high = tail.surprise(np.asarray([value, value + more]))
    assert high >= low - 0.03  # where counting ends and the tail begins


def test_pvalues_of_clean_nets_are_as_small_as_they_should_be():
    generator = np.random.default_rng(2)
    references = [reference(seed=10 + n) for n in range(5)]
    values = np.asarray([combine(made_up(generator), references[n % 5]).pvalue for n in range(120)])
    assert (values <= 0.01).mean() <= 0.03
    assert (values <= 0.05).mean() <= 0.1
    assert 0.25 < (values <= 0.5).mean() < 0.6


def test_planted_label_is_named():
    nets = reference()
    one = made_up(np.random.default_rng(3))
    one["masks"][4] += 12.0
    one["margin"][4] += 2.4
    whole = combine(one, nets)
    assert whole.target == 4
    assert whole.pvalue < 0.01
    assert whole.clean_nets == 40
    assert whole.labels[4] == pytest.approx(sum(whole.surprises[s][4] for s in SOURCES))
    weaker = combine({"masks": one["masks"]}, nets)
    assert whole.labels[4] > weaker.labels[4]


def test_many_labels_give_no_more_false_alarms():
    generator = np.random.default_rng(4)
    values = np.asarray([combine(made_up(generator, 60), reference()).pvalue for _ in range(60)])
    assert (values <= 0.05).mean() <= 0.1


def test_several_infected_labels_do_not_hide_each_other():
    one = made_up(np.random.default_rng(3))
    for label in (2, 4, 7):
        one["masks"][label] += 20.0
        one["margin"][label] += 4.0
    whole = combine(one, reference())
    assert whole.target in (2, 4, 7)
    assert whole.pvalue < 0.05


def test_only_wanted_labels_are_named():
    one = made_up(np.random.default_rng(3))
    one["masks"][4] += 8.0
    assert combine(one, reference(), wanted=(1, 2)).target in (1, 2)


def test_unknown_source():
    with pytest.raises(ValueError, match="measured with margin, other"):
        combine({"margin": {0: 1.0, 1: 2.0}, "other": {0: 1.0, 1: 2.0}}, reference())
    with pytest.raises(ValueError, match="no source"):
        combine({}, reference())


@pytest.mark.parametrize(
    ("pvalue", "fpr", "alone", "expected"),
    [
        (0.01, 0.01, "clean", "backdoored"),
        (0.02, 0.01, "clean", "inconclusive"),
        (CLEAN, 0.01, "clean", "inconclusive"),
        (0.11, 0.01, "inconclusive", "inconclusive"),
        (0.11, 0.01, "clean", "clean"),
        (0.11, 0.01, "backdoored", "inconclusive"),
        (0.15, 0.2, "clean", "backdoored"),
        (0.25, 0.2, "clean", "clean"),
    ],
)
def test_verdict(pvalue, fpr, alone, expected):
    assert verdict(pvalue, fpr, alone) == expected


def test_clean_nets_of_the_package():
    nets = clean_nets()
    searches = {MASKS, CONCENTRATION, "additive-inversion"}
    assert len(nets) >= 60
    for net in nets:
        assert searches <= set(net.scores) <= searches | {PAIRS, *COMBINED}
        assert len({len(values) for values in net.scores.values()}) == 1
    assert sum(set(COMBINED) <= set(net.scores) for net in nets) >= 20
    assert sum(PAIRS in net.scores for net in nets) >= 40
    assert clean_sources() == searches | {PAIRS, *COMBINED}


def test_a_source_that_few_clean_nets_know_takes_no_part(monkeypatch):
    nets = [CleanNet(str(n), {"a": (0.0, 1.0)} | ({"b": (0.0, 1.0)} if n < 19 else {})) for n in range(20)]
    monkeypatch.setattr("bezoar.ops.combined.clean_nets", lambda: tuple(nets))
    assert clean_sources() == {"a"}


def paired(net: CleanNet, generator: np.random.Generator) -> CleanNet:
    return dataclasses.replace(net, scores=net.scores | {PAIRS: tuple(generator.gumbel(0.2, 0.05, 10))})


def test_pairs_are_held_against_the_largest_of_clean_nets():
    generator = np.random.default_rng(11)
    nets = [paired(net, generator) for net in reference()]
    bare = {label: 0.1 for label in range(10)}
    one = made_up(generator)
    before = combine(one, nets)
    # All labels are targets: none stands out, and the score itself tells.
    every = combine(one | {PAIRS: dict.fromkeys(range(10), 2.0)}, nets)
    assert every.pvalue < 0.01
    single = combine(one | {PAIRS: bare | {7: 2.0}}, nets)
    assert (single.target, single.pvalue) == (7, every.pvalue)
    assert max(single.labels, key=single.labels.__getitem__) == 7
    nothing = combine(one | {PAIRS: bare}, nets)
    assert (nothing.target, nothing.pvalue) == (before.target, pytest.approx(min(1.0, before.pvalue / 0.75)))
    assert combine(one | {PAIRS: bare | {7: 2.0}}, nets, wanted=(1, 2)).target in (1, 2)


def test_pairs_of_clean_nets_give_as_many_small_pvalues_as_promised():
    generator = np.random.default_rng(12)
    nets = [paired(net, generator) for net in reference()]
    values = []
    for _ in range(150):
        scores = dict(enumerate(generator.gumbel(0.2, 0.05, 10).tolist()))
        values.append(combine(made_up(generator) | {PAIRS: scores}, nets).pvalue)
    assert np.mean(np.asarray(values) <= 0.1) <= 0.15


def test_pairs_alone_have_the_whole_rate():
    generator = np.random.default_rng(13)
    nets = [paired(net, generator) for net in reference()]
    pairs = {PAIRS: {label: 0.1 for label in range(10)} | {3: 0.5}}
    alone, beside = combine(pairs, nets), combine(made_up(generator) | pairs, nets)
    assert (alone.target, alone.clean_nets) == (3, 40)
    assert beside.pvalue == pytest.approx(4 * alone.pvalue)


def test_pairs_need_clean_nets_of_their_own():
    with pytest.raises(ValueError, match="measured with source-specific"):
        combine(made_up(np.random.default_rng(1)) | {PAIRS: {0: 1.0}}, reference())
