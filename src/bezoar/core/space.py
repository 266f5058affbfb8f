"""Families of triggers that a scanner searches: one set of parameters for each label, all in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bezoar.core.run import generator
from bezoar.core.trigger import AdditiveTrigger, InvertedTrigger, MaskedTrigger

Parameters = dict[str, Tensor]  #: Tensors whose first axis is the label.


class TriggerSpace(Protocol):
    """A family of triggers. ``T`` labels, ``B`` images, ``S`` the shape of one image."""

    def start(self, labels: Sequence[int], seed: int) -> Parameters:
        """Starting parameters; those of a label depend on the label and the seed alone."""

    def stamp(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``(B, *S)`` images to ``(T, B, *S)`` stamped ones, differentiable in the parameters."""

    def size(self, parameters: Parameters) -> Tensor:
        """``(T,)`` sizes, differentiable."""

    def harden(self, parameters: Parameters, row: int) -> InvertedTrigger:
        """The trigger of one row, detached, on the CPU."""


@dataclass(frozen=True)
class MaskedSpace:
    """Masked replacement with the tanh parametrisation of the Neural Cleanse code.

    ``m = tanh(u) / (2 - epsilon) + 0.5``, one mask for all channels; the same for the pattern. The size is the L1 norm
    of the mask, in pixels.

    Args:
        shape: ``(C, H, W)`` of one image.
        start_mask: Mean of the first mask, in (0, 1); None draws it from U[0, 1] as the paper does.
        epsilon: Keeps arctanh finite.
    """

    shape: tuple[int, int, int]
    start_mask: float | None = None
    epsilon: float = 1e-7

    def start(self, labels: Sequence[int], seed: int) -> Parameters:
        """See :class:`TriggerSpace`; ``mask`` is ``(T, 1, H, W)``, ``pattern`` is ``(T, C, H, W)``."""
        channels, height, width = self.shape
        masks, patterns = [], []
        for label in labels:
            source = generator("trigger", seed, label)
            mask = torch.rand(1, height, width, generator=source)
            if self.start_mask is not None:
                # Half the range around the wanted mean: the rows still differ, the mean is that asked for.
                mask = self.start_mask * (0.5 + mask)
            masks.append(mask.clamp(1e-4, 1 - 1e-4))
            patterns.append(torch.rand(channels, height, width, generator=source).clamp(1e-4, 1 - 1e-4))
        return {"mask": self._inverse(torch.stack(masks)), "pattern": self._inverse(torch.stack(patterns))}

    def stamp(self, parameters: Parameters, x: Tensor) -> Tensor:
        """See :class:`TriggerSpace`."""
        mask, pattern = self.values(parameters)
        mask, pattern = mask[:, None], pattern[:, None]
        return (1 - mask) * x[None] + mask * pattern

    def size(self, parameters: Parameters) -> Tensor:
        """``(T,)`` sums of the masks, in pixels."""
        return self._forward(parameters["mask"]).flatten(1).sum(1)

    def harden(self, parameters: Parameters, row: int) -> MaskedTrigger:
        """See :class:`TriggerSpace`."""
        mask, pattern = self.values({k: v[row : row + 1].detach().float().cpu() for k, v in parameters.items()})
        return MaskedTrigger(mask[0], pattern[0])

    def values(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Masks ``(T, 1, H, W)`` and patterns ``(T, C, H, W)`` in [0, 1]."""
        return self._forward(parameters["mask"]), self._forward(parameters["pattern"])

    def _forward(self, raw: Tensor) -> Tensor:
        return torch.clamp(torch.tanh(raw) / (2 - self.epsilon) + 0.5, 0, 1)

    def _inverse(self, value: Tensor) -> Tensor:
        return torch.atanh((value - 0.5) * (2 - self.epsilon))


@dataclass(frozen=True)
class AdditiveSpace:
    """Addition ``clip(x + d, 0, 1)`` of one change ``d = tanh(v)`` to every image.

    The size is the root mean square of ``d`` over channels and pixels: 1/255 is one grey level everywhere. Blended
    pictures and waves change every pixel a little, which a mask in pixels cannot express cheaply.

    Args:
        shape: ``(C, H, W)`` of one image.
        deviation: Standard deviation of ``v`` at the start, above 0.
    """

    shape: tuple[int, int, int]
    deviation: float = 0.1

    def start(self, labels: Sequence[int], seed: int) -> Parameters:
        """See :class:`TriggerSpace`; ``delta`` is ``(T, C, H, W)``."""
        drawn = [torch.randn(self.shape, generator=generator("change", seed, label)) for label in labels]
        return {"delta": self.deviation * torch.stack(drawn)}

    def stamp(self, parameters: Parameters, x: Tensor) -> Tensor:
        """See :class:`TriggerSpace`."""
        return torch.clamp(x[None] + torch.tanh(parameters["delta"])[:, None], 0, 1)

    def size(self, parameters: Parameters) -> Tensor:
        """``(T,)`` root mean squares, in [0, 1]."""
        delta = torch.tanh(parameters["delta"]).flatten(1)
        # The norm of exactly zero has no gradient.
        return (delta.square().mean(1) + 1e-12).sqrt()

    def harden(self, parameters: Parameters, row: int) -> AdditiveTrigger:
        """See :class:`TriggerSpace`."""
        return AdditiveTrigger(torch.tanh(parameters["delta"][row].detach().float()).cpu())
