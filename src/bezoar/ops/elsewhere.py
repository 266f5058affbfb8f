"""Training by gradients that are taken at other weights than those that are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of a scalar with respect to each parameter; zero where it has none."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def loss_elsewhere(
    parameters: Sequence[Tensor], weights: Sequence[Tensor], loss: Callable[[], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss, and its gradient by parameter, while the parameters hold other weights; they get their own back.

    Args:
        parameters: Leaves that require gradients; all that ``loss`` depends on and that differ.
        weights: What they hold meanwhile.
        loss: Gives a scalar.
    """
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        _hold(parameters, weights)
        value = loss()
        return value.detach(), gradients(value, parameters)
    finally:
        _hold(parameters, own)


def with_gradient(value: Tensor, parameters: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """A scalar of this value whose gradient with respect to the parameters is the wanted one, for a training loop."""
    total = torch.stack([(p * g).sum().float() for p, g in zip(parameters, wanted, strict=True)]).sum()
    return value + total - total.detach()


@torch.no_grad()
def _hold(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
