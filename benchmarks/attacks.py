"""Every attack on Fashion-MNIST with a small net, next to a clean net of the same seed.

    python benchmarks/attacks.py --threads 1
    python benchmarks/attacks.py --only wanet,lira
    python benchmarks/attacks.py --table

Each victim goes to the cache as ``bezoar attack`` would write it, and a killed run goes on where it was; its figures
are one line of ``benchmarks/results/attacks.jsonl``. The six main attacks have three seeds, the others one.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import jsonl
import torch
from datasets import CACHE

from bezoar.attacks._attack import Attack, Training
from bezoar.core.fields import fields_from
from bezoar.core.registry import find, method_name
from bezoar.core.run import Run
from bezoar.evaluation.implant import Victim, implant
from bezoar.evaluation.measures import measure
from bezoar.evaluation.splits import Splits, read_splits
from bezoar.nets.registry import find as find_net
from bezoar.ops.fit import Recipe
from bezoar.version import __version__

RESULTS = Path(__file__).parent / "results" / "attacks.jsonl"
OUT = CACHE.parent / "attacks"
DATA, ARCH = "fashion-mnist", "convnet-16-bn"
RECIPE = Recipe(epochs=6, lr=0.1)

#: Attack, settings other than the defaults, kind, number of seeds.
ATTACKS: list[tuple[str, tuple[str, ...], str, int]] = [
    ("badnets", (), "patch", 3),
    ("badnets", ("pattern=grid", "size=3", "margin=0"), "patch", 1),
    ("badnets", ("pattern=noise",), "patch", 1),
    ("badnets", ("pattern=triangle",), "patch", 1),
    ("badnets", ("pattern=checkerboard",), "patch", 1),
    ("badnets", ("label_map=all-to-all",), "patch", 1),
    ("trojan", (), "patch", 1),
    ("blend", (), "blend", 3),
    ("sig", (), "clean label", 3),
    ("sig", ("variant=wrapped",), "clean label", 1),
    ("label-consistent", (), "clean label", 1),
    ("label-consistent", ("epsilon=8/255",), "clean label", 1),
    ("label-consistent", ("epsilon=64/255",), "clean label", 1),
    ("feature-collision", (), "clean label", 1),
    ("feature-collision", ("size=18",), "clean label", 1),
    ("wanet", (), "warp", 3),
    ("bppa", (), "quantisation", 1),
    ("bppa", ("dithering=true",), "quantisation", 1),
    ("bppa", ("levels=3",), "quantisation", 1),
    ("ftrojan", (), "frequency", 3),
    ("smooth", (), "frequency", 3),
    ("refool", (), "clean label", 1),
    ("refool", ("test_reflections=0",), "clean label", 1),
    ("refool", ("dirty=true", "rate=0.1"), "reflection", 1),
    ("issba", (), "learned", 1),
    ("input-aware", ("width=8",), "learned", 1),
    ("lira", ("width=8", "generator_lr=1e-3", "catch_up=50"), "learned", 1),
    ("dfst", (), "learned", 1),
    ("composite", (), "composite", 1),
    ("tact", (), "source-specific", 1),
    ("adaptive-blend", (), "adaptive", 1),
    ("adaptive-patch", (), "adaptive", 1),
    ("several", (), "several", 1),
]


def read() -> list[dict[str, object]]:
    """All lines so far."""
    return jsonl.read(RESULTS)


def make(name: str, settings: tuple[str, ...], seed: int) -> Attack:
    """The attack with its settings."""
    kind = find("attacks", name)
    attack: Attack = kind(**fields_from(kind, name, "setting", settings), seed=seed)
    return attack


def clean_acc(splits: Splits, seed: int) -> float:
    """ACC of the clean twin of a seed."""
    build = find_net(ARCH)
    assert build is not None
    training = Training(
        lambda: build[0](splits.train.num_classes, 1, 28), RECIPE, Run(seed=seed), OUT / f"clean-{seed}"
    )
    model = training.fit("clean", splits.train)
    return measure(model, splits.test.x, splits.test.y).acc.value


def run_one(name: str, settings: tuple[str, ...], kind: str, seed: int, splits: Splits) -> dict[str, object]:
    """Train one victim; its line."""
    attack = make(name, settings, seed)
    label = " ".join([name, *settings])
    folder = OUT / f"{label.replace(' ', '_').replace('/', '-')[:80]}_{seed}"
    start = time.perf_counter()
    victim = Victim(attack=attack, splits=splits, arch=ARCH, recipe=RECIPE)
    record = implant(victim, folder, Run(seed=seed), {"bezoar": __version__, "torch": torch.__version__})
    plants = record.measures.plants
    stealth = record.plants[0].stealth
    return {
        "attack": method_name(type(attack)),
        "settings": " ".join(settings),
        "kind": kind,
        "seed": seed,
        "acc": round(record.measures.acc.value, 4),
        "clean_acc": round(clean_acc(splits, seed), 4),
        "asr": round(min(p.asr.value for p in plants), 4),
        "asr_other": None if plants[0].asr_other is None else round(plants[0].asr_other.value, 4),
        "stealth": None if stealth is None else {k: round(v, 4) for k, v in dataclasses.asdict(stealth).items()},
        "poisoned": record.poisoned,
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table: one line an attack, means over seeds."""
    groups: dict[tuple[object, object, object], list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["attack"], row["settings"]].append(row)
    lines = [
        "| kind | attack | seeds | ACC | clean twin | ASR (lowest) | other classes | L-inf | PSNR dB | SSIM |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, attack, settings), found in groups.items():

        def average(key: str, found: list[dict[str, object]] = found) -> str:
            values = [float(str(f[key])) for f in found if f[key] is not None]
            return f"{100 * mean(values):.1f}" if values else "-"

        seen = [f["stealth"] for f in found if isinstance(f["stealth"], dict)]
        shown = [f"{mean(s[k] for s in seen):.3g}" if seen else "-" for k in ("linf", "psnr", "ssim")]
        lowest = min(float(str(f["asr"])) for f in found)
        name = f"{attack} {settings}".strip()
        lines.append(
            f"| {kind} | {name} | {len(found)} | {average('acc')} | {average('clean_acc')} | "
            f"{average('asr')} ({100 * lowest:.1f}) | {average('asr_other')} | {' | '.join(shown)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="attacks to run, comma-separated")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    torch.set_num_threads(arguments.threads)
    splits = read_splits(DATA)
    only = set(filter(None, arguments.only.split(",")))
    for seed in range(3):
        for name, settings, kind, seeds in ATTACKS:
            if seed >= seeds or (only and name not in only):
                continue
            if any((r["attack"], r["settings"], r["seed"]) == (name, " ".join(settings), seed) for r in read()):
                continue
            row = run_one(name, settings, kind, seed, splits)
            jsonl.add(RESULTS, row)
            print({k: v for k, v in row.items() if k != "stealth"}, flush=True)


if __name__ == "__main__":
    main()
