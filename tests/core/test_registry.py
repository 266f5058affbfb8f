"""Finding methods by name."""

from __future__ import annotations

import pytest

from bezoar.core.errors import SettingError
from bezoar.core.registry import KINDS, find, method_name, methods
from bezoar.purifiers.unlearn import Unlearn
from bezoar.scanners.neural_cleanse import NeuralCleanse


def test_finds_by_name():
    assert find("scanners", "neural-cleanse") is NeuralCleanse
    assert find("purifiers", "unlearn") is Unlearn


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("neural-clense", "'neural-cleanse'"),
        ("zzz", "There are: additive-inversion, evolutionary-search, low-cost-neural-cleanse, neural-cleanse"),
    ],
)
def test_unknown_name_gets_a_suggestion(name, wanted):
    with pytest.raises(SettingError, match=f"no method '{name}' among the scanners") as caught:
        find("scanners", name)
    assert wanted in caught.value.hint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NeuralCleanse", "neural-cleanse"),
        ("SIG", "sig"),
        ("Unlearn", "unlearn"),
        ("BadNets", "bad-nets"),
        ("InputAware", "input-aware"),
    ],
)
def test_names_are_kebab_case(name, expected):
    assert method_name(type(name, (), {})) == expected


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("BadNets", "badnets", "badnets"),
        ("WaNet", "wanet", "wanet"),
        ("FTrojan", "ftrojan", "ftrojan"),
        ("LIRA", "lira", "lira"),
        ("InputAware", "input_aware", "input-aware"),
        ("NeuralCleanse", "neural_cleanse", "neural-cleanse"),
        ("BadNets", "patches", "bad-nets"),
    ],
)
def test_a_file_of_the_same_name_says_where_words_end(name, file, expected):
    assert method_name(type(name, (), {"__module__": f"bezoar.attacks.{file}"})) == expected


def test_methods_are_sorted_and_complete():
    for kind in KINDS:
        assert list(methods(kind)) == sorted(methods(kind))
    assert {"finetune", "unlearn"} <= set(methods("purifiers"))
    assert {"badnets", "blend", "sig"} <= set(methods("attacks"))


def test_base_classes_are_no_methods():
    assert not {"purifier", "scanner", "poison-attack", "method"} & {n for kind in KINDS for n in methods(kind)}
