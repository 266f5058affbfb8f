"""Reports on disk: the round trip, damage, and files that appear whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezoar.core.errors import DataError
from bezoar.core.results import (
    SCHEMA,
    Cleaning,
    DataFacts,
    Example,
    Figure,
    LabelEvidence,
    LayerChange,
    ModelFacts,
    Preflight,
    Report,
    Rule,
    RunFacts,
    SeedResult,
    TriggerFacts,
    write_atomic,
)

FIGURE = Figure(name="size ratio", value=0.25, bound=0.4, passed=True, meaning="small is suspect")
REPORT = Report(
    verdict="backdoored",
    target=1,
    summary="",
    model=ModelFacts(
        path="m.pt",
        format="state-dict",
        sha256="ab",
        arch="wrn-16-1",
        parameters=5,
        num_classes=2,
        channels=3,
        height=4,
        width=4,
        mean=(0.5,),
        std=(0.25,),
    ),
    data=DataFacts(path="d", format="folder", sha256="cd", count=4, per_class=(2, 2), names=("a", "b")),
    preflight=Preflight(acc=0.9, chance=0.5, count=4),
    method="neural-cleanse",
    config={"seeds": 2, "lr": 0.2, "mode": "fast", "labels": []},
    rule=Rule(name="r", text="t", calibration="c", figures=(FIGURE,)),
    labels=(
        LabelEvidence(
            label=1, name="b", size=2.0, sizes=(2.0, None), fraction=0.1, asr=1.0, index=3.5, status="complete"
        ),
    ),
    seeds=(SeedResult(seed=0, verdict="inconclusive", target=None, figures=(FIGURE,)),),
    triggers=(
        TriggerFacts(
            label=1,
            name="b",
            seed=0,
            size=2.0,
            fraction=0.1,
            asr=1.0,
            mask="x",
            pattern="y",
            stamp="z",
            examples=(Example(original="o", stamped="s", true=0, before=0, after=1),),
        ),
    ),
    cleaning=Cleaning(
        method="unlearn",
        config={"lr": 0.1},
        target=1,
        acc_before=0.9,
        acc_after=0.8,
        asr_before=1.0,
        asr_after=None,
        held_out=2,
        layers=(LayerChange(name="w", relative=0.5),),
    ),
    warnings=("few images",),
    run=RunFacts(
        created="2020-01-01", seconds={"scan": 1.5}, image_gradients=7, versions={"torch": "2"}, device="cpu", threads=1
    ),
)


def test_round_trip():
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_round_trip_of_a_purification_alone():
    alone = replace(REPORT, verdict=None, target=None, rule=None, labels=(), seeds=(), triggers=())
    assert Report.from_json(alone.to_json()) == alone


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_json_cannot_hold_becomes_null(value):
    labels = (replace(REPORT.labels[0], index=value, sizes=(value,)),)
    text = replace(REPORT, labels=labels, config={"x": [value]}).to_json()
    raw = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["labels"][0]["index"] is None
    assert raw["labels"][0]["sizes"] == [None]
    assert raw["config"]["x"] == [None]
    read = Report.from_json(text)
    assert read.labels[0].index != read.labels[0].index
    assert read.labels[0].sizes == (None,)
    assert read.to_json() == text


def test_stable_leaves_out_only_the_run():
    other = replace(REPORT, run=replace(REPORT.run, created="2021-01-01", image_gradients=1))
    assert other.stable() == REPORT.stable()
    assert replace(REPORT, target=0).stable() != REPORT.stable()
    assert set(json.loads(REPORT.to_json())) - set(REPORT.stable()) == {"run"}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"schema": "bezoar.report/0"}', "[" * 100_000])
def test_text_that_is_no_report(text):
    with pytest.raises(DataError, match=r"not a report|expected a report of schema"):
        Report.from_json(text)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, one in inner for p in places(one, (*path, key)))]


RAW = json.loads(REPORT.to_json())
PLACES = [p for p in places(RAW) if p]


def damaged(path: tuple[Any, ...], change: Any) -> str:
    raw = copy.deepcopy(RAW)
    at = raw
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return json.dumps(raw)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(st.sampled_from(PLACES), junk)
def test_damage_is_an_error_or_harmless(path, value):
    """Whatever stands anywhere: a report that can be written again, or a DataError."""
    text = damaged(path, lambda at, key: at.__setitem__(key, value))
    try:
        read = Report.from_json(text)
    except DataError:
        return
    assert Report.from_json(read.to_json()).to_json() == read.to_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), None),
        (("model", "parameters"), "5"),
        (("target",), "1"),
        (("target",), True),
        (("verdict",), "fine"),
        (("labels",), {"0": 1}),
        (("labels", 0), 3),
        (("labels", 0, "size"), "large"),
        (("warnings",), "one text"),
        (("rule", "figures", 0, "passed"), 1),
        (("run", "seconds"), [1.0]),
        (("run", "seconds", "scan"), 10**400),
        (("data", "names"), [1, 2]),
    ],
)
def test_damage_is_found(path, value):
    with pytest.raises(DataError, match="damaged"):
        Report.from_json(damaged(path, lambda at, key: at.__setitem__(key, value)))


@pytest.mark.parametrize("path", [("model",), ("run",), ("labels", 0, "asr"), ("cleaning", "acc_before")])
def test_missing_entry_is_found(path):
    with pytest.raises(DataError, match=path[-1]):
        Report.from_json(damaged(path, lambda at, key: at.pop(key)))


@pytest.mark.parametrize("path", [("surprise",), ("labels", 0, "surprise")])
def test_unknown_entry_is_found(path):
    with pytest.raises(DataError, match="surprise"):
        Report.from_json(damaged(path, lambda at, key: at.__setitem__(key, 1)))


def test_schema_is_named():
    assert RAW["schema"] == SCHEMA


# Files


@pytest.mark.parametrize("content", ["text \u00e9\n", b"\x00\xff"])
def test_writes_the_whole_content(content, tmp_path: Path):
    write_atomic(tmp_path / "new" / "folder" / "file", content)
    found = (tmp_path / "new" / "folder" / "file").read_bytes()
    assert found == (content if isinstance(content, bytes) else content.encode())
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["file"]


def test_replaces_and_has_the_usual_permissions(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    mask = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "new")
        assert os.umask(0o027) == 0o027, "the umask is that of the caller again"
    finally:
        os.umask(mask)
    assert (tmp_path / "file").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("function", ["replace", "chmod", "fdopen"])
def test_leaves_nothing_behind_when_it_fails(function, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, function, broken)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomic(tmp_path / "file", "new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", "new")
    assert list(tmp_path.iterdir()) == []
