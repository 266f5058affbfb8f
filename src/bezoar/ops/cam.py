"""Class-activation maps: where in an image a network sees a label."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.surgery import logits
from bezoar.ops.attention import Tap, find_taps


def cam_layer(model: nn.Module, x: Tensor) -> Tap:
    """The deepest layer whose output is a picture with more than one place.

    Args:
        model: Eval mode.
        x: At least two images.

    Raises:
        UnsupportedModel: There is none, as in a network of tokens.
    """
    pictures = [tap for tap in find_taps(model, x, most=8) if len(tap.positions) == 2]
    if not pictures:
        raise UnsupportedModel(f"{type(model).__name__} has no layer that gives pictures (B, C, H, W)")
    return pictures[-1]


def grad_cam(model: nn.Module, tap: Tap, x: Tensor, label: int) -> Tensor:
    """Grad-CAM: the layer's channels, each weighted by its mean gradient of the label's logit, above zero.

    The gradient ends at the layer: none of the input or of the parameters is taken.

    Args:
        model: Eval mode.
        tap: The layer, see :func:`cam_layer`.
        x: ``(B, C, H, W)``.
        label: Label to look for.

    Returns:
        ``(B, H, W)`` of the size of the images, in [0, 1]: the largest value of each image is 1, unless all are 0.

    References:
        Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra, "Grad-CAM: Visual Explanations from Deep Networks via
        Gradient-based Localization", ICCV 2017.
    """
    kept: list[Tensor] = []
    calls = [0]

    def cut(_module: nn.Module, _given: Any, out: Tensor) -> Tensor | None:
        calls[0] += 1
        if calls[0] != tap.call + 1:
            return None
        kept.append(out.detach().requires_grad_())
        return kept[0].clone()  # a copy: an activation that comes after may work in place

    handle = model.get_submodule(tap.name).register_forward_hook(cut)
    try:
        with torch.enable_grad():
            score = logits(model, x)[:, label].sum()
            (gradient,) = torch.autograd.grad(score, kept)
    finally:
        handle.remove()
    features = kept[0].detach()
    if tap.last:
        features, gradient = features.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    weights = gradient.float().mean((2, 3), keepdim=True)
    seen = F.relu((weights * features.float()).sum(1, keepdim=True))
    large = F.interpolate(seen, size=x.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    return large / large.amax((1, 2), keepdim=True).clamp(min=torch.finfo(large.dtype).tiny)
