"""Model and guard as one module, for any server; and a watch over how often it flags."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from scipy.stats import binom
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.guarding import FittedGuard, seer

#: Logit of all labels but the safe one, whose logit is 0: far enough for any softmax.
_REST = -100.0


class GuardedModel(nn.Module):
    """Answers like the model, and says of each input how suspicious it is.

    The model is copied, stays in eval mode, and needs no gradient. Everything that the guard learned is a buffer, so
    that the whole can be exported (:mod:`bezoar.io.exported`).

    Args:
        fitted: The guard and its model.
        threshold: A score above flags the input.
        num_classes: Number of labels K.
        safe_label: The label that the answer to a flagged input is replaced by; None leaves the answer, and whoever
            reads the flag rejects it.

    Raises:
        SettingError: ``safe_label`` is no label.
    """

    threshold: Tensor
    safe: Tensor

    def __init__(self, fitted: FittedGuard, threshold: float, num_classes: int, safe_label: int | None = None) -> None:
        super().__init__()
        if safe_label is not None and not 0 <= safe_label < num_classes:
            raise SettingError(f"the safe label must be in 0 to {num_classes - 1}, got {safe_label}")
        self.method, self.safe_label = fitted.method, safe_label
        self.model = copy.deepcopy(fitted.model).eval().requires_grad_(False)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._names = tuple(fitted.state)
        for name, value in fitted.state.items():
            self.register_buffer(f"guard_{name}", value.detach().clone().to(device))
        self.register_buffer("threshold", torch.tensor(threshold, device=device))
        answer = torch.full((num_classes,), _REST, device=device)
        if safe_label is not None:
            answer[safe_label] = 0.0
        self.register_buffer("safe", answer)
        self._head = (fitted.method.reads(self.model, torch.zeros(1, *fitted.shape, device=device)),)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: in train mode the answer for an input depends on the others of its batch."""
        del mode
        return super().train(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, K)`` logits, ``(B,)`` scores, and ``(B,)`` whether an input is flagged.

        Args:
            x: ``(B, C, H, W)`` images in [0, 1].
        """
        state = {name: self.get_buffer(f"guard_{name}") for name in self._names}
        answers, score = self.method.look(seer(self.model, self._head[0]), state, x)
        flag = score > self.threshold
        if self.safe_label is not None:
            answers = torch.where(flag[:, None], self.safe, answers)
        return answers, score, flag


@dataclass(frozen=True)
class Drift:
    """What a window of inputs says.

    Attributes:
        flagged, count: Flagged inputs, and inputs of the window.
        expected: The interval that the share of flagged clean inputs was calibrated to, in [0, 1].
        pvalue: How likely so many, or so few, are at the near end of that interval.
        drifted: ``above``: more are flagged than clean inputs explain, so that the inputs have changed or someone
            attacks; ``below``: fewer, so that the threshold no longer fits; or None.
    """

    flagged: int
    count: int
    expected: tuple[float, float]
    pvalue: float
    drifted: Literal["above", "below"] | None


class DriftWatch:
    """Watches the share of flagged inputs.

    Inputs are judged in windows that do not overlap, so that each window alone has the chance ``alpha`` of a false
    alarm at most. The calibrated rate is itself known from few images only; so the share must be too large for the
    upper end of its interval, or too small for the lower end.

    Args:
        low, high: Interval of the calibrated share of flagged clean inputs, such as the Wilson interval of a guard.
        window: Inputs that are judged together, at least 1.
        alpha: Chance of a false alarm in a window, in (0, 1).

    Raises:
        SettingError: A setting is out of range.
    """

    def __init__(self, low: float, high: float, window: int = 1000, alpha: float = 0.001) -> None:
        if not 0 <= low <= high <= 1:
            raise SettingError(f"low and high must be shares in order, got {low:g} and {high:g}")
        if window < 1 or not 0 < alpha < 1:
            raise SettingError(f"window must be at least 1 and alpha in (0, 1), got {window} and {alpha:g}")
        self.low, self.high, self.window, self.alpha = low, high, window, alpha
        self._waiting: deque[bool] = deque()

    def update(self, flags: Iterable[bool] | Tensor) -> tuple[Drift, ...]:
        """Take flags of further inputs, in order; give the windows that they complete."""
        self._waiting.extend(flags.tolist() if isinstance(flags, Tensor) else map(bool, flags))
        found = []
        while len(self._waiting) >= self.window:
            found.append(self._judge(sum(self._waiting.popleft() for _ in range(self.window))))
        return tuple(found)

    def _judge(self, flagged: int) -> Drift:
        many = float(binom.sf(flagged - 1, self.window, self.high))
        few = float(binom.cdf(flagged, self.window, self.low))
        # Half of alpha to each side.
        drifted: Literal["above", "below"] | None = None
        if min(many, few) <= self.alpha / 2:
            drifted = "above" if many <= few else "below"
        return Drift(flagged, self.window, (self.low, self.high), min(1.0, 2 * min(many, few)), drifted)
