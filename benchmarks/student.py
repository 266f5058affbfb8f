"""Every purifier on the published NAD student (WRN-16-1, CIFAR-10, BadNets), with the true trigger as the judge.

    python benchmarks/student.py --images 2500 --only nad,finetune --seeds 3
    python benchmarks/student.py --images 500
    python benchmarks/student.py --table

The defender's images are test images, as the training images of the student are the attacker's; what is measured is
measured on the other half of the test set. One line a run in ``benchmarks/results/student.jsonl``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

import jsonl
import torch
from datasets import CACHE
from models import cases

from bezoar.attacks.badnets import BadNets
from bezoar.bench.grid import Cell, Grid, PurifierSpec, VictimSpec
from bezoar.bench.measure import Bench
from bezoar.bench.victims import Ready
from bezoar.core.fields import fields_from
from bezoar.core.plain import plain
from bezoar.core.registry import find, methods
from bezoar.evaluation.measures import all_to_one
from bezoar.evaluation.splits import read_splits
from bezoar.version import __version__

RESULTS = Path(__file__).parent / "results" / "student.jsonl"
KEPT = ("purifier", "images", "seed", "status", "error", "acc_before", "acc_after", "asr_before", "asr_after")
MORE = ("ra_after", "der", "cpu_seconds", "scan_seconds", "image_gradients", "notes")
#: The setting of the published run: crops of 4 pixels and flips.
AUGMENT = ("pad=4", "flip=true")


def read() -> list[dict[str, object]]:
    """All lines so far."""
    return jsonl.read(RESULTS)


def spec(name: str) -> PurifierSpec:
    """A purifier with the augmentation of the published run, where it has one."""
    kind = find("purifiers", name)
    known = {f.partition("=")[0] for f in AUGMENT} <= set(kind.__dataclass_fields__)
    return PurifierSpec(name=name, purifier=kind(**fields_from(kind, name, "setting", AUGMENT if known else ())))


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table, means over seeds, best DER first."""
    groups: dict[tuple[int, str], list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        groups[int(str(row["images"])), str(row["purifier"])].append(row)

    def figure(found: list[dict[str, object]], key: str, factor: float = 100) -> str:
        values = [float(str(row[key])) for row in found if row[key] is not None]
        return f"{factor * mean(values):.1f}" if values else "-"

    lines = ["| images | purifier | runs | ACC | ASR | RA | DER | CPU s | image-gradients |", "|" + "---|" * 9]
    ranked = sorted(groups.items(), key=lambda g: (-g[0][0], -mean(float(str(r["der"] or 0)) for r in g[1])))
    for (images, name), found in ranked:
        refused = sum(row["status"] != "done" for row in found)
        label = f"{name} ({found[0]['status']})" if refused else name
        figures = [figure(found, key) for key in ("acc_after", "asr_after", "ra_after", "der")]
        cost = [figure(found, "cpu_seconds", 1), figure(found, "image_gradients", 1).partition(".")[0]]
        lines.append(f"| {images} | {label} | {len(found)} | {' | '.join([*figures, *cost])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="purifiers, separated by commas; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    case = next(c for c in cases("published") if c.name == "nad-student")
    assert case.target is not None
    trigger = BadNets(pattern="grid", size=3, margin=0).trigger((3, 32, 32))
    ready = Ready(case.path, "wrn-16-1", "badnets", all_to_one(trigger, case.target, 10))
    grid = Grid(
        data=case.data,
        test=None,
        train_images=None,
        size=None,
        channels=None,
        scan={"seeds": 1, "additive": False},
        victims=(),
        purifiers=(),
        images=(),
        seeds=(),
    )
    scans = CACHE.parent / "bench" / "scans"
    bench = Bench(grid, read_splits(case.data), scans, "cpu", arguments.threads, {"bezoar": __version__})
    victim = VictimSpec(name="nad-student", attack="badnets", settings=(), arch="wrn-16-1", seed=0, recipe=())
    names = arguments.only.split(",") if arguments.only else list(methods("purifiers"))
    torch.set_num_threads(arguments.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in range(arguments.seeds):
        for name in names:
            key = (name, arguments.images, seed)
            if key in {(r["purifier"], r["images"], r["seed"]) for r in read()}:
                continue
            found = plain(bench.run(Cell(victim, spec(name), arguments.images, seed), "", ready))
            row = {field: found[field] for field in (*KEPT, *MORE)}
            jsonl.add(RESULTS, row)
            print({k: row[k] for k in (*KEPT, "der", "cpu_seconds")}, flush=True)


if __name__ == "__main__":
    main()
