"""Upper bounds of how much each channel of a layer can amplify, as CLP computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bezoar.ops.channels import WEIGHTED, in_order

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pairs(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, nn.Module | None]]:
    """Convolutions with the BatchNorm behind each; where there is no such pair, all hidden layers with None.

    A BatchNorm belongs to the last convolution before it that has as many channels, as in the public code.

    Args:
        model: Any model.
        x: ``(1, C, H, W)`` an image.
    """
    found: list[tuple[nn.Module, nn.Module | None]] = []
    before: nn.Module | None = None
    for _, module, _ in in_order(model, x, (*_CONVOLUTIONS, _BATCH_NORM)):
        if isinstance(module, _CONVOLUTIONS):
            before = module
        elif before is not None and fits(before, module):
            found.append((before, module))
    return found or [(module, None) for _, module, _ in in_order(model, x, WEIGHTED)[:-1]]


def fits(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a BatchNorm has a gain and running statistics, and as many channels as the layer."""
    gain = norm.weight
    return isinstance(gain, Tensor) and isinstance(norm.running_var, Tensor) and len(gain) == len(weight_of(layer))


def weight_of(layer: nn.Module) -> Tensor:
    """The kernels of a layer, or the gain of a normalisation."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def lipschitz(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """``(channels,)`` upper bounds of the Lipschitz constants of the channels of a layer, as float64 on the CPU.

    Args:
        layer: A convolution or linear layer.
        norm: The BatchNorm behind it, or None.
    """
    weight = weight_of(layer).cpu()  # not every device has float64
    kernels = weight.double().flatten(2) if weight.ndim > 2 else weight.double().unsqueeze(2)
    bounds: Tensor = torch.linalg.matrix_norm(kernels, 2)
    if norm is None:
        return bounds
    gain, variance, eps = weight_of(norm), norm.running_var, norm.eps
    assert isinstance(variance, Tensor)
    assert isinstance(eps, float)
    factor = gain.cpu().double().abs() / (variance.cpu().double() + eps).sqrt()
    return bounds * factor


def stands_out(bounds: Tensor, u: float) -> Tensor:
    """``(channels,)`` whether a bound is more than ``u`` sample standard deviations above the mean."""
    if len(bounds) < 2:
        return torch.zeros_like(bounds, dtype=torch.bool)
    # Of equal bounds, none may stand out by rounding.
    return bounds > (1 + 1e-9) * bounds.mean() + u * bounds.std()
