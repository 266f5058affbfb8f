"""Train the small clean and backdoored nets that the studies use; a finished one is never trained again.

    python benchmarks/victims.py --part calibration --threads 1
    python benchmarks/victims.py --part report

``calibration`` nets set thresholds, ``report`` nets measure them: other data, other architectures, other seeds.
Each goes to ``OUT/NAME.safetensors`` with its ground truth beside it in ``NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import CACHE, Split, load
from safetensors.torch import save_file

from bezoar.attacks._poison import PoisonAttack
from bezoar.attacks.badnets import BadNets
from bezoar.attacks.blend import Blend
from bezoar.attacks.sig import SIG
from bezoar.core.examples import Examples
from bezoar.evaluation.measures import measure
from bezoar.nets.registry import find
from bezoar.ops.fit import Recipe, as_float, fit

OUT = CACHE.parent / "victims"


@dataclass(frozen=True)
class Victim:
    """A net to train: which part it belongs to, its data, its architecture and what is planted."""

    part: str
    data: str
    arch: str
    attack: PoisonAttack | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        kind = "clean" if self.attack is None else type(self.attack).__name__.lower()
        if isinstance(self.attack, BadNets):
            kind = self.attack.pattern
        return f"{self.data}_{self.arch}_{kind}_{self.seed}"


def _part(part: str, seed: int, rows: list[tuple[str, str, PoisonAttack | None]]) -> list[Victim]:
    return [Victim(part, data, arch, attack, seed) for data, arch, attack in rows]


VICTIMS = [
    *_part(
        "calibration",
        1,
        [
            ("gtsrb", "wrn-16-1", None),
            ("gtsrb", "wrn-16-1", Blend(target=7)),
            ("mnist", "nc-mnist", None),
            ("mnist", "nc-mnist", BadNets(target=2)),
            ("gtsrb", "nc-gtsrb", None),
            ("gtsrb", "nc-gtsrb", BadNets(target=12, pattern="noise", corner="top-left")),
            ("mnist", "nc-mnist", Blend(target=4)),
            ("gtsrb", "wrn-16-1", BadNets(target=3)),
            ("gtsrb", "nc-gtsrb", SIG(target=1, dirty=True, rate=0.1)),
            ("cifar-10", "wrn-10-1", None),
            ("cifar-10", "wrn-10-1", SIG(target=6, dirty=True, rate=0.1)),
            ("mnist", "wrn-10-1", None),
            ("mnist", "wrn-10-1", SIG(target=9, dirty=True, rate=0.1)),
        ],
    ),
    *_part(
        "report",
        2,
        [
            ("cifar-10", "wrn-16-1", None),
            ("fashion-mnist", "nc-mnist", None),
            ("fashion-mnist", "nc-mnist", BadNets(target=7)),
            ("cifar-10", "wrn-16-1", BadNets(target=3)),
            ("fashion-mnist", "wrn-16-1", None),
            ("cifar-10", "nc-gtsrb", None),
            ("cifar-10", "wrn-16-1", Blend(target=8)),
            ("fashion-mnist", "nc-mnist", Blend(target=5)),
            ("fashion-mnist", "wrn-16-1", SIG(target=4, dirty=True, rate=0.1)),
            ("fashion-mnist", "wrn-16-1", BadNets(target=0, pattern="noise")),
            ("cifar-10", "nc-gtsrb", BadNets(target=1, pattern="noise", corner="top-right")),
            ("cifar-10", "nc-gtsrb", SIG(target=9, dirty=True, rate=0.1)),
        ],
    ),
]

# Enough for a useful accuracy in minutes on one core; nets without BatchNorm train faster with Adam.
EPOCHS = {"gtsrb": 10, "mnist": 3, "fashion-mnist": 4, "cifar-10": 6}
PLAIN_EPOCHS = EPOCHS | {"cifar-10": 4}


def recipe_for(victim: Victim) -> Recipe:
    """SGD with BatchNorm, Adam without; natural photographs are cropped and flipped, signs and digits are not."""
    photographs = victim.data == "cifar-10"
    plain = victim.arch.startswith("nc-")
    return Recipe(
        epochs=(PLAIN_EPOCHS if plain else EPOCHS)[victim.data],
        lr=1e-3 if plain else 0.1,
        optimizer="adam" if plain else "sgd",
        weight_decay=0.0 if plain else 5e-4,
        pad=2 if photographs else 0,
        flip=photographs,
    )


def train(victim: Victim, data: Split) -> tuple[torch.nn.Module, dict[str, object]]:
    """Train one victim and measure it."""
    found = find(victim.arch)
    assert found is not None
    torch.manual_seed(victim.seed)
    channels, size = data.train_x.shape[1], data.train_x.shape[2]
    model = found[0](data.classes, channels, size).to(memory_format=torch.channels_last)
    x, y, truth = data.train_x, data.train_y, None
    if victim.attack is not None:
        poisoned = victim.attack.poison(Examples(as_float(x), y, data.classes))
        x, y, truth = poisoned.data.x, poisoned.data.y, poisoned.truth
    start = time.perf_counter()
    fit(model, x, y, recipe_for(victim), seed=victim.seed)
    facts: dict[str, object] = {
        **{k: getattr(victim, k) for k in ("part", "data", "arch", "seed", "name")},
        "classes": data.classes,
        "channels": channels,
        "size": size,
        "attack": None if victim.attack is None else type(victim.attack).__name__,
        "config": None if victim.attack is None else asdict(victim.attack),
        "target": None if victim.attack is None else victim.attack.target,
    }
    rates = measure(model, data.test_x, data.test_y, truth)
    facts["acc"] = rates.acc.value
    if truth is not None:
        facts |= {"asr": rates.asr.value, "ra": rates.ra.value}
    facts["seconds"] = round(time.perf_counter() - start, 1)
    return model, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["calibration", "report"], required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for victim in (v for v in VICTIMS if v.part == arguments.part):
        facts_file = arguments.out / f"{victim.name}.json"
        if facts_file.exists():
            continue
        model, facts = train(victim, load(victim.data))
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(weights, arguments.out / f"{victim.name}.part")
        os.replace(arguments.out / f"{victim.name}.part", facts_file.with_suffix(".safetensors"))
        facts_file.write_text(json.dumps(facts, indent=1))
        print(victim.name, {k: facts[k] for k in ("acc", "asr", "seconds") if k in facts}, flush=True)


if __name__ == "__main__":
    main()
