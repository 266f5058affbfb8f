"""Choosing how strongly to act from clean images alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from bezoar.ops.answers import answers


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 256) -> float:
    """Share of ``(N, C, H, W)`` images that the model gives their ``(N,)`` labels, in eval mode; left as it was."""
    return float((answers(model, x, batch=batch) == y.cpu()).double().mean())


def strongest(settings: Iterable[float], accuracy_at: Callable[[float], float], floor: float) -> float | None:
    """The last of the settings, which go from weak to strong, before the accuracy first falls below ``floor``.

    Args:
        settings: From weak to strong.
        accuracy_at: Clean accuracy in [0, 1] with a setting.
        floor: Least accuracy in [0, 1].

    Returns:
        None where even the first one falls below.
    """
    chosen = None
    for setting in settings:
        if accuracy_at(setting) < floor:
            break
        chosen = setting
    return chosen
