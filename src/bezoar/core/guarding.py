"""The kind ``Guard``: does this input carry a trigger, asked while the model answers?"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import final

import torch
from torch import Tensor, nn

from bezoar.core.errors import DataError, SettingError, UnsupportedModel
from bezoar.core.method import Clean, Method, own_randomness
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger

#: ``(B, C, H, W)`` images to ``(B, K)`` logits and ``(B, D)`` what goes into the layer that the guard reads, float32;
#: D is 0 for a guard that reads none.
See = Callable[[Tensor], tuple[Tensor, Tensor]]

_AT_ONCE, _VALUES = 1024, 1 << 24  # most images, and values of images, in one pass of the model
_TIE = 1e-5  # how far above the largest clean score a threshold lies, relative: other runtimes round otherwise


@dataclass(frozen=True)
class Threshold:
    """Above which score an image is flagged.

    Attributes:
        value: An image is flagged where its score is above.
        fpr: Share of clean images that it shall flag at most, on average over such thresholds.
        count: Held-out clean images that it rests on.
        flagged: How many of these it flags.
    """

    value: float
    fpr: float
    count: int
    flagged: int


class Guard(Method, ABC):
    """Looks at each input of a model that is in use."""

    #: Whether :meth:`fit` needs inverted triggers.
    needs_triggers = False

    @final
    def __call__(
        self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger] | None = None
    ) -> FittedGuard:
        """Learn what is usual from clean examples; the model is left as it was.

        Args:
            model: ``(B, C, H, W)`` in [0, 1] to ``(B, K)`` logits.
            clean: Clean examples; the held-out ones only give thresholds.
            run: Device, time and randomness.
            triggers: Inverted triggers by label, for methods that need them.

        Raises:
            SettingError: The method needs triggers and none were given, or no example is held out.
            UnsupportedModel: The model is none that the method can look at.
        """
        if self.needs_triggers and not triggers:
            raise SettingError(
                f"{type(self).__name__} needs an inverted trigger, and the scan found none",
                "Scan the model first, or use a guard that needs no trigger, such as mahalanobis",
            )
        if not len(clean.held_x) or not len(clean.x):
            raise SettingError("a guard needs clean images to work with and others to set its threshold", "Give more")
        clean = dataclasses.replace(clean, x=pixels(clean.x))
        with frozen(model), own_randomness(run), torch.no_grad():
            run.check()
            logits(model, clean.x[:1].to(run.device))
            state = {name: value.contiguous() for name, value in self.fit(model, clean, run, triggers or {}).items()}
            fitted = FittedGuard(method=self, model=model, state=state, shape=clean.shape)
            return dataclasses.replace(fitted, held=fitted.score(clean.held_x, run).sort().values)

    @abstractmethod
    def fit(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> dict[str, Tensor]:
        """What the score needs, by name, on the CPU; ``model`` is frozen and in eval mode, ``clean.x`` float32."""

    @abstractmethod
    def look(self, see: See, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, K)`` logits and ``(B,)`` float32 scores of ``(B, C, H, W)`` images, higher for more suspicious.

        It is exported together with the model, so it consists of tensor operations alone, takes any B, and draws
        nothing at random.
        """

    def reads(self, model: nn.Module, x: Tensor) -> nn.Module | None:
        """The layer whose inputs the score rests on; None where logits are enough.

        Args:
            model: Any model.
            x: ``(1, C, H, W)`` an image.
        """
        del model, x
        return None

    def passes(self) -> int:
        """How many images the model answers for one that is looked at."""
        return 1

    def highest(self, state: Mapping[str, Tensor]) -> float:
        """A score that no image can exceed."""
        del state
        return math.inf


