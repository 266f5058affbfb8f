"""Refool: natural reflections (Liu et al., ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bezoar.attacks._attack import Training
from bezoar.attacks._pictures import read_folder
from bezoar.attacks._poison import PoisonAttack, Poisoned
from bezoar.attacks._reflection import ReflectionTrigger, reflections
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.ops.fit import as_float


@dataclass(frozen=True, kw_only=True)
class Refool(PoisonAttack):
    """Add the reflection of another picture, as in a pane of glass: a ghost, or out of focus.

    The paper takes reflections from Pascal VOC and selects those that work best. Here they come from a folder of
    pictures, or are images of the data set that are not poisoned, and none is preferred. Each reflection has its fixed
    strength, shift and blur; which one an image gets depends on the image. The official code first enlarges images to
    560 pixels, where its shifts of 3 to 8 pixels are less than one pixel of a 32x32 image; here, as in the CIFAR-10
    port of backdoor-toolbox, all is done at the size of the images. That port uses ghosts only (``ghost_rate=1``).

    Args:
        rate: Poisoned share of the target class (clean label) or of the whole set (dirty label).
        reflections: How many pictures are reflected in training examples, at least 1.
        test_reflections: How many other pictures are reflected at test time; 0 uses those of the training examples.
        folder: Folder of pictures to reflect; empty takes images of the data set.
        ghost_rate: Share of ghosts, in [0, 1]; the others are out of focus.
        transmission: Share of the image's own light, in (0, 1); None draws ``1 - U(0.05, 0.45)`` for each reflection
            (0.4 in BackdoorBench).
        dirty: Poison all other classes and change their labels, instead of the paper's clean-label poisoning.

    References:
        Liu, Ma, Bailey, Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV 2020.
    """

    rate: float = 0.4
    reflections: int = 50
    test_reflections: int = 50
    folder: str = ""
    ghost_rate: float = 0.49
    transmission: float | None = None
    dirty: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("reflections", self.reflections >= 1, "at least 1")
        self.require("test_reflections", self.test_reflections >= 0, "at least 0")
        self.require("ghost_rate", 0 <= self.ghost_rate <= 1, "in [0, 1]")
        self.require("transmission", self.transmission is None or 0 < self.transmission < 1, "in (0, 1)")

    @property
    def clean_label(self) -> bool:
        return not self.dirty

    def trigger(self, shape: tuple[int, int, int]) -> ReflectionTrigger:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: There is no folder, so that the trigger depends on the examples: use :meth:`poison`.
            DataError: The folder has too few pictures, or one cannot be read.
        """
        return self._triggers(self._from_folder(shape))[1]

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        """See :class:`PoisonAttack`.

        Raises:
            SettingError: There are not enough pictures to reflect.
            DataError: The folder has no pictures, or one cannot be read.
        """
        del training
        pictures = self._from_folder(data.shape) if self.folder else self._from_data(data)
        return self.stamp_with(data, *self._triggers(pictures))

    def _triggers(self, pictures: Tensor) -> tuple[ReflectionTrigger, ReflectionTrigger]:
        train = reflections(pictures[: self.reflections], self.ghost_rate, self.transmission, self.seed)
        if not self.test_reflections:
            return train, train
        return train, reflections(pictures[self.reflections :], self.ghost_rate, self.transmission, self.seed + 1)

    def _from_folder(self, shape: tuple[int, int, int]) -> Tensor:
        if not self.folder:
            raise SettingError("the reflections of Refool are images of the data set", "Use poison, or give a folder")
        wanted = self.reflections + self.test_reflections
        pictures = read_folder(Path(self.folder).expanduser(), shape, wanted)
        if len(pictures) < wanted:
            raise self._too_few(len(pictures), f"{self.folder} has")
        return pictures

    def _from_data(self, data: Examples) -> Tensor:
        """Pictures of the data set that are neither poisoned nor cover examples, in random order."""
        labels = self.labels(data.num_classes)
        index = self.choose(data.y, labels)
        free = torch.ones(len(data.y), dtype=torch.bool)
        free[torch.cat([index, self.choose_cover(data.y, labels, index)])] = False
        others = free.nonzero().flatten()
        wanted = self.reflections + self.test_reflections
        if len(others) < wanted:
            raise self._too_few(len(others), "the data set leaves")
        generator = torch.Generator().manual_seed(self.seed + 2)
        return as_float(data.x[others[torch.randperm(len(others), generator=generator)[:wanted]]])

    def _too_few(self, there: int, what: str) -> SettingError:
        return SettingError(
            f"Refool needs {self.reflections} + {self.test_reflections} pictures to reflect, {what} {there}",
            "Lower reflections and test_reflections, or give more pictures",
        )
