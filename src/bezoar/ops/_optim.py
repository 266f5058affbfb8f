"""Optimisers, schedules and precision of a recipe."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.ops.recipe import Recipe


class Stepper:
    """Takes the steps of one training: backward pass, clipping, optimiser, schedule, scaling of float16 gradients.

    Args:
        parameters: What is trained.
        recipe: Optimiser, schedule, clipping and precision.
        total: Steps in all.
        device: Where the parameters are.
    """

    def __init__(self, parameters: list[nn.Parameter], recipe: Recipe, total: int, device: torch.device) -> None:
        self.parameters, self.clip, self.device = parameters, recipe.clip, device
        self.half = half_type(recipe, device)
        self.optimizer = _optimizer(parameters, recipe)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(recipe, step, total))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half is torch.float16)

    def autocast(self) -> AbstractContextManager[object]:
        """Where the forward pass belongs."""
        return nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)

    def step(self, loss: Tensor) -> None:
        """Minimise ``loss`` by one step; gradients that were there before are dropped."""
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.scaler.get_scale()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else float16 overflowed and the optimiser did not move
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """What a killed run needs to go on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled() and state["scaler"]:  # the run may go on with another precision of the device
            self.scaler.load_state_dict(state["scaler"])


def half_type(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, or None where it does not pay."""
    if recipe.precision != "auto" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def factor(recipe: Recipe, step: int, total: int) -> float:
    """Learning rate of a step (counted from 0) of ``total``, as a share of the peak."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return float(recipe.gamma ** sum(step / total >= milestone for milestone in recipe.milestones))
    warm = max(1, total // 5) if recipe.schedule == "onecycle" else 0
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
