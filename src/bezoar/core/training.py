"""The kind ``Trainer``: learns a clean model from data that nobody vouches for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Suspicion
from bezoar.core.method import Clean, Method, own_randomness
from bezoar.core.run import Run


@dataclass(frozen=True)
class Trained:
    """What a trainer gives back.

    Attributes:
        model: In eval mode.
        suspects: ``(S,)`` int64 positions of the examples that it isolated, most suspicious first; empty where it
            isolates none.
        losses: ``(E + 1, N)`` float32 loss of each example before the training and after each of the first E epochs,
            NaN where it was not kept; None where it keeps none.
        suspicion: What a filter said of the examples; None where it used none.
    """

    model: nn.Module
    suspects: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    losses: Tensor | None = None
    suspicion: Suspicion | None = None

    @property
    def ranked_by(self) -> list[float]:
        """Score or last loss by which each suspect was ranked; NaN where it is not known."""
        values = torch.full((len(self.suspects),), float("nan"))
        if self.suspicion is not None:
            values = self.suspicion.score[self.suspects]
        elif self.losses is not None:
            values = self.losses[-1][self.suspects]
        return [float(value) for value in values]


class Trainer(Method, ABC):
    """Untrusted training set in, model out."""

    @property
    def needs_clean(self) -> bool:
        """Whether the method, with these settings, needs some clean examples beside the training set."""
        return False

    def require_clean(self, given: bool) -> None:
        """Refuse to begin without clean examples where they are needed.

        Raises:
            SettingError: None are given.
        """
        if self.needs_clean and not given:
            raise SettingError(
                f"{type(self).__name__} needs a few clean examples to compare with",
                "Give them with --clean; or use another method, or settings that need none",
            )

    @final
    def __call__(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None = None,
        clean: Clean | None = None,
    ) -> Trained:
        """Train a network.

        Args:
            build: Makes the network, freshly initialised; it takes ``(B, C, H, W)`` in [0, 1].
            examples: The untrusted training set.
            run: Device, time, randomness and progress.
            folder: Where a killed run finds what it had; None keeps nothing.
            clean: Clean examples, for the methods that need some; others do not look at them.

        Raises:
            SettingError: The method needs clean examples and none were given.
        """
        self.require_clean(clean is not None and len(clean.x) > 0)
        with own_randomness(run):
            return self.train(build, examples, run, folder, clean)

    @abstractmethod
    def train(
        self,
        build: Callable[[], nn.Module],
        examples: ExampleSource,
        run: Run,
        folder: Path | None,
        clean: Clean | None,
    ) -> Trained:
        """The idea of the method."""
