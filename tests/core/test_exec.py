"""Pieces of work in this process: as they finish, no more than asked for, and told when nobody waits."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import closing

import pytest

from bezoar.core.errors import MissingExtra, SettingError
from bezoar.core.exec import Serial, Threads, executor, nobody_waits


def _double(shared: int, item: int) -> int:
    return shared * item


def _nap(shared: float, item: int) -> int:
    time.sleep(shared * item)
    return item


def _fail_at(shared: int, item: int) -> int:
    if item == shared:
        raise ValueError(f"piece {item}")
    return item


@pytest.mark.parametrize("pool", [Serial(), Threads(3)])
def test_every_item_once(pool):
    assert sorted(pool.map(_double, 2, range(20))) == [(n, 2 * n) for n in range(20)]


@pytest.mark.parametrize("pool", [Serial(), Threads(2)])
def test_an_error_of_a_piece_reaches_the_caller(pool):
    with pytest.raises(ValueError, match="piece 3"):
        list(pool.map(_fail_at, 3, range(10)))


def test_serial_draws_an_item_only_when_the_last_is_done():
    drawn = []

    def items():
        for n in range(3):
            drawn.append(n)
            yield n

    with closing(Serial().map(_double, 1, items())) as results:
        next(results)
        assert drawn == [0]


def test_threads_give_results_as_they_finish():
    assert [item for item, _ in Threads(3).map(_nap, 0.15, [3, 1, 0])] == [0, 1, 3]


def test_threads_draw_no_more_than_can_run():
    running, most, lock = [0], [0], threading.Lock()

    def count(_shared: None, item: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return item

    assert len(list(Threads(2).map(count, None, range(12)))) == 12
    assert most[0] == 2


def test_running_pieces_are_told_when_nobody_waits():
    begun, told = threading.Event(), threading.Event()

    def wait_for_it(_shared: None, item: int) -> int:
        if item:
            begun.set()
        begun.wait()
        while item and not nobody_waits():
            time.sleep(0.005)
        if item:
            told.set()
        return item

    with closing(Threads(2).map(wait_for_it, None, [0, 1])) as results:
        assert next(results) == (0, 0)
    assert told.is_set()
    assert not nobody_waits()


def test_executor_by_choice():
    with executor() as one, executor(workers=3) as three:
        assert (one, three) == (Serial(), Threads(3))
    with pytest.raises(SettingError, match="exclude"), executor("local", workers=2):
        pass


def test_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"bezoar\[ray\]"), executor("auto"):
        pass
