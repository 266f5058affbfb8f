"""Every filter on the poisoned training sets of the victims that ``benchmarks/attacks.py`` left in the cache.

    python benchmarks/filters.py --threads 1
    python benchmarks/filters.py --only badnets --filters scan,spectre --retrain
    python benchmarks/filters.py --table

Each row is one line of ``benchmarks/results/filters.jsonl``; a killed run goes on where it was, and ``--retrain`` does
the rows again that lack what came of it. Each filter runs in a process of its own, so that its peak memory is its own.
The clean examples that some filters need are test images; where ``--retrain`` trains on what a filter leaves, ACC and
ASR are measured on the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import jsonl
import torch
from torch import Tensor, nn

from attacks import ARCH, DATA, OUT, RECIPE
from attacks import run_one as train
from bezoar.attacks._store import load_truth
from bezoar.core.examples import Examples
from bezoar.core.method import Clean
from bezoar.core.registry import find, methods
from bezoar.core.run import Run
from bezoar.evaluation.filters import Scores
from bezoar.evaluation.measures import measure
from bezoar.evaluation.splits import Splits, read_splits
from bezoar.io.data import choose
from bezoar.io.models import load_model
from bezoar.nets.registry import find as find_net
from bezoar.ops.fit import as_float, fit

RESULTS = Path(__file__).parent / "results" / "filters.jsonl"
CLEAN = 500
#: Attacks with their settings, whose training sets are made again from these alone. Those of benchmarks/attacks.py have
#: half of the target's examples poisoned, or more; those at a rate of 1 % have a tenth. Missing ones are trained.
VICTIMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("badnets", ()),
    ("blend", ()),
    ("sig", ()),
    ("badnets", ("rate=0.01",)),
    ("blend", ("rate=0.01",)),
    ("ftrojan", ()),
    ("smooth", ()),
    ("tact", ()),
    ("adaptive-blend", ()),
)


def read() -> list[dict[str, Any]]:
    """The last line of each victim and filter."""
    return list({(row["victim"], row["filter"]): row for row in jsonl.read(RESULTS)}.values())


def poisoned_set(victim: str, splits: Splits) -> tuple[Examples, Tensor]:
    """The training set of a victim, and ``(N,)`` whether each example is poisoned."""
    folder = OUT / victim
    record = json.loads((folder / "record.json").read_text())
    known = json.loads((folder / "index.json").read_text())["poisoned"]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
    made = find("attacks", record["attack"])(**settings).poison(splits.train)
    if made.index.tolist() != known:
        raise SystemExit(f"{victim}: the examples that are poisoned now are not those of index.json")
    truth = torch.zeros(len(splits.train.y), dtype=torch.bool)
    truth[made.index] = True
    return made.data, truth


def clean_examples(splits: Splits) -> tuple[Clean, Tensor]:
    """``CLEAN`` test images, as many of each label, and ``(N,)`` which test images are left."""
    rows = torch.from_numpy(choose(splits.test.y.numpy(), CLEAN, 0))
    left = torch.ones(len(splits.test.y), dtype=torch.bool)
    left[rows] = False
    x, y = as_float(splits.test.x[rows]), splits.test.y[rows]
    return Clean(x, y, x[:0], y[:0], splits.test.num_classes), left


def run_one(victim: str, name: str, retrain: bool) -> dict[str, Any]:
    """One filter on one victim; its line."""
    splits = read_splits(DATA)
    attack, _, settings = victim.removesuffix("_0").partition("_")
    if not (OUT / victim / "record.json").exists():
        train(attack, tuple(filter(None, settings.split("_"))), "", 0, splits)
    data, truth = poisoned_set(victim, splits)
    clean, left = clean_examples(splits)
    model = load_model(OUT / victim / "model.safetensors", arch=ARCH, size=28, channels=1).module
    run = Run(seed=0)
    _forget_peak()
    before, start = _resident("VmRSS"), time.perf_counter()
    method = find("filters", name)()
    found = method(model, data, run, clean)
    peak = _resident("VmHWM")
    took, scores = time.perf_counter() - start, Scores.of(found.score.numpy(), truth.numpy())
    row = {
        "victim": victim,
        "filter": name,
        "poisoned": int(truth.sum()),
        "auroc": round(scores.auroc, 4),
        "tpr_1": round(scores.tpr(0.01).value, 4),
        "tpr_5": round(scores.tpr(0.05).value, 4),
        "suspects": int(found.suspect.sum()),
        "caught": round(float(found.suspect[truth].double().mean()), 4),
        "condemned": round(float(found.suspect[~truth].double().mean()), 4),
        "flagged": None if found.flagged is None else list(found.flagged),
        "statistic": {str(label): round(value, 3) for label, value in found.statistic.items()},
        "seconds": round(took, 1),
        "memory_mb": round(peak - before),
        "warnings": run.warnings,
    }
    return row | (_retrained(victim, data, ~found.suspect, splits, left) if retrain else {})


def _resident(field: str) -> float:
    """``VmRSS``, or ``VmHWM`` since :func:`_forget_peak`, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _retrained(victim: str, data: Examples, keep: Tensor, splits: Splits, left: Tensor) -> dict[str, Any]:
    build = find_net(ARCH)
    assert build is not None
    torch.manual_seed(0)
    net: nn.Module = build[0](data.num_classes, 1, 28)
    fit(net, data.x[keep], data.y[keep], RECIPE)
    truth = load_truth(OUT / victim)
    got = measure(net, splits.test.x[left], splits.test.y[left], truth)
    return {"acc_after": round(got.acc.value, 4), "asr_after": round(got.plants[0].asr.value, 4)}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| victim | filter | AUROC | TPR at 1 % | at 5 % | caught | condemned | flagged | s | MB | ACC / ASR after |",
        "|" + "---|" * 11,
    ]
    for row in rows:
        rates = " | ".join(f"{100 * row[k]:.1f}" for k in ("auroc", "tpr_1", "tpr_5", "caught", "condemned"))
        flagged = "no rule" if row["flagged"] is None else ", ".join(map(str, row["flagged"])) or "none"
        after = f"{100 * row['acc_after']:.1f} / {100 * row['asr_after']:.1f}" if "acc_after" in row else "-"
        cost = f"{row['seconds']:.0f} | {row['memory_mb']}"
        lines.append(f"| {row['victim']} | {row['filter']} | {rates} | {flagged} | {cost} | {after} |")
    return "\n".join(lines)


def _child(victim: str, name: str, retrain: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    row = run_one(victim, name, retrain)
    jsonl.add(RESULTS, row)
    print({k: v for k, v in row.items() if k != "statistic"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="attacks, comma-separated")
    parser.add_argument("--filters", default="", help="filters, comma-separated")
    parser.add_argument("--retrain", action="store_true", help="train on what each filter leaves")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    only, chosen = (set(filter(None, text.split(","))) for text in (arguments.only, arguments.filters))
    for attack, settings in VICTIMS:
        victim = "_".join([attack, *settings, "0"])
        for name in methods("filters"):
            if (only and attack not in only) or (chosen and name not in chosen):
                continue
            there = [row for row in read() if (row["victim"], row["filter"]) == (victim, name)]
            if there and ("acc_after" in there[0] or not arguments.retrain):
                continue
            process = multiprocessing.get_context("spawn").Process(
                target=_child, args=(victim, name, arguments.retrain, arguments.threads)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
