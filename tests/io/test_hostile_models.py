"""Every broken or hostile model gives its error, runs nothing and leaves nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bezoar.io.models import load_model
from tests.io.hostile_models import CASES, MARKER, Case


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name == "file without read permission" and os.geteuid() == 0:
        pytest.skip("root reads every file")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "given").mkdir()
    path = case.build(tmp_path / "given")
    before = _files(tmp_path)
    with pytest.raises(case.error) as caught:
        load_model(path, **case.kwargs)
    assert type(caught.value) is case.error
    assert case.fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint or caught.value.message
    assert _files(tmp_path) == before, "something was written"
    assert not list(tmp_path.rglob(MARKER)), "code of the file ran"


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 18


def test_the_marker_works(tmp_path: Path) -> None:
    """The hostile pickle does run where it may, so that its silence above means something."""
    import pickle

    case = next(case for case in CASES if case.name == "code in a plain pickle")
    pickle.loads(case.build(tmp_path).read_bytes())
    assert (tmp_path / MARKER).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from the kernel in kilobytes")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """All cases in one fresh process: the peak grows by less than 200 MB, although they claim petabytes."""
    script = """
import resource, sys, tempfile
from pathlib import Path
import torch
from bezoar.core.errors import BezoarError
from bezoar.io.models import all_readers, load_model
from tests.io.hostile_models import CASES
all_readers()
paths = []
for i, case in enumerate(CASES):
    folder = Path(sys.argv[1]) / str(i)
    folder.mkdir()
    paths.append(case.build(folder))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for case, path in zip(CASES, paths):
    try:
        load_model(path, **case.kwargs)
    except BezoarError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 200
