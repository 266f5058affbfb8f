import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bezoar.io.data import load_data
from tests.io.hostile_data import CASES, MARKER, Case, npz


def _files(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "Parquet" in case.name:
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    working = tmp_path / "working"
    working.mkdir()
    (tmp_path / "data").mkdir()
    source = case.build(tmp_path / "data")
    monkeypatch.chdir(working)
    before = _files(tmp_path)
    tracemalloc.start()
    with pytest.raises(case.error) as caught:
        load_data(source, **{"num_classes": None, "size": None, "channels": None, **case.kwargs})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert case.fragment in str(caught.value)
    assert caught.value.hint
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _files(tmp_path) == before, "it left files"
    assert MARKER not in str(_files(tmp_path)), "code ran"
    assert peak < 100 << 20


def test_the_markers_would_show(tmp_path: Path) -> None:
    """The marker cases can fail: numpy with pickles allowed does run the code."""
    case = next(c for c in CASES if c.name == "npz of pickled objects")
    with np.load(case.build(tmp_path), allow_pickle=True) as archive, pytest.raises((TypeError, ValueError, Exception)):
        _ = archive["x"].shape
        raise ValueError
    assert (tmp_path / MARKER).exists()


def test_permission_denied(tmp_path: Path) -> None:
    file = npz(tmp_path, x=np.zeros((4, 2, 2), np.uint8), y=np.arange(4) % 2)
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("runs as root, who may read everything")
    with pytest.raises(CASES[0].error, match="cannot open"):
        load_data(file, num_classes=None, size=None, channels=None)
