"""Looking into a model and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no parameter gradients inside; modes, ``requires_grad``, gradients and buffers restored after."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, value in wanted:
            parameter.requires_grad_(value)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """``(B, K)`` logits of ``(B, C, H, W)`` images.

    Raises:
        UnsupportedModel: The model gives something else.
    """
    out = model(x)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UnsupportedModel(
            f"expected logits of shape ({len(x)}, classes), got {found}",
            "Wrap the model so that it maps (B, C, H, W) images to (B, K) logits",
        )
    return out


@torch.no_grad()
def require_independent_rows(model: nn.Module, x: Tensor) -> None:
    """Refuse a model whose answer for an image depends on the other images of the batch.

    Args:
        model: Eval mode.
        x: At least two images.

    Raises:
        UnsupportedModel: Rows interact, or logits are not finite.
    """
    together = logits(model, x)
    if not torch.isfinite(together).all():
        raise UnsupportedModel("the model gives NaN or infinite logits on clean images", "Check the weights")
    alone = torch.cat([logits(model, row) for row in torch.split(x, 1)])
    scale = together.abs().max().clamp(min=1)
    if float((together - alone).abs().max() / scale) > 1e-2:
        raise UnsupportedModel(
            "the model's answer for an image depends on the other images of its batch",
            "Labels cannot be inverted in one batch; use mode='reference' or remove the layer that mixes rows",
        )


def require_gradient(model: nn.Module, x: Tensor) -> None:
    """Refuse a model whose output has no gradient with respect to its input.

    Raises:
        UnsupportedModel: It has none.
    """
    hint = "Remove torch.no_grad, detach and NumPy from its forward"
    try:
        with torch.enable_grad():
            out = logits(model, x.detach().clone().requires_grad_())
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        raise UnsupportedModel("the model leaves torch on the way to its output", hint) from None
    if not out.requires_grad:
        raise UnsupportedModel("the model's output has no gradient with respect to its input", hint)


class LogProbabilities(nn.Module):
    """Logits of a model that ends in a softmax: the logarithm of what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """``(B, K)`` logarithms of the probabilities of ``(B, C, H, W)`` images."""
        out: Tensor = self.module(x)
        return out.clamp(min=torch.finfo(out.dtype).tiny).log()


@torch.no_grad()
def gives_probabilities(model: nn.Module, x: Tensor) -> bool:
    """Whether the rows of the output are probabilities: cross-entropy on them would hardly have a gradient."""
    out = logits(model, x).float()
    ones = torch.ones(len(out), device=out.device)
    return out.shape[1] > 1 and bool((out >= 0).all()) and bool(torch.allclose(out.sum(1), ones, atol=1e-3))
