"""Scan every model of a part under several seeds, each on its own draw of clean images, and keep the evidence.

    python benchmarks/verdicts.py --part published --seeds 5
    python benchmarks/verdicts.py --part calibration --seeds 3
    python benchmarks/verdicts.py --part report --seeds 5
    python benchmarks/verdicts.py --table

Each scan is one line of ``benchmarks/results/verdicts.jsonl``; a finished one is not run again. Each uses a single
seed, so that the table shows how often one look alone is right; ``bezoar scan`` takes three and lets them vote.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from models import Case, cases

from bezoar.api import Result, scan

RESULTS = Path(__file__).parent / "results" / "verdicts.jsonl"


def read() -> list[dict[str, object]]:
    """All lines so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def row(case: Case, seed: int, result: Result, seconds: float) -> dict[str, object]:
    """What is kept of a scan."""
    report = result.report
    assert report.rule is not None
    figures = {f.name: round(f.value, 4) for f in report.rule.figures}
    leader = report.triggers[0]
    mask = result.triggers[leader.label].mask[0]
    at = [(mask.sum(1 - axis) * torch.arange(mask.shape[axis])).sum() / mask.sum() for axis in (0, 1)]
    return {
        "part": case.part,
        "name": case.name,
        "data": case.data,
        "attack": case.attack,
        "truth": case.target,
        "seed": seed,
        "verdict": report.verdict,
        "target": report.target,
        "leader": leader.label,
        "acc": round(report.preflight.acc, 4),
        "ratio": figures["size ratio"],
        "asr": figures["held-out ASR"],
        "share": figures["share of the image"],
        "index": figures["anomaly index"],
        "center": [round(float(v), 1) for v in at],
        "sizes": {str(r.label): round(r.size, 2) for r in report.labels if r.status == "complete"},
        "image_gradients": report.run.image_gradients,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table: one line a model."""
    groups: dict[tuple[object, object], list[dict[str, object]]] = defaultdict(list)
    for one in rows:
        groups[one["part"], one["name"]].append(one)
    lines = [
        "| part | model | attack | target | backdoored / inconclusive / clean | right label | size ratio | MAD index |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (part, name), found in groups.items():
        counts = [sum(f["verdict"] == v for f in found) for v in ("backdoored", "inconclusive", "clean")]
        truth = found[0]["truth"]
        planted = isinstance(truth, int) and truth >= 0
        right = f"{sum(f['leader'] == truth for f in found)} of {len(found)}" if planted else "-"
        spread = [f"{min(f[k] for f in found):.2f} to {max(f[k] for f in found):.2f}" for k in ("ratio", "index")]
        lines.append(
            f"| {part} | {name} | {found[0]['attack']} | {truth if planted else '-'} | "
            f"{' / '.join(map(str, counts))} | {right} | {spread[0]} | {spread[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["published", "calibration", "report"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    torch.set_num_threads(arguments.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    for seed in range(arguments.seeds):
        for case in cases(arguments.part):
            if arguments.only not in case.name:
                continue
            if any((r["name"], r["seed"]) == (case.name, seed) for r in read()):
                continue
            start = time.perf_counter()
            result = scan(case.path, case.clean_images(seed), seeds=1, seed=seed, **case.settings)
            kept = row(case, seed, result, time.perf_counter() - start)
            with RESULTS.open("a") as file:
                file.write(json.dumps(kept) + "\n")
            print({k: v for k, v in kept.items() if k != "sizes"}, flush=True)


if __name__ == "__main__":
    main()
