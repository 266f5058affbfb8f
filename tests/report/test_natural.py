"""What the reports say of a trigger that may be natural."""

import dataclasses

import pytest

from bezoar.core.results import Figure, Report
from bezoar.report.text import summary
from bezoar.report.wording import natural
from tests.report import samples


def told(value: float) -> Report:
    report = dataclasses.replace(samples.backdoored(), verdict="inconclusive", target=None)
    figure = Figure(name="transfer to a student", value=value, bound=1.0, passed=value < 1, meaning="")
    return dataclasses.replace(
        report, rule=dataclasses.replace(report.rule, figures=(*report.rule.figures, figure)), summary="", cleaning=None
    )


@pytest.mark.parametrize(("value", "advice"), [(1.3, True), (0.2, False)])
def test_summary_names_a_natural_trigger(value, advice):
    text = " ".join(summary(told(value), 100).split())
    assert f"Natural {value}" in text
    assert ("may be a natural feature" in text) == advice


def test_without_a_second_look_nothing_is_said():
    assert natural(samples.backdoored()) is None
    assert natural(told(float("nan"))) is None
    assert "Natural" not in summary(samples.backdoored(), 100)
