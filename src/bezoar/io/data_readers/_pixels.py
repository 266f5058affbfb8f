"""Pixels: decoding image files within bounds, colour and size, and the checks on values."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import MEMORY_CAP, Broken, Picture, Wanted, listed

#: Formats that Pillow decodes in its own code; others start programs (EPS) or have no use here.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
#: Most pixels of one image: 64 million, checked on the header before anything is decoded.
PIXEL_CAP = 64_000_000
_DEPTHS = (1, 3, 4)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's convert("L")
_MORE = "Give fewer images with --limit, or a smaller --size"


def decode(content: bytes | str, where: str) -> Picture | Broken:
    """Decode one image file.

    Args:
        content: The encoded bytes, or a path.
        where: How to name it in an error.

    Returns:
        A picture with 1 or 3 channels (alpha dropped, EXIF orientation applied), or what is wrong with it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata, which does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
                width, height = image.size
                if width * height > PIXEL_CAP:
                    return Broken(where, f"claims {width} x {height} pixels, more than {PIXEL_CAP:,}")
                return Picture(from_pil(image), where)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Broken(where, f"claims more than {PIXEL_CAP:,} pixels")
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, IndexError, ...
        return Broken(where, _reason(error))


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return "not an image" if "cannot identify" in text else (text or type(error).__name__)[:120]