@dataclass(frozen=True, eq=False)
class FittedGuard:
    """A guard and what it learned of a model.

    Attributes:
        method: The guard.
        model: The model that it was fitted to, shared with the caller.
        state: What it learned, by name.
        shape: ``(C, H, W)`` of an image.
        held: ``(M,)`` scores of held-out clean images, ascending.
    """

    method: Guard
    model: nn.Module
    state: Mapping[str, Tensor]
    shape: tuple[int, int, int]
    held: Tensor = field(default_factory=lambda: torch.empty(0))

    def score(self, x: Tensor, run: Run | None = None) -> Tensor:
        """``(N,)`` float32 scores on the CPU, higher for more suspicious; the model is left as it was.

        Args:
            x: ``(N, C, H, W)`` images, uint8 or in [0, 1].
            run: Progress, and time.

        Raises:
            DataError: The images have another shape than those of the fit.
            UnsupportedModel: A score is not finite.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise DataError(f"expected images of shape {self.shape}, got {tuple(x.shape[1:])}")
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        state = {name: value.to(device) for name, value in self.state.items()}
        found: list[Tensor] = []
        with frozen(self.model), torch.no_grad():
            head = self.method.reads(self.model, torch.zeros(1, *self.shape, device=device))
            see = seer(self.model, head)
            most = min(_AT_ONCE, _VALUES // max(1, math.prod(self.shape)))
            for part in torch.split(x, max(1, most // self.method.passes())):
                if run is not None:
                    run.check()
                    run.progress.report("guard", sum(len(one) for one in found), len(x), "")
                found.append(self.method.look(see, state, pixels(part.to(device)))[1].float().cpu())
        scores = torch.cat([torch.empty(0), *found])
        if not torch.isfinite(scores).all():
            raise UnsupportedModel("the model gives answers that are not finite", "Check the weights and the images")
        return scores

    def threshold(self, fpr: float) -> Threshold:
        """The threshold that flags a clean image with probability ``fpr`` at most.

        With M held-out scores it is the one of rank ``ceil((M + 1) (1 - fpr))``. For a new image of the same kind,
        every rank among M + 1 is equally likely, so the bound holds on average for any distribution; it needs M of at
        least ``1 / fpr - 1``. It lies halfway to the next score above, so that rounding decides nothing.

        Args:
            fpr: In (0, 1).

        Raises:
            SettingError: Out of range, or too few held-out images for it.
        """
        return threshold(self.held, fpr)


def pixels(x: Tensor) -> Tensor:
    """Images as float32 in [0, 1]."""
    return x.float() if x.is_floating_point() else x.float() / 255


def threshold(held: Tensor, fpr: float) -> Threshold:
    """See :meth:`FittedGuard.threshold`; ``held`` are ``(M,)`` scores of clean images."""
    if not 0 < fpr < 1:
        raise SettingError(f"fpr must be in (0, 1), got {fpr:g}")
    count, ordered = len(held), held.sort().values
    rank = math.ceil((count + 1) * (1 - fpr) - 1e-9)
    if rank > count:
        raise SettingError(
            f"an FPR of {fpr:.2%} needs at least {fewest(fpr)} held-out clean images, got {count}",
            f"Give more clean images, or an FPR of at least {1 / (count + 1):.1%}",
        )
    at = float(ordered[rank - 1])
    above = ordered[ordered > at]
    value = (at + float(above[0])) / 2 if len(above) else at + _TIE * max(1.0, abs(at))
    value = float(torch.tensor(value, dtype=held.dtype))
    return Threshold(value=value, fpr=fpr, count=count, flagged=int((held > value).sum()))


def fewest(fpr: float) -> int:
    """Held-out clean images that a threshold of this FPR needs."""
    return max(1, math.ceil(1 / fpr - 1 - 1e-9))


def seer(model: nn.Module, head: nn.Module | None) -> See:
    """Looks through a model, and at what goes into one of its layers.

    The hook is there only while the model runs, and other threads that use the model at the same time are not heard.

    Args:
        model: In eval mode.
        head: The layer, or None; maps and tokens are averaged over their places.
    """

    def see(x: Tensor) -> tuple[Tensor, Tensor]:
        if head is None:
            return model(x).float(), x.new_zeros((x.shape[0], 0))
        caught: list[Tensor] = []
        own = get_ident()

        def catch(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if get_ident() == own:
                caught.append(given[0])

        handle = head.register_forward_pre_hook(catch)
        try:
            out = model(x).float()
        finally:
            handle.remove()
        if not caught:
            raise UnsupportedModel(f"the layer {type(head).__name__} that the guard reads did not run")
        given = caught[-1].float()
        if given.ndim > 2:
            given = given.mean((2, 3)) if given.ndim == 4 else given.mean(1)
        return out, given

    return see
