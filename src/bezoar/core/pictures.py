"""Pictures as text: tensors to base64 PNG for the report, and back."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bezoar.core.errors import DataError, SettingError

Pixels = NDArray[np.float32]


def png(image: Tensor | NDArray[Any]) -> str:
    """A picture as base64 PNG; the same pixels give the same text.

    Args:
        image: ``(C, H, W)`` in [0, 1]; one channel is shown grey, three as RGB, any other number as their mean.
            Values outside are clipped, NaN is black.

    Raises:
        SettingError: The image does not have three dimensions, or no pixels.
    """
    pixels = _channels(image)
    levels = np.rint(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=9)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnails(images: Tensor, side: int) -> list[str]:
    """``(B, C, H, W)`` images in [0, 1] as base64 PNG, made smaller where a side is longer than ``side`` pixels."""
    if max(images.shape[2:]) > side:
        images = F.interpolate(images, scale_factor=side / max(images.shape[2:]), mode="area")
    return [png(image) for image in images]


def stamp_picture(mask: Tensor | NDArray[Any], pattern: Tensor | NDArray[Any]) -> str:
    """``mask * pattern`` as base64 PNG: what the trigger adds, on black.

    Args:
        mask: ``(1, H, W)`` in [0, 1].
        pattern: ``(C, H, W)`` in [0, 1].

    Raises:
        SettingError: The shapes do not fit together.
    """
    shade, colours = _array(mask), _array(pattern)
    if shade.ndim != 3 or len(shade) != 1 or colours.ndim != 3 or shade.shape[1:] != colours.shape[1:]:
        raise SettingError(f"expected a mask (1, H, W) and a pattern (C, H, W), got {shade.shape} and {colours.shape}")
    return png(shade * colours)


def change_picture(delta: Tensor | NDArray[Any]) -> str:
    """An additive change on mid-grey as base64 PNG, amplified until its largest value is white or black.

    Args:
        delta: ``(C, H, W)`` in [-1, 1].
    """
    change = _array(delta)
    largest = float(np.abs(change).max(initial=0.0))
    return png(0.5 + 0.5 * change / max(largest, 1e-12))


def picture(text: str) -> Pixels:
    """The reverse of `png`: ``(C, H, W)`` in [0, 1], with C = 1 or 3.

    Raises:
        DataError: The text is not a PNG in base64.
    """
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",))
        levels = np.asarray(opened.convert("L" if opened.mode == "L" else "RGB"))
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not a PNG picture in base64: {error}") from None
    image: Pixels = (levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)).astype(np.float32) / np.float32(
        255
    )
    return image


def _array(image: Tensor | NDArray[Any]) -> Pixels:
    values = image.detach().float().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    return values.astype(np.float32)


def _channels(image: Tensor | NDArray[Any]) -> Pixels:
    pixels = _array(image)
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise SettingError(f"a picture must be (C, H, W) with at least one pixel, got shape {pixels.shape}")
    if len(pixels) in (1, 3):
        return pixels
    mean: Pixels = pixels.mean(axis=0, keepdims=True).astype(np.float32)
    return mean
