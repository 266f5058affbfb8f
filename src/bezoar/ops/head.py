"""The layer that gives the logits, and what goes into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.surgery import frozen, logits
from bezoar.ops.channels import WEIGHTED, in_order


def find_head(model: nn.Module, x: Tensor) -> nn.Module:
    """The convolution or linear layer that runs last.

    Args:
        model: Any model; left as it was.
        x: ``(1, C, H, W)`` an image, on the device of the model.

    Raises:
        UnsupportedModel: There is no such layer.
    """
    ran = in_order(model, x, WEIGHTED)
    if not ran:
        raise UnsupportedModel(
            f"{type(model).__name__} has no convolution or linear layer that runs as a module",
            "Use a method that tunes all weights, such as finetune",
        )
    return ran[-1][1]


@torch.no_grad()
def features_of(model: nn.Module, head: nn.Linear, x: Tensor, batch: int = 256) -> Tensor:
    """``(N, D)`` what goes into a linear head, in eval mode.

    Args:
        model: Left as it was.
        head: See :func:`find_head`.
        x: ``(N, C, H, W)`` images, anywhere.
        batch: Images at a time.

    Raises:
        UnsupportedModel: The model's answer is not what the head gives, up to a constant for each image.
    """
    device, caught = head.weight.device, list[Tensor]()

    def catch(_module: nn.Module, given: tuple[Any, ...]) -> None:
        caught.append(given[0].detach())

    parts = []
    handle = head.register_forward_pre_hook(catch)
    try:
        with frozen(model):
            for part in torch.split(x, batch):
                answer = logits(model, part.to(device))
                parts.append(_checked(model, head, caught[-1], answer))
    finally:
        handle.remove()
    return torch.cat(parts)


def _checked(model: nn.Module, head: nn.Linear, given: Tensor, answer: Tensor) -> Tensor:
    if given.ndim == 2 and len(given) == len(answer):
        own = nn.functional.linear(given.to(head.weight), head.weight, head.bias)
        apart = own - answer if own.shape == answer.shape else torch.full((1, 1), torch.inf)
        if float((apart - apart.mean(1, keepdim=True)).abs().max()) <= 1e-2 * float(answer.abs().max().clamp(min=1)):
            return given
    raise UnsupportedModel(
        f"the logits of {type(model).__name__} are not those of its last linear layer",
        "Use a method that tunes all weights, such as finetune or fip",
    )
