"""Child processes under limits: killed with all that they started, and their last words kept."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from bezoar.core.child import Ended, run_child
from bezoar.core.claims import Claims
from bezoar.core.exec import Threads

LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


def python(code: str, given: bytes = b"", **limits: float) -> Ended:
    return run_child([sys.executable, "-S", "-c", code], given, **{"seconds": 60, **limits})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_ends_well():
    ended = python("import sys; assert sys.stdin.readline() == 'job\\n'", b"job")
    assert (ended.reason, ended.killed, ended.code) == ("", "", 0)
    assert 0 < ended.seconds < 60


def test_code_and_last_words():
    ended = python("import sys; sys.stderr.write('x' * 5000 + 'last'); sys.exit(7)")
    assert (ended.reason, ended.code) == ("left with code 7", 7)
    assert len(ended.words) == 2000
    assert ended.words.endswith("last")


def test_a_signal_is_named():
    assert python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").reason == "died of SIGSEGV"


@LINUX
def test_a_hanging_child_is_killed_with_what_it_started(tmp_path):
    code = f"""
import subprocess, sys, time
other = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])
open({str(tmp_path / "pid")!r}, 'w').write(str(other.pid))
time.sleep(600)"""
    ended = python(code, seconds=1.5)
    assert (ended.killed, ended.reason) == ("time", "killed at the limit of 1.5 seconds")
    assert ended.seconds < 10
    time.sleep(0.2)
    assert not alive(int((tmp_path / "pid").read_text()))


@LINUX
def test_what_a_child_leaves_behind_is_killed_too(tmp_path):
    code = f"""
import subprocess, sys
other = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])
open({str(tmp_path / "pid")!r}, 'w').write(str(other.pid))"""
    assert python(code).reason == ""
    time.sleep(0.2)
    assert not alive(int((tmp_path / "pid").read_text()))


@LINUX
def test_memory_limit():
    ended = python("x = []\nwhile True: x.append(bytearray(10 << 20)); import time; time.sleep(0.01)", memory_mib=200)
    assert (ended.killed, ended.reason) == ("memory", "killed at the limit of 200 MiB of memory")
    assert 200 < ended.peak_mib < 2000


@LINUX
def test_cpu_time_is_told():
    ended = python("import time\nt = time.process_time()\nwhile time.process_time() < t + 0.6: pass\ntime.sleep(0.3)")
    assert 0.4 < ended.cpu_seconds < 2


def test_a_child_ends_when_nobody_waits():
    with closing(Threads(2).map(_piece, None, [0, 1])) as results:
        next(results)
        started = time.monotonic()
    assert time.monotonic() - started < 20


def _piece(_shared: None, item: int) -> str:
    return python(f"import time; time.sleep({600 * item})", seconds=500).killed


def test_claims_keep_others_off(tmp_path):
    mine, other = Claims(tmp_path / "locks"), Claims(tmp_path / "locks")
    assert mine.take("a")
    assert not other.take("a")
    assert other.take("b")
    mine.release("a")
    assert other.take("a")
    other.release_all()
    assert list((tmp_path / "locks").iterdir()) == []


def test_claims_end_with_their_process(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from bezoar.core.claims import Claims
claims = Claims(Path({str(tmp_path)!r}))
assert claims.take('a')
print('taken', flush=True)
time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"taken\n"
            claims = Claims(tmp_path)
            assert not claims.take("a")
        finally:
            child.kill()
    assert claims.take("a")
    claims.release("a")


def test_claims_under_contention(tmp_path):
    held, clashes = threading.Lock(), []

    def compete() -> None:
        for _ in range(100):
            claims = Claims(tmp_path)
            if claims.take("a"):
                if not held.acquire(blocking=False):
                    clashes.append(os.getpid())
                else:
                    held.release()
                claims.release("a")

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
