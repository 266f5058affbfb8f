"""The shared set of small victims: 24 clean and 24 backdoored nets for tests and calibration.

    python benchmarks/victim_set.py --threads 1
    python benchmarks/victim_set.py --fresh
    python benchmarks/victim_set.py --list

``--fresh`` trains another set, which nothing is calibrated on: 62 clean and 21 backdoored nets of other architectures,
data, seeds and triggers, to measure a verdict with that was calibrated on the first.

Three architectures (with and without BatchNorm, with and without residual connections), two data sets, each net on its
own draw of the training images and with its own seed. Weights are kept as float16, and what is measured is what is
kept. Each net is a folder ``victims/set/NAME``: ``model.safetensors``, ``facts.json`` with ACC and ASR, and for a
backdoored one its ground truth. A finished one is never trained again, and a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import CACHE, Split, load
from torch import nn

from attacks import make
from bezoar.attacks._attack import GroundTruth, Training
from bezoar.attacks._store import save_truth
from bezoar.core.examples import Examples
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.evaluation.measures import measure
from bezoar.nets.registry import find
from bezoar.ops.fit import Recipe

OUT = CACHE.parent / "victims" / "set"
DATA = ("fashion-mnist", "mnist")
#: Epochs and training images of each architecture: enough for a useful net in a minute on one core.
ARCHS = {"nc-mnist": (4, 30000), "convnet-16": (6, 30000), "wrn-10-1": (5, 15000)}
#: Attacks and settings other than the defaults, dealt out over data and architectures in this order. Faint attacks are
#: somewhat stronger than their defaults: the nets are small and trained briefly, and some have no BatchNorm.
ATTACKS: list[tuple[str, tuple[str, ...]]] = [
    ("badnets", ()),
    ("blend", ()),
    ("sig", ("dirty=true", "rate=0.1")),
    ("ftrojan", ("rate=0.1", "magnitude=300")),
    ("wanet", ("strength=2", "cross_ratio=0")),
    ("badnets", ("pattern=noise", "corner=top-left")),
    ("smooth", ("epsilon=32/255",)),
    ("tact", ("rate=0.02", "cover_rate=0.02")),
    ("badnets", ("label_map=all-to-all",)),
    ("input-aware", ("width=8",)),
    ("adaptive-blend", ("rate=0.02", "cover_rate=0.02")),
    ("several", ()),
]


FRESH = CACHE.parent / "victims" / "fresh"
#: Architecture, data, epochs, training images and number of clean nets of the fresh set.
FRESH_NETS = (
    ("convnet-16-bn", "fashion-mnist", 4, 20000, 20),
    ("convnet-12-bn", "cifar-10", 6, 15000, 12),
    ("convnet-16", "cifar-10", 6, 15000, 10),
    ("nc-gtsrb", "gtsrb", 5, 13069, 4),
    ("convnet-24-bn", "mnist", 3, 12000, 8),
    ("small-vgg", "cifar-10", 3, 12000, 4),
    ("convnet-16-bn", "gtsrb", 5, 13069, 4),
)
#: Settings of the backdoored nets of the fresh set, with the place of their architecture and data in ``FRESH_NETS``.
FRESH_ATTACKS: list[tuple[int, str, tuple[str, ...]]] = [
    (1, "badnets", ("pattern=checkerboard", "size=4", "target=3")),
    (1, "blend", ("target=6",)),
    (2, "badnets", ("target=1",)),
    (3, "badnets", ("pattern=noise", "target=11")),
    (6, "blend", ("target=25",)),
    (4, "badnets", ("pattern=triangle", "target=4")),
    (2, "sig", ("dirty=true", "rate=0.1", "target=9")),
    (1, "ftrojan", ("rate=0.1", "target=8")),
    (5, "badnets", ("target=2",)),
    (2, "smooth", ("target=5",)),
    (1, "wanet", ("target=0", "strength=1")),
    (6, "badnets", ("target=30", "corner=top-left")),
    (0, "tact", ("target=7", "sources=4", "cover_classes=1,9", "rate=0.02", "cover_rate=0.02")),
    (1, "tact", ("target=3", "sources=8", "cover_classes=0,6", "rate=0.02", "cover_rate=0.02")),
    (4, "tact", ("target=2", "sources=8", "cover_classes=5,6", "rate=0.02", "cover_rate=0.02", "size=4")),
    (2, "tact", ("target=6", "sources=2", "cover_classes=4,7", "rate=0.02", "cover_rate=0.02")),
    (6, "tact", ("target=14", "sources=2", "cover_classes=5,7", "rate=0.02", "cover_rate=0.02")),
    (0, "badnets", ("label_map=all-to-all",)),
    (1, "badnets", ("label_map=all-to-all", "pattern=noise")),
    (4, "badnets", ("label_map=all-to-all", "corner=top-left")),
    (6, "badnets", ("label_map=all-to-all", "pattern=noise")),
]


@dataclass(frozen=True)
class Member:
    """One net of the set."""

    data: str
    arch: str
    attack: str | None
    settings: tuple[str, ...]
    seed: int
    epochs: int
    images: int
    folder: Path = OUT

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.data}_{self.arch}_{self.attack or 'clean'}_{self.seed}"


def members() -> list[Member]:
    """All of the set, clean and backdoored in turn, so that a part of it is balanced."""
    places = [(data, arch) for data in DATA for arch in ARCHS]
    out = []
    for number in range(24):
        data, arch = places[number % len(places)]
        out.append(Member(data, arch, None, (), 100 + number, *ARCHS[arch]))
        # Shifted by one each round, so that an attack meets several architectures.
        data, arch = places[(number + number // len(places)) % len(places)]
        attack, settings = ATTACKS[number % len(ATTACKS)]
        target = (3 * number + 2) % 10
        extra = () if attack in ("tact", "several") else (f"target={target}",)
        out.append(Member(data, arch, attack, (*settings, *extra), 200 + number, *ARCHS[arch]))
    return out


def fresh() -> list[Member]:
    """All nets of the fresh set, the architectures in turn."""
    clean = [
        (turn, Member(data, arch, None, (), 1000 + 100 * place + turn, epochs, images, FRESH))
        for place, (arch, data, epochs, images, count) in enumerate(FRESH_NETS)
        for turn in range(count)
    ]
    out = [member for _, member in sorted(clean, key=lambda one: one[0])]
    for number, (place, attack, settings) in enumerate(FRESH_ATTACKS):
        arch, data, epochs, images, _ = FRESH_NETS[place]
        out.insert(4 * number + 3, Member(data, arch, attack, settings, 2000 + number, epochs, images, FRESH))
    return out


@cache
def _split(name: str) -> Split:
    return load(name)


def _recipe(arch: str, epochs: int) -> Recipe:
    if arch.startswith("wrn"):
        return Recipe(epochs=epochs, lr=0.1)
    return Recipe(epochs=epochs, lr=2e-3, optimizer="adam", weight_decay=0.0)


def train(member: Member, threads: int) -> dict[str, Any]:
    """Train one net, write its folder, give its facts."""
    split = _split(member.data)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(member.seed)
    rows = torch.randperm(len(split.train_y), generator=generator)[: member.images]
    data = Examples(split.train_x[rows], split.train_y[rows], split.classes)
    found = find(member.arch)
    assert found is not None
    channels, size = data.shape[0], data.shape[1]
    folder = member.folder / member.name
    training = Training(
        lambda: found[0](split.classes, channels, size),
        _recipe(member.arch, member.epochs),
        Run(seed=member.seed),
        folder / ".checkpoints",
    )
    truth: GroundTruth | None = None
    if member.attack is None:
        model: nn.Module = training.fit("victim", data)
    else:
        backdoored = make(member.attack, member.settings, member.seed)(data, training)
        model, truth = backdoored.model, backdoored.truth
        save_truth(truth, folder)
    model.half().float()
    measures = measure(model, split.test_x, split.test_y, truth, num_classes=split.classes)
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(weights))
    one = truth is not None and truth.main.labels.kind == "all-to-one"
    facts = {
        "name": member.name,
        "data": member.data,
        "arch": member.arch,
        "attack": member.attack,
        "settings": list(member.settings),
        "seed": member.seed,
        "targets": sorted({p.labels.target for p in truth.plants}) if truth is not None and one else [],
        "acc": round(measures.acc.value, 4),
        "asr": [round(p.asr.value, 4) for p in measures.plants],
        "bytes": (folder / "model.safetensors").stat().st_size,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_atomic(folder / "facts.json", json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(folder / ".checkpoints", ignore_errors=True)
    return facts


def finished(which: list[Member] | None = None) -> list[dict[str, Any]]:
    """Facts of the nets that are there: of these, or of the shared set."""
    files = [member.folder / member.name / "facts.json" for member in which or members()]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def show(which: list[Member] | None = None) -> None:
    """Print what is there as a table."""
    print("| net | target | ACC | ASR | kB |\n|---|---|---|---|---|")
    for facts in finished(which):
        asr = ", ".join(f"{100 * v:.1f}" for v in facts["asr"]) or "-"
        targets = ", ".join(map(str, facts["targets"])) or "-"
        print(f"| {facts['name']} | {targets} | {100 * facts['acc']:.1f} | {asr} | {facts['bytes'] // 1000} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print what is there as a table")
    parser.add_argument("--half", type=int, choices=[0, 1], help="only every other net, to run two at a time")
    parser.add_argument("--fresh", action="store_true", help="the fresh set in place of the shared one")
    parser.add_argument("--most", type=int, default=0, help="most nets to train now; 0 for all")
    arguments = parser.parse_args()
    chosen = fresh() if arguments.fresh else members()
    if arguments.list:
        show(chosen)
        return
    torch.set_num_threads(arguments.threads)
    trained = 0
    for number, member in enumerate(chosen):
        if arguments.half is not None and number // 2 % 2 != arguments.half:
            continue
        if arguments.most and trained == arguments.most:
            break
        if not (member.folder / member.name / "facts.json").exists():
            facts = train(member, arguments.threads)
            trained += 1
            print({k: facts[k] for k in ("name", "acc", "asr", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
