"""What a reader of a model format provides.

A reader is one module in this folder with a constant ``READER``; nothing else has to be edited to add a format. The
first reader whose :meth:`Reader.matches` says yes gets the file, so ``matches`` looks at the content and is strict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bezoar.core.errors import ModelError
from bezoar.core.model import Origin
from bezoar.io.containers import Source, sha256


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user said about the model; None means "take it from the file".

    Attributes:
        arch: Architecture: a reference net, ``timm/NAME``, ``torchvision/NAME`` or ``path/file.py:function``.
        num_classes: Number of labels.
        mean, std: Normalisation, one value per channel. Applied by the caller of the reader, not by the reader.
        size: Height and width of the input, in pixels.
        channels: Colour channels of the input.
        allow_code: Whether code that came with the file may run.
    """

    arch: str | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    allow_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a reader hands back. Everything it does not know stays None: a dry run finds it.

    Attributes:
        network: What came from the file, float32 (integer buffers as they are), on the CPU, eval mode.
        format: As in :class:`bezoar.core.results.ModelFacts`.
        arch: Name of the architecture, or class of the network.
        origin: Writes changed weights back in the form that was read.
        wrap: Makes the network give ``(B, K)`` logits for ``(B, C, H, W)`` where it does not do so itself.
        mean, std: Normalisation by the model's own configuration, for inputs in [0, 1]; empty if there is none.
        size: Natural input size (height, width).
        channels: Colour channels of the input.
        warnings: What the user should know.
    """

    network: nn.Module
    format: str
    arch: str
    origin: Origin
    wrap: Callable[[nn.Module], nn.Module] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: tuple[int, int] | None = None
    channels: int | None = None
    warnings: tuple[str, ...] = ()


class Reader(Protocol):
    """Reads one model format."""

    def matches(self, source: Source) -> bool:
        """Whether this reader is the one for the file or folder; cheap, and never raises."""
        ...

    def read(self, source: Source, options: Options) -> Loaded:
        """Read it.

        Raises:
            ModelError: The file is damaged, hostile, or does not fit the options.
            UnsafeError: Reading it would run code, and ``options.allow_code`` is false.
            MissingExtra: An optional library is missing.
        """
        ...


def file_name(source: Path, name: str | None) -> str:
    """Name of the file to write: that of the source unless another is asked for."""
    return name or source.name


def as_float32(network: nn.Module) -> nn.Module:
    """Cast parameters and floating buffers to float32 in place, switch to eval mode and return the network."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    network._apply(cast)  # type: ignore[no-untyped-call]
    return network.eval()


def check_target(path: Path, digest: str, target: Path) -> None:
    """Make sure that the original is still what was read, and that it is not about to be overwritten.

    Raises:
        ModelError: It changed, is gone, or is the target itself.
    """
    if not path.is_file() or sha256(path) != digest:
        raise ModelError(f"{path} changed or disappeared since it was read", "Read it again before writing it back")
    if target.exists() and target.samefile(path):
        raise ModelError(f"{target} is the original model", "Write to another folder")
