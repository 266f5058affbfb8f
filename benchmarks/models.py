"""The models of the studies: published checkpoints, where they are present, and the victims made by ``victims.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import SHARED, load
from torch import Tensor
from victim_set import Member, finished, fresh, members
from victims import OUT, VICTIMS

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Case:
    """A model file, how to read it, its data, and the truth.

    ``target`` is the planted label; None: clean; -1: no claim (repaired, or every label is mapped to another one).
    ``targets`` are all planted labels.
    """

    part: str
    name: str
    path: Path
    data: str
    settings: dict[str, object]
    target: int | None
    attack: str
    targets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.targets and self.target not in (None, -1):
            object.__setattr__(self, "targets", (self.target,))

    def clean_images(self, seed: int, count: int = 500) -> tuple[Tensor, Tensor]:
        """A random draw of test images, as many of each class as there are."""
        split = load(self.data)
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(len(split.test_y), generator=generator)
        each = max(2, count // split.classes)
        rows = torch.cat([order[split.test_y[order] == label][:each] for label in range(split.classes)])
        return split.test_x[rows], split.test_y[rows]


def _published() -> list[Case]:
    rows: list[tuple[str, str, str, dict[str, object], int | None, str]] = [
        ("nad/student.pth.tar", "nad-student", "cifar-10", {"arch": "wrn-16-1"}, 5, "3x3 grid"),
        ("nad/teacher.pth.tar", "nad-teacher", "cifar-10", {"arch": "wrn-16-1"}, -1, "fine-tuned, ASR 2.8"),
        ("nad/erased.pth.tar", "nad-erased", "cifar-10", {"arch": "wrn-16-1"}, -1, "NAD, ASR 4.2"),
        ("resnet_cifar/resnet20-12fca82f.th", "resnet-20", "cifar-10", {"arch": "resnet-20", **_IMAGENET}, None, "-"),
        ("resnet_cifar/resnet44-014dd654.th", "resnet-44", "cifar-10", {"arch": "resnet-44", **_IMAGENET}, None, "-"),
        ("ibau/cifar10-badnets-target8.pth", "ibau-badnets", "cifar-10", {"arch": "small-vgg"}, 8, "4x4 square"),
        ("ibau/cifar10-trojan-wm-target2.pth", "ibau-trojan-wm", "cifar-10", {"arch": "small-vgg"}, 2, "watermark"),
        ("ibau/gtsrb-badnets-target8.pth", "ibau-gtsrb", "gtsrb", {"arch": "small-vgg"}, 8, "4x4 square"),
        ("ibau/gtsrb-l0-inv-target0.pth", "ibau-l0-inv", "gtsrb", {"arch": "small-vgg"}, 0, "L0 inv"),
    ]
    return [
        Case("published", name, SHARED / "models" / file, data, settings, target, attack)
        for file, name, data, settings, target, attack in rows
    ]


def _set(part: str, which: list[Member]) -> list[Case]:
    found = []
    for facts in finished(which):
        if any(asr < 0.8 for asr in facts["asr"]):
            continue  # the backdoor did not take: there is nothing to find
        targets = tuple(facts["targets"])
        target = None if facts["attack"] is None else targets[0] if targets else -1
        path = which[0].folder / facts["name"] / "model.safetensors"
        settings = {"arch": facts["arch"]}
        attack = " ".join([facts["attack"] or "clean", *facts["settings"][:1]])
        found.append(Case(part, facts["name"], path, facts["data"], settings, target, attack, targets))
    return found


def cases(part: str) -> list[Case]:
    """Cases of ``published``, ``calibration``, ``report``, ``set`` or ``fresh`` whose files are present."""
    if part in ("set", "fresh"):
        return _set(part, members() if part == "set" else fresh())
    if part == "published":
        return [case for case in _published() if case.path.exists()]
    found = []
    for victim in (v for v in VICTIMS if v.part == part):
        facts_file = OUT / f"{victim.name}.json"
        if not facts_file.exists():
            continue
        facts = json.loads(facts_file.read_text())
        path = facts_file.with_suffix(".safetensors")
        attack = victim.name.split("_")[2]
        found.append(Case(part, victim.name, path, victim.data, {"arch": victim.arch}, facts["target"], attack))
    return found
