"""Trainers on poisoned and clean Fashion-MNIST: ACC, ASR, and how many isolated examples are poison.

    python benchmarks/abl.py --threads 1
    python benchmarks/abl.py --only badnets,clean --trainers abl --set isolation=lga
    python benchmarks/abl.py --only blend,sig --trainers plain,filtered --images 15000
    python benchmarks/abl.py --table

``clean-data`` is no defence but what the others are held against: the same training on the data before they were
poisoned. Its ASR is what the trigger does to a net that never saw it.

The defender holds 250 test images, as many of each label, for the trainers that need clean examples; nothing is
measured on them, whatever the trainer.

Each run is one line of ``benchmarks/results/abl.jsonl``; one that is there is not done again, and a killed one goes on
from its checkpoints in the cache.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Any

import jsonl
import torch
from datasets import CACHE

from bezoar.attacks._attack import GroundTruth, Training
from bezoar.core.examples import Examples
from bezoar.core.fields import fields_from
from bezoar.core.method import Clean
from bezoar.core.registry import find
from bezoar.core.run import Run
from bezoar.core.training import Trained, Trainer
from bezoar.evaluation.measures import measure
from bezoar.evaluation.splits import Splits, read_splits
from bezoar.io.data import choose
from bezoar.nets.registry import find as find_net
from bezoar.ops.fit import Recipe, as_float
from bezoar.training import curve

RESULTS = Path(__file__).parent / "results" / "abl.jsonl"
OUT = CACHE.parent / "abl"
DATA, ARCH = "fashion-mnist", "convnet-16-bn"
ATTACKS = ("clean", "badnets", "blend", "sig", "tact", "ftrojan", "smooth", "label-consistent", "adaptive-blend")
CLEAN = 250
#: Equal passes over the data with the rest of the recipe the same; isolation comes on top, for ``filtered`` the first
#: training.
SETTINGS = {
    "clean-data": ("epochs=10", "pad=2"),
    "plain": ("epochs=10", "pad=2"),
    "abl": ("epochs=10", "pad=2", "schedule=onecycle"),
    "filtered": ("epochs=10", "pad=2", "filter=union"),
    # Far fewer epochs than their authors take, so that a core does them in some minutes: no measure of their accuracy.
    "d-st": ("epochs=20", "pad=2", "batch=128"),
    "dbd": ("epochs=20", "semi_epochs=10", "pad=2", "batch=128"),
}


def read() -> list[dict[str, Any]]:
    """All lines so far."""
    return jsonl.read(RESULTS)


def network() -> torch.nn.Module:
    """The net that all train."""
    found = find_net(ARCH)
    assert found is not None
    return found[0](10, 1, 28)


def poisoned(name: str, splits: Splits, seed: int, device: torch.device) -> tuple[Examples, torch.Tensor, Any]:
    """The training set, which of its examples are poisoned, and the ground truth."""
    count = len(splits.train.y)
    if name == "clean":
        return splits.train, torch.zeros(count, dtype=torch.bool), None
    # A helper network of the attack, where it needs one.
    helper = Training(
        network, Recipe(epochs=6, lr=0.1), Run(seed=seed, device=device), OUT / "helpers" / f"{name}-{count}-{seed}"
    )
    found = find("attacks", name)(seed=seed).poison(splits.train, helper)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[found.index] = True
    return found.data, mask, found.truth


def held(splits: Splits) -> tuple[Clean, torch.Tensor]:
    """The defender's clean examples, and ``(N,)`` positions of the test images that are left to measure on."""
    rows = torch.from_numpy(choose(splits.test.y.numpy(), CLEAN, 0))
    left = torch.ones(len(splits.test.y), dtype=torch.bool)
    left[rows] = False
    x, y = as_float(splits.test.x[rows]), splits.test.y[rows]
    return Clean(x, y, x[:0], y[:0], splits.test.num_classes), left.nonzero().flatten()


def folder_of(key: dict[str, Any]) -> Path:
    """Where a killed training goes on."""
    return OUT / "_".join(map(str, key.values())).replace(" ", "_").replace("/", "-")[:150]


@cache
def _on_clean_data(trainer: Trainer, splits: Splits, run_seed: int, device: torch.device) -> Trained:
    return trainer(network, splits.train, Run(seed=run_seed, device=device), None, None)


