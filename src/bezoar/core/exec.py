"""Where pieces of work run: here, in threads of this process, or on a Ray cluster (:mod:`bezoar.core.cluster`).

A piece is a function of the module's top level, what all pieces share, and an item. It carries its own seed and changes
nothing that is shared, so neither order nor place of the pieces changes a result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Protocol, TypeVar

from bezoar.core.errors import SettingError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
#: The result of an item whose workers were lost too often, given the reason.
Lost = Callable[[Any, str], Any]


class Executor(Protocol):
    """Runs pieces of work.

    Attributes:
        away: Whether pieces run in other processes: what they share is then copied, and cannot tell of progress.
    """

    @property
    def away(self) -> bool:
        """See above."""
        ...

    def map(
        self,
        fn: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[Item],
        lost: Lost | None = None,
    ) -> Generator[tuple[Item, Result], None, None]:
        """Run ``fn(shared, item)`` for each item.

        Args:
            fn: A function of a module's top level.
            shared: Sent once; not to be changed.
            items: Drawn as room becomes free, never all at once.
            lost: Makes a result of an item whose workers were lost too often; an error by default.

        Yields:
            Each item and its result, as they finish. An error of ``fn`` ends the rest, as does closing the generator.
        """
        ...


@dataclass(frozen=True)
class Serial:
    """One piece after the other, in this thread."""

    away: ClassVar[bool] = False

    def map(
        self,
        fn: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[Item],
        lost: Lost | None = None,
    ) -> Generator[tuple[Item, Result], None, None]:
        """See :class:`Executor`."""
        del lost
        for item in items:
            yield item, fn(shared, item)


@dataclass(frozen=True)
class Threads:
    """Several pieces at a time in threads: for those that wait for a process of their own.

    A piece is to ask :func:`nobody_waits` now and then, and to end early where nobody does.

    Args:
        workers: Pieces at a time.
    """

    workers: int
    away: ClassVar[bool] = False

    def map(
        self,
        fn: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[Item],
        lost: Lost | None = None,
    ) -> Generator[tuple[Item, Result], None, None]:
        """See :class:`Executor`."""
        del lost
        stop = threading.Event()
        source = iter(items)
        running: dict[Future[Result], Item] = {}
        pool = ThreadPoolExecutor(self.workers, initializer=_told_by, initargs=(stop,))
        try:
            while True:
                for item in islice(source, self.workers - len(running)):
                    running[pool.submit(fn, shared, item)] = item
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


_HERE = threading.local()


def _told_by(stop: threading.Event) -> None:
    _HERE.stop = stop


def nobody_waits() -> bool:
    """Whether the piece that runs in this thread is to end early."""
    stop: threading.Event | None = getattr(_HERE, "stop", None)
    return stop is not None and stop.is_set()


@contextmanager
def executor(ray: str = "", *, cpus: int = 1, gpus: float = 0.0, workers: int = 1) -> Iterator[Executor]:
    """The executor that a user asked for, until the block ends.

    Args:
        ray: ``local`` for a Ray of our own on this machine, ``auto`` for the cluster that runs here, the address of a
            cluster, or empty for none.
        cpus, gpus: What a piece takes, for Ray.
        workers: Pieces at a time without Ray: more than one run in threads.

    Raises:
        MissingExtra: Ray is not installed.
        ClusterError: The cluster cannot be reached.
    """
    if not ray:
        yield Serial() if workers == 1 else Threads(workers)
        return
    if workers != 1:
        raise SettingError("a number of workers and a Ray cluster exclude each other", "Ray knows how many it has")
    from bezoar.core.cluster import Cluster

    cluster = Cluster(ray, cpus=cpus, gpus=gpus)
    try:
        yield cluster
    finally:
        cluster.close()
