"""Labelled examples that nobody vouches for: read a few at a time, so that a data set need not fit in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ExampleSource(Protocol):
    """Training examples by position.

    A source that knows a hash of its pixels and labels has it as the text ``sha256``; a checkpoint is then held against
    that, and the images need not be read once more.
    """

    @property
    def labels(self) -> Tensor:
        """``(N,)`` int64 labels as they came."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of labels K."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        ...

    def take(self, rows: Tensor) -> Tensor:
        """``(B, C, H, W)`` images at these positions: uint8 in [0, 255], or float in [0, 1]."""
        ...


@dataclass(frozen=True)
class Examples:
    """A labelled training set that is in memory.

    Attributes:
        x: ``(N, C, H, W)`` images, uint8 in [0, 255] or float in [0, 1].
        y: ``(N,)`` int64 labels.
        num_classes: Number of labels K.
    """

    x: Tensor
    y: Tensor
    num_classes: int

    @property
    def labels(self) -> Tensor:
        """``(N,)`` int64 labels, see :class:`ExampleSource`."""
        return self.y

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    def take(self, rows: Tensor) -> Tensor:
        """See :class:`ExampleSource`."""
        return self.x[rows]


@dataclass(frozen=True)
class Subset:
    """Some examples of a source.

    Attributes:
        examples: The source.
        rows: ``(M,)`` int64 positions in it.
    """

    examples: ExampleSource
    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """``(M,)`` int64 labels."""
        return self.examples.labels[self.rows]

    @property
    def num_classes(self) -> int:
        """Number of labels K."""
        return self.examples.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        return self.examples.shape

    def take(self, rows: Tensor) -> Tensor:
        """See :class:`ExampleSource`."""
        return self.examples.take(self.rows[rows])
