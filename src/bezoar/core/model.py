"""A model as the defences see it: a module on raw pixels, with what is needed to write it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.results import ModelFacts


class Normalized(nn.Module):
    """Normalisation as the first layer, so that a model takes raw pixels in [0, 1].

    Args:
        module: The network, which expects ``(x - mean) / std``.
        mean, std: One value per colour channel; std above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise SettingError(f"mean and std need one value per channel, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise SettingError(f"std must be above 0, got {min(std)}")
        self.module = module
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Raw pixels ``(B, C, H, W)`` in [0, 1] to what the network makes of them, normalised."""
        logits: Tensor = self.module((x - self.mean.to(x)) / self.std.to(x))
        return logits


class Logits(nn.Module):
    """A module of the user's own, made to take float32 images and to give its logits alone, as float32.

    Unpacks what has ``logits`` as an attribute or a key, and a tuple or list whose first entry is a tensor.

    Args:
        module: Takes images of any floating-point type.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        """Logits as float32; whatever cannot be unpacked is handed on, so that the caller can name it."""
        anchor = next((p for p in self.module.parameters() if p.is_floating_point()), x)
        out = self.module(x.to(anchor.dtype))
        if isinstance(out, Mapping):
            out = out.get("logits", out)
        elif isinstance(getattr(out, "logits", None), Tensor):
            out = out.logits
        elif isinstance(out, list | tuple) and out and isinstance(out[0], Tensor):
            out = out[0]
        return out.float() if isinstance(out, Tensor) else out


class Origin(Protocol):
    """Where a model came from: writes changed weights back in the same form."""

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        """Write ``network`` to ``folder`` as ``name`` (that of the original by default) and return the new path.

        Raises:
            ModelError: The weights no longer fit the form that was read, or the original changed or is gone.
        """
        ...


@dataclass(frozen=True)
class Suspect:
    """A loaded model.

    Attributes:
        module: Eval mode, ``(B, C, H, W)`` in [0, 1] to ``(B, K)`` logits; normalisation included.
        network: The part of ``module`` that came from the file: what a purifier changes and what is written back.
        facts: What the report says about it.
        origin: Writes changed weights back; None where there is nothing to write back to.
        warnings: What the user should know about how it was read.
    """

    module: nn.Module
    network: nn.Module
    facts: ModelFacts
    origin: Origin | None = None
    warnings: tuple[str, ...] = ()
