"""Training and test images of a victim."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bezoar.core.errors import DataError
from bezoar.core.examples import Examples
from bezoar.core.results import DataFacts
from bezoar.io.data import CleanData, choose, load_data, train_and_test
from bezoar.io.data_readers.npz import NpzPart
from bezoar.ops.fit import as_float

HELD_OUT = 0.1  # share of each class that is measured on where there are no test images


@dataclass(frozen=True)
class Splits:
    """What a victim is trained on, and what it is measured on.

    Attributes:
        train, test: Images, uint8 where the source has 8 bits, and labels.
        train_facts, test_facts: Where they came from, and their hashes.
        train_positions: ``(N,)`` positions of the training images in their source.
        whole: Whether these are all of its images, in its order.
        test_positions: The same for images held out of that source; None where test images came from elsewhere.
        notes: What the user should know about how they were read.
    """

    train: Examples
    test: Examples
    train_facts: DataFacts
    test_facts: DataFacts
    train_positions: Tensor
    whole: bool
    test_positions: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train_facts.names


def read_splits(
    data: Any,
    test: Any = None,
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Splits:
    """Read training and test images.

    Args:
        data: A data set by name (``cifar-10``) or an ``.npz`` with ``train_x``, ``train_y``, ``test_x`` and ``test_y``,
            which bring test images with them, or whatever :func:`bezoar.io.data.load_data` reads.
        test: Other test images, read the same way; where there are none at all, a tenth of each class is held out.
        size: Height and width that all images are brought to.
        channels: 1 or 3, that all images are brought to.
        limit: Most training images, as many of each class as there are.
        seed: Of that choice and of the division.

    Raises:
        DataError: The data cannot be used.
    """
    train_source, own_test = train_and_test(data)
    train = load_data(train_source, num_classes=None, size=size, channels=channels)
    test_source = own_test if test is None else train_and_test(test)[1] or test
    held: CleanData | None = None
    positions = torch.arange(len(train))
    test_positions: Tensor | None = None
    if test_source is None:
        positions, test_positions = stratified(train.y, HELD_OUT, seed)
        if not len(test_positions):
            raise DataError("no class has two images, so none can be held out", "Give test images with --test")
        held = train.take(test_positions)
    else:
        depth, height, width = train.shape
        held = load_data(test_source, num_classes=train.num_classes, size=(height, width), channels=depth)
        if held.facts.sha256 == train.facts.sha256:
            raise DataError("the test images are the training images", "Give others, or leave --test out")
    positions = positions[torch.from_numpy(choose(train.y[positions].numpy(), limit, seed))]
    chosen = train.take(positions)
    return Splits(
        train=Examples(levels(chosen.x), chosen.y, train.num_classes),
        test=Examples(levels(held.x), held.y, train.num_classes),
        train_facts=_facts(chosen, train_source),
        test_facts=_facts(held, test_source or train_source),
        train_positions=positions,
        whole=len(positions) == len(train),
        test_positions=test_positions,
        notes=train.notes if test_source is None else (*train.notes, *held.notes),
    )


def levels(x: Tensor) -> Tensor:
    """Images whose every value is one of 256 grey levels as uint8; others as they are."""
    rounded = (x * 255).round_().to(torch.uint8)
    pairs = zip(torch.split(rounded, 1024), torch.split(x, 1024), strict=True)
    same = all(torch.equal(as_float(a), b) for a, b in pairs)
    return rounded if same else x


def stratified(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to work with and positions held out, ascending.

    Args:
        y: ``(N,)`` labels.
        share: Of each class that is held out, in (0, 1); at least one image of a class that has two.
        seed: Same seed, same division.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in torch.unique(y).tolist():
        members = (y == label).nonzero().flatten()
        if len(members) >= 2:
            count = min(max(round(len(members) * share), 1), len(members) - 1)
            held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _facts(data: CleanData, source: Any) -> DataFacts:
    path = f"{source.path}:{source.part}" if isinstance(source, NpzPart) else data.facts.path
    return dataclasses.replace(data.facts, path=path)
