"""What the user may say about the model and the run. Imports nothing heavy: the command line is made from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bezoar.core.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How to read the model.

    Args:
        arch: Architecture of a bare state dict: a reference net such as wrn-16-1 or preactresnet-18, timm/NAME,
            torchvision/NAME, or file.py:function for your own code.
        num_classes: Number of labels; found in the weights by default.
        mean: Normalisation of the input, one value per channel; from the model's own configuration by default.
        std: Normalisation of the input, one value per channel.
        size: Height and width of the input, in pixels.
        channels: Colour channels of the input.
        allow_code: Also open formats that bring code with them, and run it. Only for files you trust.
    """

    arch: str | None = None
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | tuple[int, int] | None = None
    channels: int | None = None
    allow_code: bool = False


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Means of a run.

    Args:
        images: Most clean images to use, as many of each class as there are.
        held_out: Share of the images that only measures, in (0, 1); by default half in a scan, a fifth in a
            purification.
        seed: Root of all randomness.
        budget: Seconds allowed; the answer is then the best so far.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        additive: Also search for faint changes of the whole image, such as blended pictures and waves.
        evidence: Names of scorers to ask as well, or ``all``; what they say is shown.
        fpr: Share of clean models that may be called backdoored, in (0, 0.5]: the verdict then rests on all searches
            together, and those of the scorers that are calibrated. None leaves it to the searches, by their own rule.
        resume: Keep checkpoints, and go on where a killed run of the same command stopped.
        ray: Spread a scan over a Ray cluster: ``local``, ``auto`` for the one that runs here, or its address; empty for
            none. The outcome is the same.
    """

    images: int = 1000
    held_out: float | None = None
    seed: int = 0
    budget: float | None = None
    device: str = "auto"
    threads: int = 0
    additive: bool = True
    evidence: tuple[str, ...] = ()
    fpr: float | None = None
    resume: bool = False
    ray: str = ""

    def __post_init__(self) -> None:
        if self.budget is not None and not isinstance(self.budget, int | float):
            raise SettingError(f"budget must be a number of seconds, got {self.budget!r}")
        for name, valid, rule in (
            ("images", self.images >= 2, "at least 2"),
            ("held_out", self.held_out is None or 0 < self.held_out < 1, "in (0, 1)"),
            ("budget", self.budget is None or self.budget > 0, "above 0"),
            ("fpr", self.fpr is None or 0 < self.fpr <= 0.5, "in (0, 0.5]"),
            ("threads", self.threads >= 0, "at least 0"),
        ):
            if not valid:
                raise SettingError(f"{name} must be {rule}, got {getattr(self, name)}")


def divided(given: dict[str, Any], *parts: Any) -> list[Any]:
    """Put each setting into the dataclass that has a field of its name."""
    made = []
    left = dict(given)
    for part in parts:
        own = {f.name: left.pop(f.name) for f in dataclasses.fields(part) if f.name in left}
        made.append(dataclasses.replace(part, **own))
    if left:
        known = sorted({f.name for part in parts for f in dataclasses.fields(part)})
        raise SettingError(f"unknown setting {next(iter(left))!r}", f"There are: {', '.join(known)}")
    return made
