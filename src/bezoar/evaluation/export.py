"""A poisoned training set as files that other tools read, and pictures of what a trigger does."""

from __future__ import annotations

import base64
import io
import os
import shutil
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from bezoar.attacks._attack import GroundTruth
from bezoar.attacks._poison import stamped
from bezoar.core.examples import Examples
from bezoar.core.pictures import png
from bezoar.io.containers import replace_when_done
from bezoar.ops.fit import as_float

_ROWS = 8
_SIDE = 96  # pixels that an image of the sheet has at least
_GAP = 4


def export_npz(data: Examples, names: tuple[str, ...], path: Path) -> None:
    """Write ``x`` (``(N, H, W, C)``, of the type of the images), ``y`` and ``names``; whole or not at all."""
    with replace_when_done(path) as part, part.open("wb") as file:
        np.savez(file, x=data.x.permute(0, 2, 3, 1).numpy(), y=data.y.numpy(), names=np.array(names))


def export_images(data: Examples, folder: Path) -> None:
    """Write PNG files, one folder per label (``00003/0000017.png`` is example 17, labelled 3); whole or not at all.

    Floats are rounded to grey levels.
    """
    part = folder.with_name(f".{folder.name}.{uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        for label in torch.unique(data.y).tolist():
            (part / f"{label:05d}").mkdir()
        for i, (image, label) in enumerate(zip(data.x, data.y.tolist(), strict=True)):
            content = base64.b64decode(png(as_float(image)))
            (part / f"{label:05d}" / f"{i:07d}.png").write_bytes(content)
        old = part.with_suffix(".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def examples_sheet(x: Tensor, y: Tensor, truth: GroundTruth) -> bytes:
    """PNG of some test images: a row for each, clean, triggered, and the absolute difference, amplified by the
    factor that stands above it.

    Args:
        x: ``(N, C, H, W)`` clean images.
        y: ``(N,)`` labels; only images on which a trigger shall work are shown.
        truth: The triggers, which share the rows.
    """
    rows = []
    share = max(1, _ROWS // len(truth.plants))
    for plant in truth.plants:
        chosen = torch.nonzero(plant.labels.applies(y)).flatten()
        chosen = chosen[torch.linspace(0, max(0, len(chosen) - 1), min(share, len(chosen))).round().long()]
        rows += [(as_float(x[i]), as_float(stamped(plant.trigger, x[i : i + 1]))[0]) for i in chosen.tolist()]
    largest = max((float((changed - clean).abs().max()) for clean, changed in rows), default=0.0)
    factor = max(1, min(50, int(1 / max(largest, 1e-6))))  # so that faint changes show
    return _sheet(
        [(clean, changed, ((changed - clean).abs() * factor).clamp(0, 1)) for clean, changed in rows],
        ("clean", "triggered", f"difference x{factor}"),
    )


def _sheet(rows: list[tuple[Tensor, Tensor, Tensor]], names: tuple[str, str, str]) -> bytes:
    pictures = [[Image.open(io.BytesIO(base64.b64decode(png(image)))) for image in row] for row in rows]
    width, height = pictures[0][0].size if pictures else (1, 1)
    factor = -(-_SIDE // min(width, height))
    width, height = width * factor, height * factor
    head = 16
    sheet = Image.new("RGB", (3 * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP + head), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(names):
        left = _GAP + column * (width + _GAP)
        draw.text((left, 2), text, fill="black")
        for row, line in enumerate(pictures):
            large = line[column].resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(large, (left, head + _GAP + row * (height + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
