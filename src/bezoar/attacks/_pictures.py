"""Pictures of the attacker: patterns to blend in, and reflections."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bezoar.core.errors import DataError, SettingError

#: Formats that Pillow decodes in its own code; others start programs (EPS).
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")

Noise = Literal["gaussian", "uniform"]


def read_picture(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """A picture resized to ``shape`` (C, H, W), grey or RGB, in [0, 1].

    Raises:
        DataError: It cannot be read.
        SettingError: ``shape`` has neither 1 nor 3 channels.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise SettingError(f"a picture has 1 or 3 colour channels, the images have {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                fitted = image.convert("L" if channels == 1 else "RGB").resize(
                    (width, height), Image.Resampling.BICUBIC
                )
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, ...
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"the picture {path} cannot be read ({reason})", "Give a PNG or JPEG file") from None
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)
    return pixels.view(height, width, channels).permute(2, 0, 1).contiguous()


def read_folder(folder: Path, shape: tuple[int, int, int], limit: int) -> Tensor:
    """The first pictures of a folder in the order of their names, ``(N, C, H, W)`` with N at most ``limit``.

    Raises:
        DataError: The folder has no pictures, or one of them cannot be read.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not files:
        raise DataError(f"no pictures in {folder}", "Give a folder of PNG or JPEG files")
    return torch.stack([read_picture(file, shape) for file in files[:limit]])


def blend_pattern(picture: str, noise: Noise, shape: tuple[int, int, int], seed: int) -> Tensor:
    """What is blended over an image, ``(C, H, W)`` in [0, 1]: a picture, or noise where ``picture`` is empty."""
    if picture:
        return read_picture(Path(picture).expanduser(), shape)
    generator = torch.Generator().manual_seed(seed)
    if noise == "uniform":
        return torch.rand(shape, generator=generator)
    return torch.clamp(0.5 + 0.25 * torch.randn(shape, generator=generator), 0, 1)
