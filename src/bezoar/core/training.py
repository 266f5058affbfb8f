"""The kind ``Trainer``: learns a clean model from data that nobody vouches for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.method import Method, own_randomness
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
    """

    model: nn.Module
    suspects: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    losses: Tensor | None = None


class Trainer(Method, ABC):
    """Untrusted training set in, model out."""

    @final
    def __call__(
        self, build: Callable[[], nn.Module], examples: ExampleSource, run: Run, folder: Path | None = None
    ) -> Trained:
        """Train a network.

        Args:
            build: Makes the network, freshly initialised; it takes ``(B, C, H, W)`` in [0, 1].
            examples: The untrusted training set.
            run: Device, time, randomness and progress.
            folder: Where a killed run finds what it had; None keeps nothing.
        """
        with own_randomness(run):
            return self.train(build, examples, run, folder)

    @abstractmethod
    def train(self, build: Callable[[], nn.Module], examples: ExampleSource, run: Run, folder: Path | None) -> Trained:
        """The idea of the method."""
