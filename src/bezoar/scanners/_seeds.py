"""Pieces of a search, its seeds or its labels, one after the other or side by side, with the same outcome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from bezoar.core.evidence import SeedScan
from bezoar.core.exec import Serial
from bezoar.core.method import Clean, own_randomness
from bezoar.core.run import Run
from bezoar.core.surgery import frozen

#: Labels to look at, and those of them that median and MAD are taken from.
Wanted = tuple[list[int], list[int]]


class Search(Protocol):
    """A scanner whose seeds can be looked at one by one."""

    def look(self, model: nn.Module, clean: Clean, run: Run, seed: int, wanted: Wanted) -> SeedScan:
        """One seed."""
        ...


@dataclass(frozen=True)
class Scene:
    """What all pieces of a search share.

    Attributes:
        model: Frozen and in eval mode.
        clean: Clean examples.
        run: Where it runs, and time; in another process without a user to tell of progress.
        threads: CPU threads of the caller: with as many, sums come out the same.
    """

    model: nn.Module
    clean: Clean
    run: Run
    threads: int

    @classmethod
    def of(cls, model: nn.Module, clean: Clean, run: Run) -> Scene:
        """For the executor of a run: a copy that can travel, where its pieces run in other processes."""
        return cls(model, clean, run.elsewhere() if run.executor.away else run, torch.get_num_threads())

    @contextmanager
    def entered(self, away: bool) -> Iterator[tuple[nn.Module, Run]]:
        """Model and run, ready to use in the process of a piece; a run of a piece elsewhere counts for itself."""
        if not away:
            yield self.model, self.run
            return
        torch.set_num_threads(self.threads)
        run = self.run.resumed()
        with frozen(self.model.to(run.device)) as model, own_randomness(run):
            yield model, run


def look_for_all(
    search: Search, model: nn.Module, clean: Clean, run: Run, seeds: Iterable[int], wanted: Wanted, apart: bool = True
) -> list[SeedScan]:
    """Look with several seeds, none of which needs to know what another found.

    Args:
        search: The scanner.
        model: Frozen and in eval mode.
        clean: Clean examples.
        run: Where it runs, and time; gets what the seeds took. No further seed is begun when the time is over.
        seeds: In order.
        wanted: Labels to look at.
        apart: Whether seeds are the pieces for the run's executor; else they run here, and the search has pieces of
            its own.

    Returns:
        What each found, in the order of the seeds.
    """
    executor = run.executor if apart else Serial()
    scene = Scene.of(model, clean, run) if executor.away else Scene(model, clean, run, 0)
    found: list[SeedScan] = []
    with closing(executor.map(_look, (search, scene, wanted, executor.away), _begun(run, seeds))) as results:
        for seed, (scan, gradients, spent) in results:
            found.append(scan)
            run.progress.seed_done()
            if executor.away:
                run.image_gradients += gradients
                run.budget_spent |= spent
                run.progress.step(seed, 0, 1, f"seed {seed} is done")
    return sorted(found, key=lambda scan: scan.seed)


def _begun(run: Run, seeds: Iterable[int]) -> Iterator[int]:
    for seed in seeds:
        if seed != run.seed and run.spendable <= 0:
            run.budget_spent = True
            return
        yield seed


def _look(shared: tuple[Search, Scene, Wanted, bool], seed: int) -> tuple[SeedScan, int, bool]:
    search, scene, wanted, away = shared
    with scene.entered(away) as (model, run):
        return search.look(model, scene.clean, run, seed, wanted), run.image_gradients, run.budget_spent
