"""What the guards that look into a model read of clean images."""

from __future__ import annotations

import torch
from torch import Tensor

from bezoar.core.guarding import See
from bezoar.core.run import Run

_BATCH = 256


def read(see: See, x: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """``(N, K)`` logits and ``(N, D)`` features of ``(N, C, H, W)`` images, float64 on the CPU."""
    answers, features = [], []
    for part in torch.split(x, _BATCH):
        run.check()
        out, found = see(part.to(run.device))
        answers.append(out.cpu().double())
        features.append(found.cpu().double())
    return torch.cat(answers), torch.cat(features)
