"""Additive inversion: the faintest change of all pixels that causes each label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bezoar.core.evidence import Unit
from bezoar.core.space import AdditiveSpace
from bezoar.scanners._together import Together


@dataclass(frozen=True, kw_only=True)
class AdditiveInversion(Together):
    """Search, for each label, the faintest change of the whole image that turns any image into that label.

    The counterpart of Neural Cleanse for triggers that lie over the whole image: blended pictures, waves, noise. A mask
    in pixels is large for them, so Neural Cleanse sees little; their root mean square is small. The same search and the
    same cost controller, with ``clip(x + d, 0, 1)`` and the size ``sqrt(mean d^2)`` in place of mask and pattern.

    Args:
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels to look at, which alone can be the target; empty for all. Others are sampled for the median.
        steps: Steps, one batch each.
        batch: Images per step, the same ones for all labels.
        lr: Step size of Adam.
        reach: Success rate that counts as a success, in (0, 1].
        loss: ``ce`` (cross-entropy) or ``linear`` (what the code of Neural Cleanse computes).
        pressure: First weight of the size.
        candidates: Smallest labels that are followed to the end.
        reference_labels: Random labels that are followed to the end for median and MAD.
        chunk: Most images in one forward pass, for memory; 0 chooses by image size.
        precision: ``auto`` uses bf16 or fp16 on CUDA; ``fp32`` never does.

    References:
        Ours, after Wang et al., "Neural Cleanse", IEEE S&P 2019, and Moosavi-Dezfooli, Fawzi, Fawzi, Frossard,
        "Universal Adversarial Perturbations", CVPR 2017.
    """

    unit: ClassVar[Unit] = "rms"
    phase: ClassVar[str] = "scan for faint changes"
    alone: ClassVar[bool] = False  # natural features can be as faint as a trigger: masks must confirm it

    steps: int = 60
    lr: float = 0.05
    pressure: float = 8.0

    def space(self, shape: tuple[int, int, int]) -> AdditiveSpace:
        """See :class:`Together`."""
        return AdditiveSpace(shape)
