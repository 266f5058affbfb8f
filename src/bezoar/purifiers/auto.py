"""auto: several methods in turn, each kept only if the defender's own measurements say that it helped."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bezoar.core.errors import BezoarError
from bezoar.core.method import Clean, Purifier
from bezoar.core.registry import find
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.purifiers._choose import accuracy
from bezoar.purifiers._probe import Probe

#: Held-out images that a fall of accuracy can be read from; with fewer, all images are measured.
ENOUGH = 50


@dataclass(frozen=True, kw_only=True)
class Auto(Purifier):
    """Clean a model without choosing a method.

    First the cheap step that needs no data (CLP), kept where it costs next to no accuracy. Then repeated unlearning,
    first gently; where that costs too much accuracy more gently still, and where the model still answers to triggers
    that were inverted from the suspect before, more strongly. Each result is judged by what a defender can know,
    held-out accuracy and the response to those triggers, and the best is kept; where none is better than the model as
    it was, it stays as it was. ``notes`` say what was tried, what it measured, and what was kept.

    Args:
        epochs: Passes over the clean images of each attempt at repeated unlearning.
        tolerance: Fall of clean accuracy that is accepted for a clean model, in [0, 1].
        free: Fall of clean accuracy that a step may cost whose gain cannot be measured, in [0, 1].
        response: Success of the triggers that were inverted from the suspect model, in [0, 1]: above it, the cleaned
            model is cleaned once more and more strongly.

    References:
        Ours, after Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (the first
        step) and Wang et al., "Neural Cleanse", IEEE S&P 2019 (what is unlearned).
    """

    wants_scan = True

    epochs: int = 20
    tolerance: float = 0.03
    free: float = 0.01
    response: float = 0.3

    def __post_init__(self) -> None:
        self.require("epochs", self.epochs >= 1, "at least 1")
        for name in ("tolerance", "free", "response"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; inverted triggers, where given, join those that are measured."""
        judge = _Judge(self, model, clean, run, triggers)
        ground = judge.suspect
        clp = judge.trial("clp", {}, ground)
        if clp is not None and clp.acc >= ground.acc - self.free:
            ground = clp
        first = judge.trial(MAIN, {"epochs": self.epochs}, ground)
        if first is not None and first.acc < judge.suspect.acc - self.tolerance:
            judge.trial(MAIN, {"epochs": self.epochs, **GENTLER}, ground)
        elif first is not None and first.response > self.response:
            judge.trial(MAIN, {"epochs": self.epochs, **STRONGER}, ground)
        best = judge.best()
        run.notes.update(judge.story(best))
        _copy(best.model, model)
        return model


MAIN = "repeated-unlearning"
GENTLER: dict[str, Any] = {"share": 0.05, "distill": 5.0}
STRONGER: dict[str, Any] = {"share": 0.2, "distill": 1.0}


@dataclass(frozen=True)
class _Trial:
    """A model, how it came about, and what a defender can measure of it."""

    name: str
    model: nn.Module
    acc: float
    response: float
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "acc": round(self.acc, 4),
            "response": round(self.response, 4),
            "seconds": round(self.seconds, 1),
        }


class _Judge:
    """Tries methods and ranks the results."""

    def __init__(
        self,
        settings: Auto,
        model: nn.Module,
        clean: Clean,
        run: Run,
        triggers: dict[int, InvertedTrigger],
    ) -> None:
        self.settings, self.clean, self.run = settings, clean, run
        held = len(clean.held_x) >= ENOUGH
        self.x, self.y = (clean.held_x, clean.held_y) if held else (clean.x, clean.y)
        self.probe = Probe.of(model, clean, run, triggers, self.x, self.y)
        # Methods must not see what judges them.
        self.own = dataclasses.replace(clean, held_x=clean.x[:0], held_y=clean.y[:0])
        self.suspect = self._measured("none", copy.deepcopy(model), 0.0)
        self.trials = [self.suspect]
        self.skipped: list[str] = []

    def trial(self, name: str, settings: dict[str, Any], start: _Trial) -> _Trial | None:
        """Apply a method to a copy of an earlier result; None where it refused or there is no time for it."""
        label = " ".join([name, *(f"{k}={v}" for k, v in settings.items())])
        known = max((t.seconds for t in self.trials if name in t.name), default=0.0)
        if name != "clp" and self.run.spendable < known:  # which takes no time to speak of
            self.run.budget_spent = True
            self.skipped.append(f"{label}: no time left")
            return None
        began = time.monotonic()
        run = dataclasses.replace(self.run, notes={}, warnings=[])
        try:
            made = find("purifiers", name)(**settings)(copy.deepcopy(start.model), self.own, run)
        except BezoarError as error:
            self.skipped.append(f"{label}: {error.message}")
            return None
        self.run.image_gradients = run.image_gradients
        path = label if start is self.suspect else f"{start.name} + {label}"
        found = self._measured(path, made, time.monotonic() - began)
        self.trials.append(found)
        return found

    def _measured(self, name: str, model: nn.Module, seconds: float) -> _Trial:
        return _Trial(name, model, accuracy(model, self.x, self.y), self.probe.response(model, self.run), seconds)

    def merit(self, trial: _Trial) -> float:
        """What the response fell, less what the accuracy fell; beyond the tolerance that counts five times."""
        loss = max(0.0, self.suspect.acc - trial.acc)
        beyond = max(0.0, loss - self.settings.tolerance)
        return self.suspect.response - trial.response - loss - 4 * beyond

    def best(self) -> _Trial:
        """The trial of the highest merit; the first of equals, so the model as it was where nothing helped."""
        return max(self.trials, key=self.merit)

    def story(self, best: _Trial) -> dict[str, Any]:
        """What was tried and kept, as plain values."""
        return {"kept": best.name, "tried": [trial.told() for trial in self.trials], "skipped": self.skipped}


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
