"""Every guard on the cached victims: what it catches, what it lets through, and what it costs.

    python benchmarks/guard.py --threads 1
    python benchmarks/guard.py --only badnets_0,wrn-10-1_badnets --guards strip,scale-up
    python benchmarks/guard.py --table

A guard is fitted to 500 clean test images, half of which set its threshold at an FPR of 5 %; it is measured on other
test images, clean and triggered. Triggered ones count where the trigger works: the model gives the attacker's label, of
another class. Each row is one line of ``benchmarks/results/guard.jsonl``; a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import jsonl
import torch
from datasets import load
from models import Case, cases
from torch import Tensor

from bezoar.api import Result, scan
from bezoar.attacks._poison import stamped
from bezoar.attacks._store import load_truth
from bezoar.core.errors import BezoarError
from bezoar.core.registry import find, methods
from bezoar.evaluation.filters import Scores
from bezoar.guarding import Guarded, guard
from bezoar.io.exported import OnnxSession
from bezoar.io.models import load_model
from bezoar.ops.augment import as_float
from scorers import nets

RESULTS = Path(__file__).parent / "results" / "guard.jsonl"
CLEAN, FPR, RUNS = 500, 0.05, 15


def read() -> list[dict[str, Any]]:
    """All lines so far."""
    return jsonl.read(RESULTS)


def victims(only: set[str]) -> list[Case]:
    """Backdoored nets in the cache whose ground truth is there, those whose names contain one of ``only``."""
    found = [net.case for net in nets() if net.twin is None] + cases("set")
    known = {case.path: case for case in found if (case.path.parent / "truth.json").exists()}
    return [case for case in known.values() if not only or any(name in case.name for name in only)]


def measured_images(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """``count`` test images that the guard was not fitted to, and their labels."""
    split, (fitted, _) = load(case.data), case.clean_images(0, CLEAN)
    seen = {image.numpy().tobytes() for image in fitted}
    order = torch.randperm(len(split.test_y), generator=torch.Generator().manual_seed(7))
    rows = [row for row in order.tolist() if split.test_x[row].numpy().tobytes() not in seen][:count]
    return as_float(split.test_x[rows]), split.test_y[rows]


@torch.no_grad()
def triggered(model: torch.nn.Module, case: Case, x: Tensor, y: Tensor) -> Tensor:
    """Triggered images on which a trigger works, of all planted ones."""
    found = []
    for plant in load_truth(case.path.parent).plants:
        wanted = plant.labels(y)
        rows = plant.labels.applies(y) & (wanted != y)
        images = stamped(plant.trigger, x[rows])
        works = torch.cat([model(part).argmax(1) for part in torch.split(images, 256)]) == wanted[rows]
        found.append(images[works])
    return torch.cat(found)


def runtime_ratio(folder: Path, guarded: Guarded, x: Tensor) -> float | None:
    """Latency of model and guard over that of the model alone, in ONNX Runtime, for one image."""
    from bezoar.io.exported import export_program, write_onnx

    class Alone(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.model(x),)

    alone = Alone()
    alone.model = guarded.model().model
    try:
        guarded.save(folder, onnx=True)
        write_onnx(export_program(alone, x[:2]), alone, x[:2], folder / "bare.onnx", ["logits"])
    except BezoarError:
        return None
    sessions = [OnnxSession(folder / name) for name in ("bare.onnx", "guarded.onnx")]
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS + 1):  # in turn, so that a busy machine slows both
        for session, seconds in zip(sessions, taken, strict=True):
            start = time.perf_counter()
            session(x[:1])
            seconds.append(time.perf_counter() - start)
    return median(taken[1][1:]) / median(taken[0][1:])


def run_one(case: Case, name: str, found: Result | None, count: int) -> dict[str, Any]:
    """One guard on one victim; its line."""
    settings: dict[str, Any] = dict(case.settings)
    data = case.clean_images(0, CLEAN)
    start = time.perf_counter()
    guarded = guard(case.path, data, method=name, fpr=FPR, found=found, images=CLEAN, threads=1, **settings)
    took = time.perf_counter() - start
    model = load_model(case.path, size=tuple(data[0].shape[2:]), channels=data[0].shape[1], **settings).module
    x, y = measured_images(case, count)
    bad = triggered(model, case, x, y)
    clean_scores, scores = guarded.score(x), guarded.score(bad)
    both = Scores(scores.double().numpy(), clean_scores.double().numpy())
    report = guarded.report
    assert report is not None
    with tempfile.TemporaryDirectory() as folder:
        in_runtime = runtime_ratio(Path(folder), guarded, x)
    return {
        "victim": case.name,
        "attack": case.attack,
        "arch": case.settings["arch"],
        "guard": name,
        "clean": len(x),
        "triggered": len(bad),
        "auroc": round(both.auroc, 4),
        "fnr": round(float((scores <= guarded.facts.threshold).double().mean()), 4),
        "fpr": round(float((clean_scores > guarded.facts.threshold).double().mean()), 4),
        "held": guarded.facts.count,
        "latency": round(report.latency.ratio, 2),
        "latency_onnx": None if in_runtime is None else round(in_runtime, 2),
        "seconds": round(took, 1),
        "warnings": list(report.warnings),
    }


def _scanned(case: Case) -> Result | None:
    data, settings = case.clean_images(0, CLEAN), dict(case.settings)
    found = scan(case.path, data, images=CLEAN, threads=1, resume=True, **settings)
    print(f"{case.name}: {found.verdict}, label {found.target}", flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each guard over its victims, then victim by victim."""
    names = sorted({row["guard"] for row in rows}, key=lambda name: -_over(rows, name, "auroc", mean))
    lines = [
        "| guard | victims | mean AUROC | lowest | mean FNR | FNR at most 5 % | mean FPR | PyTorch | ONNX Runtime |",
        "|" + "---|" * 9,
    ]
    for name in names:
        mine = [row for row in rows if row["guard"] == name and "auroc" in row]
        usual, least = _over(rows, name, "auroc", mean), _over(rows, name, "auroc", min)
        missed, alarms = (100 * _over(rows, name, key, mean) for key in ("fnr", "fpr"))
        slower, in_runtime = (_over(rows, name, key, median) for key in ("latency", "latency_onnx"))
        low = sum(row["fnr"] <= FPR for row in mine)
        lines.append(
            f"| {name} | {len(mine)} | {usual:.3f} | {least:.3f} | {missed:.1f} | {low} | {alarms:.1f} | "
            f"{slower:.1f} x | {in_runtime:.1f} x |"
        )
    lines += ["", f"| victim | net | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    by_victim: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_victim.setdefault(row["victim"], {})[row["guard"]] = row
    for victim, found in sorted(by_victim.items(), key=lambda one: (next(iter(one[1].values()))["arch"], one[0])):
        cells = " | ".join(_cell(found.get(name)) for name in names)
        lines.append(f"| {victim} | {next(iter(found.values()))['arch']} | {cells} |")
    return "\n".join(lines)


def _over(rows: list[dict[str, Any]], guard: str, key: str, how: Callable[[list[float]], float]) -> float:
    return how([row[key] for row in rows if row["guard"] == guard and row.get(key) is not None])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "no backdoor found" if "error" in row else f"{row['auroc']:.3f}, {100 * row['fnr']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="parts of the victims' names, comma-separated")
    parser.add_argument("--guards", default="", help="guards to run, comma-separated; all by default")
    parser.add_argument("--count", type=int, default=500, help="test images to measure with")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    torch.set_num_threads(arguments.threads)
    names = list(filter(None, arguments.guards.split(","))) or list(methods("guards"))
    for case in victims(set(filter(None, arguments.only.split(",")))):
        done = {row["guard"] for row in read() if row["victim"] == case.name}
        left = [name for name in names if name not in done]
        found = _scanned(case) if any(find("guards", name).needs_triggers for name in left) else None
        for name in left:
            try:
                row = run_one(case, name, found, arguments.count)
            except BezoarError as error:
                row = {"victim": case.name, "arch": case.settings["arch"], "guard": name, "error": error.message}
            jsonl.add(RESULTS, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