def run_one(key: dict[str, Any], splits: Splits, device: torch.device) -> dict[str, Any]:
    """One training; its line."""
    data, poison, truth = poisoned(key["attack"], splits, key["seed"], device)
    name = "plain" if key["trainer"] == "clean-data" else key["trainer"]
    kind = find("trainers", name)
    trainer = kind(**fields_from(kind, name, "--set", tuple(key["settings"].split())))
    folder = folder_of(key)
    run, start = Run(seed=key["seed"], device=device), time.perf_counter()
    clean, left = held(splits)
    if key["trainer"] == "clean-data":
        found, poison = _on_clean_data(trainer, splits, key["seed"], device), torch.zeros_like(poison)
    else:
        found = trainer(network, data, run, folder, clean)
    seconds = time.perf_counter() - start
    known = truth if isinstance(truth, GroundTruth) else None
    measured = measure(found.model, splits.test.x[left], splits.test.y[left], known)
    line: dict[str, Any] = {
        **key,
        "acc": round(measured.acc.value, 4),
        "asr": [round(plant.asr.value, 4) for plant in measured.plants],
        "poisoned": int(poison.sum()),
        "notes": run.notes,
        "warnings": run.warnings,
        "seconds": round(seconds, 1),
    }
    if len(found.suspects):
        isolated = torch.zeros(len(data.y), dtype=torch.bool)
        isolated[found.suspects] = True
        line["precision"] = round(float(poison[isolated].float().mean()), 4)
        line["caught"] = round(float(isolated[poison].float().mean()), 4) if bool(poison.any()) else None
        line["curve"] = [
            {
                "epoch": one.epoch,
                "isolated": [round(v, 5) for v in vars(one.isolated).values()],
                "rest": [round(v, 5) for v in vars(one.rest).values()],
            }
            for one in curve(found.losses, isolated)
        ]
    if found.losses is not None and bool(poison.any()):
        line["median_loss"] = [
            {"poison": round(float(row[poison].median()), 5), "clean": round(float(row[~poison].median()), 5)}
            for row in found.losses
        ]
    return line


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one line a run."""
    order = {name: number for number, name in enumerate(SETTINGS)}
    rows = sorted(rows, key=lambda row: (ATTACKS.index(row["attack"]), row["seed"], order[row["trainer"]]))
    lines = [
        "| attack | trainer | seed | ACC | ASR | isolation precision | poison isolated | unlearned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        asr = f"{100 * min(row['asr']):.1f}" if row["asr"] else "-"
        precision = f"{100 * row['precision']:.1f}" if "precision" in row else "-"
        caught = f"{100 * row['caught']:.1f}" if row.get("caught") is not None else "-"
        name = f"{row['trainer']} {row['settings']}".strip()
        lines.append(
            f"| {row['attack']} | {name} | {row['seed']} | {100 * row['acc']:.1f} | {asr} | {precision} | {caught} | "
            f"{row['notes'].get('unlearned', '-')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="attacks to run, comma-separated")
    parser.add_argument("--trainers", default="clean-data,plain,abl,filtered,d-st,dbd", help="comma-separated")
    parser.add_argument("--set", action="append", default=[], help="a further setting, for all trainers that are run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=None, help="most training images; all by default")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    torch.set_num_threads(arguments.threads)
    splits = read_splits(DATA, limit=arguments.images)
    only = set(filter(None, arguments.only.split(",")))
    for seed in range(arguments.seeds):
        for attack in (one for one in ATTACKS if not only or one in only):
            for trainer in arguments.trainers.split(","):
                settings = " ".join([*SETTINGS.get(trainer, ()), *arguments.set])
                key = {
                    "attack": attack,
                    "trainer": trainer,
                    "settings": settings,
                    "images": len(splits.train.y),
                    "seed": seed,
                }
                if any(all(row[name] == value for name, value in key.items()) for row in read()):
                    continue
                row = run_one(key, splits, torch.device(arguments.device))
                jsonl.add(RESULTS, row)
                shutil.rmtree(folder_of(key), ignore_errors=True)
                print({k: v for k, v in row.items() if k not in ("curve", "median_loss")}, flush=True)


if __name__ == "__main__":
    main()
