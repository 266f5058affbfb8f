"""The cost controller of Neural Cleanse, for any number of labels at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CostController:
    """Raises the weight of the mask norm while the trigger works, lowers it while it does not.

    The state machine of the authors' code (visualizer.py:396-450), each counter a vector over labels.

    Args:
        init_cost: First weight above zero.
        patience: Successes or failures in a row before the weight changes.
        multiplier: Factor up; the factor down is its power 1.5.
        reach: Success rate that counts as a success, in (0, 1].
        from_zero: Start at weight 0 until ``patience`` successes in a row, as the paper's full scan does.
        stall_patience: Decisions without a smaller trigger before a label is done.
        stall_ratio: A trigger is smaller if below this share of the best so far.
    """

    init_cost: float = 1e-3
    patience: int = 5
    multiplier: float = 2.0
    reach: float = 0.99
    from_zero: bool = True
    stall_patience: int = 25
    stall_ratio: float = 1.0

    @classmethod
    def quick(cls, pressure: float, whole: float, reach: float) -> CostController:
        """Of our own short searches, which begin with a weight and change it by smaller steps.

        Args:
            pressure: First weight of the size, as a share of the whole image.
            whole: Size of a trigger that takes the whole image.
            reach: Success rate that counts as a success, in (0, 1].
        """
        return cls(init_cost=pressure / whole, patience=5, multiplier=1.5, reach=reach, from_zero=False)

    def start(self, count: int) -> dict[str, Tensor]:
        """State of ``count`` labels before the first decision."""
        whole, flag = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        return {
            "cost": torch.full((count,), 0.0 if self.from_zero else self.init_cost, dtype=torch.float64),
            "set": whole.clone(),
            "up": whole.clone(),
            "down": whole.clone(),
            "up_flag": flag.clone(),
            "down_flag": flag.clone(),
            "best": torch.full((count,), torch.inf, dtype=torch.float64),
            "previous": torch.full((count,), torch.inf, dtype=torch.float64),
            "stall": whole.clone(),
        }

    def decide(self, state: dict[str, Tensor], success: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Take one decision for each label, in place.

        Args:
            state: What :meth:`start` gave.
            success: ``(T,)`` success rates in [0, 1].
            size: ``(T,)`` sizes.

        Returns:
            ``(T,)`` whether the trigger is the smallest working one so far, and ``(T,)`` whether the label is done.
        """
        works = success >= self.reach
        size = size.to(state["best"])
        improved = works & (size < state["best"])
        state["best"] = torch.where(improved, size, state["best"])
        done = self._stalled(state)
        self._start_cost(state, works)
        self._adjust(state, works)
        return improved, done

    def _stalled(self, state: dict[str, Tensor]) -> Tensor:
        valid = torch.isfinite(state["best"])
        stalls = valid & (state["best"] >= self.stall_ratio * state["previous"])
        state["stall"] = torch.where(stalls, state["stall"] + 1, torch.where(valid, 0, state["stall"]))
        state["previous"] = torch.minimum(state["best"], state["previous"])
        return state["up_flag"] & state["down_flag"] & (state["stall"] >= self.stall_patience)

    def _start_cost(self, state: dict[str, Tensor], works: Tensor) -> None:
        waiting = (state["cost"] == 0) & works
        state["set"] = torch.where(waiting, state["set"] + 1, 0)
        begin = state["set"] >= self.patience
        state["cost"] = torch.where(begin, self.init_cost, state["cost"])
        for name in ("up", "down"):
            state[name] = torch.where(begin, 0, state[name])
            state[f"{name}_flag"] = state[f"{name}_flag"] & ~begin

    def _adjust(self, state: dict[str, Tensor], works: Tensor) -> None:
        state["up"] = torch.where(works, state["up"] + 1, 0)
        state["down"] = torch.where(works, 0, state["down"] + 1)
        raise_it = state["up"] >= self.patience
        lower_it = ~raise_it & (state["down"] >= self.patience)
        state["up"] = torch.where(raise_it, 0, state["up"])
        state["down"] = torch.where(lower_it, 0, state["down"])
        cost = torch.where(raise_it, state["cost"] * self.multiplier, state["cost"])
        # The code raises the factor to the power 1.5 where its comment speaks of the square root.
        state["cost"] = torch.where(lower_it, cost / self.multiplier**1.5, cost)
        state["up_flag"] = state["up_flag"] | raise_it
        state["down_flag"] = state["down_flag"] | lower_it
