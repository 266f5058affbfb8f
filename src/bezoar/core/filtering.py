"""The kind ``Filter``: which training examples are poisoned?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.examples import ExampleSource
from bezoar.core.method import Clean, Method, own_randomness
from bezoar.core.run import Run
from bezoar.core.surgery import frozen


@dataclass(frozen=True)
class Suspicion:
    """What a filter says of each example.

    Attributes:
        score: ``(N,)`` float64, finite, higher for more suspicious; comparable over the whole set.
        suspect: ``(N,)`` bool: those that the method would take out.
        rule: What made them suspect, in words.
        statistic: What the method measured of each label that it looked at, higher for more suspicious.
        flagged: Labels that the method's own rule says are poisoned; None where it has no such rule, and takes
            something out of a clean set too.
        confined: Whether suspects of labels that are not flagged do not count; else something is taken out of a clean
            set too.
    """

    score: Tensor
    suspect: Tensor
    rule: str
    statistic: dict[int, float] = field(default_factory=dict)
    flagged: tuple[int, ...] | None = None
    confined: bool = True

    @property
    def decides(self) -> bool:
        """Whether it says that there is no poison where it finds none, and then takes nothing out."""
        return self.flagged is not None and self.confined


class Filter(Method, ABC):
    """Looks at a training set that nobody vouches for, through a model trained on it."""

    #: Whether the method needs some clean examples beside the suspects.
    needs_clean = False
    #: Whether it looks at the examples through what the model has learned; else only its architecture counts.
    through_model = True

    @final
    def __call__(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None = None) -> Suspicion:
        """Score each example; the model is left as it was.

        Args:
            model: ``(B, C, H, W)`` in [0, 1] to ``(B, K)`` logits, trained on the examples where the method looks
                through it.
            examples: The training set, read a few at a time.
            run: Device, time and randomness; what is read of each example is kept in the folder of its progress,
                where there is one.
            clean: Clean examples, for the methods that need some.

        Raises:
            SettingError: The method needs clean examples and none were given.
        """
        if self.needs_clean and (clean is None or not len(clean.x)):
            raise SettingError(
                f"{type(self).__name__} needs some clean examples to compare with",
                "Give them with --clean, or use a filter that needs none, such as spectral-signatures",
            )
        with frozen(model), own_randomness(run):
            return self.filter(model, examples, run, clean)

    @abstractmethod
    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """The idea of the method; ``model`` is frozen and in eval mode."""


def taken_out(found: Suspicion, labels: Tensor) -> Tensor:
    """``(N,)`` bool: the suspects, of flagged labels only where they are confined to these."""
    if found.flagged is None or not found.confined:
        return found.suspect
    return found.suspect & torch.isin(labels, torch.tensor(found.flagged, dtype=labels.dtype))
