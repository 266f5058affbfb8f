"""How a network is trained: plain settings, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Args:
        epochs: Passes over the data, at least 1.
        batch: Examples per step.
        lr: Peak learning rate.
        optimizer: ``sgd`` (momentum, Nesterov) or ``adam``.
        momentum: Momentum of SGD.
        betas: Those of Adam, each in [0, 1).
        weight_decay: L2 penalty.
        schedule: ``constant``, ``cosine`` to zero, ``onecycle`` (linear up over the first fifth, cosine to zero), or
            ``step`` (times ``gamma`` at each milestone).
        milestones: Shares of the training after which ``step`` lowers the learning rate, ascending, in (0, 1).
        gamma: Factor of ``step``, in (0, 1].
        pad: Random crop after padding by this many pixels; 0 switches it off.
        flip: Random horizontal flip.
        rotate: Random rotation by up to this many degrees either way, at most 180; 0 switches it off.
        cutout: Side in pixels of a square that is set to 0, centred on a random pixel and cut at the border; 0 switches
            it off.
        mixup: Alpha of MixUp's Beta distribution; 0 switches it off.
        label_smoothing: Share of the label's weight that is spread over all labels, in [0, 1).
        clip: Largest gradient norm; 0 switches clipping off.
        precision: ``fp32``, or ``auto``: bfloat16 autocast (float16 where the GPU lacks it) on CUDA, float32 elsewhere.
            bfloat16 rounds pixels near 1 by up to 1/512, which matters to triggers that faint.

    Raises:
        ValueError: A setting is out of range.

    References:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
        https://arxiv.org/abs/1708.04552. Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
        https://arxiv.org/abs/1710.09412: one weight for each batch, as in the authors' code.
    """

    epochs: int = 10
    batch: int = 128
    lr: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "onecycle", "step"] = "onecycle"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    pad: int = 0
    flip: bool = False
    rotate: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    clip: float = 0.0
    precision: Literal["fp32", "auto"] = "fp32"

    def __post_init__(self) -> None:
        ascending = list(self.milestones) == sorted(set(self.milestones))
        for name, valid, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("lr", self.lr >= 0, "at least 0"),
            ("optimizer", self.optimizer in ("sgd", "adam"), "sgd or adam"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "in [0, 1)"),
            ("schedule", self.schedule in ("constant", "cosine", "onecycle", "step"), "a known schedule"),
            ("milestones", ascending and all(0 < m < 1 for m in self.milestones), "ascending shares in (0, 1)"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("pad", self.pad >= 0, "at least 0"),
            ("rotate", 0 <= self.rotate <= 180, "in [0, 180]"),
            ("cutout", self.cutout >= 0, "at least 0"),
            ("mixup", self.mixup >= 0, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("clip", self.clip >= 0, "at least 0"),
            ("precision", self.precision in ("fp32", "auto"), "fp32 or auto"),
        ):
            if not valid:
                raise ValueError(f"Recipe.{name} must be {rule}, got {getattr(self, name)}")
