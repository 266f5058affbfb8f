"""Real data sets for the benchmarks: those of ``bezoar data get``, fetched when they are first asked for.

    python benchmarks/datasets.py cifar-10 fashion-mnist mnist gtsrb

GTSRB is read from a local folder of sign sheets (``BEZOAR_SHARED_DATA``, or ``../shared/data``).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bezoar.io import datasets

CACHE = datasets.cache_folder() / "data"
SHARED = Path(os.environ.setdefault("BEZOAR_SHARED_DATA", str(Path(__file__).parents[2] / "shared" / "data")))


@dataclass(frozen=True)
class Split:
    """uint8 images ``(N, C, H, W)`` and labels ``(N,)`` of the official train and test parts."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def load(name: str) -> Split:
    """Load a data set, fetching it first if it is not cached."""
    data = datasets.load(name, fetch=True, tell=lambda text: print(text, file=sys.stderr, flush=True))
    return Split(data.train_x, data.train_y, data.test_x, data.test_y)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [data_set.name for data_set in datasets.DATA_SETS]:
        data = load(wanted)
        print(f"{wanted}: {tuple(data.train_x.shape)} train, {tuple(data.test_x.shape)} test, {data.classes} classes")