def from_pil(image: Image.Image) -> NDArray[Any]:
    """A Pillow image as ``(H, W, C)`` with 1 or 3 channels; orientation applied, alpha dropped, 16 bits kept."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow gives some of them as 32-bit integers
        return np.asarray(image).astype(np.int64).clip(0, 65535).astype(np.uint16)[:, :, None]
    if image.mode == "F":
        return np.asarray(image, dtype=np.float32)[:, :, None]
    if image.mode in ("1", "L", "LA", "La"):
        return np.array(image.convert("L"))[:, :, None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def channels_last(x: NDArray[Any], wanted: Wanted, *, torch_order: bool) -> NDArray[Any]:
    """A view of a batch of images as ``(N, H, W, C)``.

    Args:
        x: ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``.
        wanted: Settles which axis holds the colours where both could.
        torch_order: Whether ``(N, C, H, W)`` is taken where nothing else settles it.

    Raises:
        DataError: Another number of dimensions, no pixels, or no way to tell where the colours are.
    """
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or 0 in x.shape[1:]:
        hint = "Give x as (N, H, W, C), (N, C, H, W), or (N, H, W) for grey images"
        raise DataError(f"x has the shape {tuple(x.shape)}, which is not a batch of images", hint)
    depths = (*_DEPTHS, wanted.channels)
    first, last = x.shape[1] in depths, x.shape[3] in depths
    if first and last:
        first, last = _by_model(x.shape, wanted)
        if first == last:
            if not torch_order:
                hint = "Give --channels and --size, or store x as (N, H, W, C) with a height other than 1, 3 and 4"
                raise DataError(f"x of shape {tuple(x.shape)} may be NHWC or NCHW", hint)
            first, last = True, False
    if not first and not last:
        hint = "Give grey or RGB images as (N, H, W, C) or (N, C, H, W)"
        raise DataError(f"x of shape {tuple(x.shape)} has no axis of 1, 3 or 4 colour channels", hint)
    return x.transpose(0, 2, 3, 1) if first else x


def _by_model(shape: tuple[int, ...], wanted: Wanted) -> tuple[bool, bool]:
    def fits(channels: int, height: int, width: int) -> bool:
        right_size = wanted.size is None or (height, width) == wanted.size
        return right_size and wanted.channels in (None, channels)

    _, a, b, c = shape
    return fits(a, b, c), fits(c, a, b)


def numeric(x: NDArray[Any]) -> NDArray[Any]:
    """Pixels as uint8, uint16 or float32.

    Raises:
        DataError: Not numbers (object arrays would need a pickle), or integers outside [0, 255].
    """
    if x.dtype in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32)):
        return x
    if x.dtype.kind == "b":
        return x.astype(np.uint8) * 255
    if x.dtype.kind == "f":
        return x.astype(np.float32)
    if x.dtype.kind in "iu":
        low, high = (int(x.min()), int(x.max())) if x.size else (0, 0)
        if low < 0 or high > 255:
            raise DataError(
                f"x holds integers from {low} to {high}", "Give uint8 pixels in [0, 255] or floats in [0, 1]"
            )
        return x.astype(np.uint8)
    raise DataError(
        f"x has the type {x.dtype}, not numbers", "Give one array of uint8 or float, all images of one size"
    )


@dataclass
class Assembly:
    """Puts pictures of one or several sizes into one tensor, and watches their values.

    Args:
        count: How many pictures will come.
        wanted: Size and channels of the tensor; where None, those of the first picture.
    """

    count: int
    wanted: Wanted
    low: float = float("inf")
    high: float = float("-inf")
    finite: bool = True
    broken: list[Broken] = field(default_factory=list)

    def tensor(self, pictures: Iterable[Picture | Broken]) -> Tensor:
        """All pictures as ``(N, C, H, W)`` float32 in [0, 1].

        Raises:
            DataError: Broken pictures, values out of range, sizes or channels that do not fit together, or more than
                the memory allowed.
        """
        out: Tensor | None = None
        place = 0
        for picture in pictures:
            if isinstance(picture, Broken):
                self.broken.append(picture)
                continue
            pixels = self._fitted(picture)
            if out is None:
                out = self._room(pixels.shape)
            if tuple(out.shape[1:]) != pixels.shape:
                raise self._mismatch(tuple(out.shape[1:]), pixels.shape, picture.where)
            out[place] = torch.from_numpy(pixels)
            place += 1
        self._check()
        if out is None or place != self.count:
            raise DataError(
                f"expected {self.count} images, got {place}", "The data changed while it was read, or is damaged"
            )
        return out.clamp_(0, 1)

    def _fitted(self, picture: Picture) -> NDArray[np.float32]:
        pixels = shaped(picture, self.wanted)
        if pixels.dtype.kind == "u":
            values = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
        else:
            values = pixels.astype(np.float32)
        low, high = float(values.min()), float(values.max())
        self.finite = self.finite and np.isfinite(low) and np.isfinite(high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        need = self.count * int(np.prod(shape)) * 4
        if need > MEMORY_CAP:
            message = f"{self.count} images of {shape[1]} x {shape[2]} pixels need {need / 2**30:.1f} GiB, more than "
            raise DataError(f"{message}{MEMORY_CAP / 2**30:g} GiB", _MORE)
        return torch.empty(self.count, *shape)

    def _mismatch(self, first: tuple[int, ...], other: tuple[int, ...], where: str) -> DataError:
        if first[0] != other[0]:
            return DataError(f"the first image has {first[0]} channels, {where} has {other[0]}", "Give --channels")
        sizes = f"the first image has {first[1]} x {first[2]} pixels, {where} has {other[1]} x {other[2]}"
        return DataError(sizes, "Give the input size of the model with --size")

    def _check(self) -> None:
        if self.broken:
            message = f"{len(self.broken)} of {self.count} images cannot be read: "
            message += listed([f"{b.where} ({b.reason})" for b in self.broken])
            raise DataError(message, "Remove them or fetch them again")
        if not self.finite:
            raise DataError("x holds NaN or Inf", "Remove those images, or look at how the array was made")
        if self.low < -1e-4 or self.high > 1 + 1e-4:
            raise DataError(f"pixels lie in [{self.low:.4g}, {self.high:.4g}], not in [0, 1]", self._range_hint())
        if self.high < 1.5 / 255:
            message = f"all images are almost black: the largest pixel is {self.high:.4g} on the scale from 0 to 1"
            raise DataError(message, "Were pixels in [0, 1] stored as uint8, or divided by 255 twice?")

    def _range_hint(self) -> str:
        if self.low < 0:
            return "They look normalised: give raw pixels, and the normalisation of the model with --mean and --std"
        if self.high <= 255:
            return "They look like [0, 255]: divide by 255, or store them as uint8"
        return "Scale them to [0, 1]"


def shaped(picture: Picture, wanted: Wanted) -> NDArray[Any]:
    """The pixels of a picture ``(H, W, C)`` in the colours and the size that are wanted, in their own type.

    Raises:
        DataError: The colours do not fit.
    """
    pixels = _colours(picture, wanted.channels)
    return pixels if wanted.size in (None, pixels.shape[:2]) else _resized(pixels, wanted.size)


def _colours(picture: Picture, channels: int | None) -> NDArray[Any]:
    pixels = picture.pixels
    depth = pixels.shape[2]
    if channels == depth:
        return pixels
    if depth == 4:  # alpha
        pixels, depth = pixels[:, :, :3], 3
    if channels in (None, depth):
        return pixels
    if depth == 1:
        return np.repeat(pixels, channels, axis=2)
    if channels == 1 and depth == 3:
        if pixels.dtype == np.uint8:
            return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]
        grey = pixels.astype(np.float32) @ _LUMA
        return grey.round().astype(pixels.dtype)[:, :, None] if pixels.dtype.kind == "u" else grey[:, :, None]
    raise DataError(
        f"{picture.where} has {depth} channels, the model takes {channels}", "Give images that fit the model"
    )


def _resized(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Bilinear with antialiasing, as Pillow does it; 8-bit images are rounded to 8 bits again."""
    shape = (size[1], size[0])
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
        return np.asarray(image.resize(shape, Image.Resampling.BILINEAR)).reshape(*size, pixels.shape[2])
    top = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    planes = [Image.fromarray(np.ascontiguousarray(pixels[:, :, c], dtype=np.float32)) for c in range(pixels.shape[2])]
    return np.stack([np.asarray(p.resize(shape, Image.Resampling.BILINEAR)) for p in planes], axis=2) / np.float32(top)
