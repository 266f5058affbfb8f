"""The kinds of method. The public call does the bookkeeping once; a method writes only its idea."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.evidence import Scan, Scores
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.core.trigger import InvertedTrigger


@dataclass(frozen=True)
class Clean:
    """The defender's clean examples, already divided: what is trained on, and what only measures.

    Attributes:
        x, y: ``(N, C, H, W)`` images in [0, 1] and ``(N,)`` labels to work with.
        held_x, held_y: Held-out images and labels.
        num_classes: Number of labels K of the model.
        suspects: What stands against the clean examples: ``(S, C, H, W)`` images, uint8 or in [0, 1], and ``(S,)``
            labels that someone planted, most suspicious first; None where nothing is known.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    num_classes: int
    suspects: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width


def tried_on(y: Tensor, label: int, source: int | None) -> Tensor:
    """``(N,)`` which images the trigger of a label is tried on: those of its source, or of all other labels if None."""
    return y != label if source is None else y == source


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method is its hyperparameters: equality, repr, JSON and command-line flags come from the fields."""

    def config(self) -> dict[str, Any]:
        """The hyperparameters as plain values."""
        return dataclasses.asdict(self)

    def require(self, name: str, valid: bool, rule: str) -> None:
        """Refuse a bad hyperparameter.

        Raises:
            SettingError: ``valid`` is false.
        """
        if not valid:
            raise SettingError(f"{type(self).__name__}.{name} must be {rule}, got {getattr(self, name)}")


class Scanner(Method, ABC):
    """Is there a backdoor, and for which label? Gives evidence; the verdict is a separate rule."""

    #: Name of the phase, for the user's eye.
    phase: ClassVar[str] = "scan"
    #: Whether a verdict can rest on this search alone.
    alone: ClassVar[bool] = True
    #: Seeds to scan with: a setting of every scanner.
    seeds: int

    def beside(self) -> tuple[Scanner, ...]:
        """Further searches that complete this one in a scan, with settings like its own."""
        return ()

    @final
    def __call__(self, model: nn.Module, clean: Clean, run: Run) -> Scan:
        """Look at a model, which is left as it was.

        Args:
            model: ``(B, C, H, W)`` in [0, 1] to ``(B, K)`` logits.
            clean: Clean examples.
            run: Device, time and randomness.
        """
        with frozen(model), own_randomness(run):
            return self.scan(model, clean, run)

    @abstractmethod
    def scan(self, model: nn.Module, clean: Clean, run: Run) -> Scan:
        """The idea of the method; ``model`` is frozen and in eval mode."""


class Scorer(Method, ABC):
    """How suspicious is each label, and the model as a whole? Evidence beside that of the scanners' searches."""

    #: Whether the method looks at clean examples; one that does not works from the weights alone.
    needs_clean = True
    #: On what the bound of its own rule was calibrated, if a verdict may rest on that rule; such a method gives pairs
    #: of source and target, masked triggers and a bound.
    calibration: ClassVar[str] = ""

    @final
    def __call__(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """Look at a model, which is left as it was.

        Args:
            model: ``(B, C, H, W)`` in [0, 1] to ``(B, K)`` logits.
            clean: Clean examples; a data-free method reads their shape and number of labels only.
            run: Device, time and randomness.
        """
        with frozen(model), own_randomness(run):
            return self.scores(model, clean, run)

    @abstractmethod
    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """The idea of the method; ``model`` is frozen and in eval mode."""


class Purifier(Method, ABC):
    """Suspect model in, clean model out."""

    #: Whether :meth:`purify` needs inverted triggers.
    needs_triggers = False
    #: Whether it does better with the triggers of a scan, also where the scan suspects no label.
    wants_scan = False
    #: Whether :meth:`purify` needs training examples that are thought to be poisoned.
    needs_suspects = False

    @final
    def __call__(
        self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger] | None = None
    ) -> nn.Module:
        """Clean a model in place and return it in eval mode; ``requires_grad`` is left as it was.

        Args:
            model: A copy that may be changed.
            clean: Clean examples.
            run: Device, time and randomness.
            triggers: Inverted triggers by label, for methods that need them.

        Raises:
            SettingError: The method needs triggers or suspects and none were given.
        """
        if self.needs_triggers and not triggers:
            raise SettingError(
                f"{type(self).__name__} needs an inverted trigger, and the scan found none",
                "Scan the model first, or use a purifier that needs no trigger, such as finetune",
            )
        if self.needs_suspects and (clean.suspects is None or not len(clean.suspects[1])):
            raise SettingError(
                f"{type(self).__name__} needs training examples that are thought to be poisoned, and got none",
                "Find them with bezoar filter data, and give --suspects suspects.csv --suspect-data DATA",
            )
        wanted = [(p, p.requires_grad) for p in model.parameters()]
        with own_randomness(run):
            for parameter, _ in wanted:
                parameter.requires_grad_(parameter.is_floating_point())
            try:
                return self.purify(model, clean, run, triggers or {}).eval()
            finally:
                for parameter, value in wanted:
                    parameter.requires_grad_(value)

    @abstractmethod
    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """The idea of the method."""


def own_randomness(run: Run) -> Any:
    """The caller's global random state comes back; inside, it depends on the run's seed."""
    devices = [run.device] if run.device.type == "cuda" else []
    return _Forked(run.seed, devices)


class _Forked:
    def __init__(self, seed: int, devices: list[torch.device]) -> None:
        self.seed, self.fork = seed, torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
