"""Nets with many labels for the study of the scan's cost: digits at places, turned, and in both polarities.

A label is a digit and a transformation of it, so that real pictures of any number of labels can be made: the digits of
MNIST at half size on an empty 28 x 28 image, at one of 64 places, turned by one of four quarter turns, white on black
or black on grey. Neighbouring labels are as alike as two faces. Each net has one backdoor, a 4 x 4 white square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import CACHE, load
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.attacks.badnets import BadNets
from bezoar.core.examples import Examples
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.evaluation.measures import measure
from bezoar.nets.neural_cleanse import MnistNet
from bezoar.ops.fit import Recipe

OUT = CACHE.parent / "victims" / "labels"
MOST = 10 * 64 * 4 * 2
TARGET, PLACES = 3, 8


def pictures(x: Tensor, digits: Tensor, labels: int, count: int, seed: int) -> Examples:
    """``count`` images of ``labels`` labels, balanced, each from a random picture of its digit.

    Args:
        x: ``(N, 1, 28, 28)`` uint8 digits.
        digits: ``(N,)`` which they are.
        labels: Number of labels, at most 5,120.
        count: Number of images.
        seed: Of the pictures.
    """
    if not 10 <= labels <= MOST:
        raise ValueError(f"labels must be in 10..{MOST}, got {labels}")
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % labels
    y = y[torch.randperm(count, generator=generator)]
    members = [torch.nonzero(digits == digit).flatten() for digit in range(10)]
    small = torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8)
    # Transformations far apart first, so that few labels differ much: 0 is in the middle of none of the axes.
    order = torch.randperm(MOST // 10, generator=torch.Generator().manual_seed(7)).tolist()
    out = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    places = torch.rand(count, generator=generator).tolist()
    for row, label in enumerate(y.tolist()):
        digit, change = label % 10, order[label // 10]
        own = members[digit]
        picture = small[own[int(places[row] * len(own))]]
        change, turns = divmod(change, 4)
        change, dark = divmod(change, 2)
        top, left = (2 * at for at in divmod(change, PLACES))
        picture = torch.rot90(picture, turns, (1, 2))
        if dark:
            out[row] = 128
            picture = 128 - picture // 2
        out[row, :, top : top + 14, left : left + 14] = picture
    return Examples(out, y, labels)


def victim(labels: int, images: int = 60_000, epochs: int = 6) -> tuple[nn.Module, Examples, dict[str, Any]]:
    """The net of so many labels, its clean test images, and what it is; trained where it is not there yet."""
    split, folder = load("mnist"), OUT / str(labels)
    test = pictures(split.test_x, split.test_y, labels, max(2 * labels, 1000), seed=1)
    model: nn.Module = MnistNet(labels)
    weights, facts_file = folder / "model.safetensors", folder / "facts.json"
    if not facts_file.exists():
        data = pictures(split.train_x, split.train_y, labels, max(images, 25 * labels), seed=0)
        recipe = Recipe(epochs=epochs, batch=64, lr=1e-3, optimizer="adam", weight_decay=0.0)
        training = Training(lambda: MnistNet(labels), recipe, Run(seed=0), folder / ".checkpoints")
        made = BadNets(target=TARGET, rate=0.1)(data, training)
        found = measure(made.model, test.x, test.y, made.truth, num_classes=labels)
        state = {name: value.contiguous() for name, value in made.model.state_dict().items()}
        write_atomic(weights, safetensors.torch.save(state))
        facts = {"labels": labels, "acc": round(found.acc.value, 4), "asr": round(found.asr.value, 4)}
        write_atomic(facts_file, json.dumps(facts) + "\n")
        for left in (folder / ".checkpoints").glob("*"):
            left.unlink()
    model.load_state_dict(safetensors.torch.load(Path(weights).read_bytes()))
    return model.eval(), test, json.loads(facts_file.read_text())
