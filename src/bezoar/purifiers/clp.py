"""CLP: prune the channels that amplify most; needs no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.channels import WEIGHTED, in_order

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class CLP(Purifier):
    """Channel Lipschitz pruning: shut the channels whose largest possible amplification stands out in their layer.

    A trigger is a small change with a large effect, so some channel must amplify it. The bound of a channel is the
    spectral norm of its kernel, as a matrix of input channels by positions, times the gain of the BatchNorm behind it
    over its standard deviation. Channels far above the mean of their layer are shut, gain and shift. A net without any
    BatchNorm behind a convolution is judged by the kernels of its hidden layers alone, which is ours. The clean images
    only show which layers follow each other.

    Args:
        u: Channels more than this many standard deviations above the mean of their layer are shut, above 0. With n
            channels none can be more than ``(n - 1) / sqrt(n)`` above it: with 3, layers of ten or less are left alone.

    References:
        Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022; u = 3 for CIFAR-10.
    """

    u: float = 3.0

    def __post_init__(self) -> None:
        self.require("u", self.u > 0, "above 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        x = as_float(clean.x[:1]).to(next(model.parameters()).device)
        layers = pairs(model, x)
        if not layers:
            raise UnsupportedModel(
                f"{type(model).__name__} has no hidden convolution or linear layer",
                "Use a method that tunes weights, such as finetune",
            )
        if all(norm is None for _, norm in layers):
            run.warnings.append("CLP was made for convolutions with BatchNorm: here the kernels alone decide")
        shut = 0
        for layer, norm in layers:
            bounds = lipschitz(layer, norm)
            high = stands_out(bounds, self.u)
            shut += int(high.sum())
            with torch.no_grad():
                for parameter in (layer if norm is None else norm).parameters(recurse=False):
                    parameter[high] = 0
        run.notes["pruned"], run.notes["channels"] = shut, sum(len(weight_of(layer)) for layer, _ in layers)
        run.progress.training(1, 1, 0.0)
        return model


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
