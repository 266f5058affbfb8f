"""Training that diverges says so."""

from __future__ import annotations

import math

from bezoar.core.errors import SettingError


def require_finite(loss: float, step: int) -> None:
    """Refuse to go on from a loss that is NaN or infinite.

    Args:
        loss: Loss of a step.
        step: Its number, from 1.

    Raises:
        SettingError: It is no finite number.
    """
    if not math.isfinite(loss):
        raise SettingError(f"training diverged at step {step}: the loss is {loss}", "Lower the learning rate (lr)")
