"""Scan every model of a part under several seeds, each on its own draw of clean images, and keep the evidence.

    python benchmarks/verdicts.py --part published --seeds 5
    python benchmarks/verdicts.py --part calibration --seeds 3
    python benchmarks/verdicts.py --part report --seeds 5
    python benchmarks/verdicts.py --part set --seeds 1
    python benchmarks/verdicts.py --table

Each scan is one line of ``benchmarks/results/verdicts.jsonl``; a finished one is not run again. Each uses a single
seed, so that the table shows how often one look alone is right; ``bezoar scan`` takes three and lets them vote. The two
searches are kept apart, so that a change of one of them does not repeat the other: first masks, then faint changes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jsonl
import torch
from models import Case, cases

from bezoar.api import Result, scan
from bezoar.core.results import write_atomic
from bezoar.ops.verdict import RatioRule
from bezoar.options import ModelOptions, RunOptions
from bezoar.scanners.additive_inversion import AdditiveInversion
from bezoar.scanning import look_for
from bezoar.session import open_session

RESULTS = Path(__file__).parent / "results" / "verdicts.jsonl"


def read() -> list[dict[str, object]]:
    """All lines so far."""
    return jsonl.read(RESULTS)


def faint(case: Case, seed: int) -> dict[str, object]:
    """What the search for faint changes alone finds on the same images."""
    start = time.perf_counter()
    options = ModelOptions(**case.settings)  # type: ignore[arg-type]
    with open_session(case.path, case.clean_images(seed), options, RunOptions(seed=seed), None) as session:
        look = look_for(session, AdditiveInversion(seeds=1), last=True)
        gradients = session.run.image_gradients
    figures = {f.name: round(f.value, 4) for f in look.judgement.rule.figures}
    return {
        "verdict": look.judgement.verdict,
        "target": look.judgement.target,
        "leader": look.judgement.leader,
        "ratio": figures["size ratio"],
        "asr": figures["held-out ASR"],
        "change": figures["change of the image"],
        "image_gradients": gradients,
        "seconds": round(time.perf_counter() - start, 1),
    }


def by_masks(one: dict[str, object]) -> tuple[object, object]:
    """Verdict and target of the masks by the rule as it is now; the line may be older."""
    rule, ratio = RatioRule(), float(str(one["ratio"]))
    suspect = (
        ratio <= rule.backdoored_ratio
        and (gap(one) <= rule.gap or ratio <= rule.outright)
        and float(str(one["asr"])) >= rule.asr
        and float(str(one["share"])) <= rule.share
    )
    if suspect:
        return "backdoored", one["leader"]
    return ("clean" if ratio >= rule.clean_ratio else "inconclusive"), None


def together(one: dict[str, object]) -> tuple[object, object, object]:
    """Verdict, target and leader of both searches, by ``confirm`` and ``lead`` of ``bezoar.ops.verdict``."""
    verdict, target = by_masks(one)
    other = one.get("faint")
    if not isinstance(other, dict):
        return verdict, target, one["leader"]
    rule, sizes = RatioRule(), _sizes(one)
    told, label = other["verdict"], str(other["leader"])
    third = sorted(sizes.values())[2]
    if told == "backdoored" and sizes.get(label, third) / third > rule.confirm:
        told = "inconclusive"
    near = (
        float(str(one["ratio"])) / rule.backdoored_ratio,
        float(str(other["ratio"])) / rule.faint_backdoored_ratio,
    )
    parts = ((verdict, target, one["leader"]), (told, other["target"] if told == "backdoored" else None, label))
    for wanted in ("backdoored", "inconclusive"):
        found = [n for n in (0, 1) if parts[n][0] == wanted]
        if found:
            return parts[min(found, key=lambda n: near[n])]
    return verdict, None, one["leader"]


def gap(one: dict[str, object]) -> float:
    """Size of the smallest mask over that of the third smallest."""
    sizes = _sizes(one)
    return sizes[str(one["leader"])] / sorted(sizes.values())[2]


def _sizes(one: dict[str, object]) -> dict[str, float]:
    sizes = one["sizes"]
    assert isinstance(sizes, dict)
    return sizes


def is_right(one: dict[str, object]) -> bool:
    """Whether the verdict names a label that was planted."""
    targets = one.get("targets") or [one["truth"]]
    assert isinstance(targets, list)
    return together(one)[0] == "backdoored" and together(one)[1] in targets


def update(change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    """Change the lines and write them anew in one move; another process that does the same waits."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_atomic(RESULTS, "".join(json.dumps(one) + "\n" for one in change(read())))


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
        "targets": list(case.targets),
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
        "| part | model | attack | target | backdoored / inconclusive / clean | right label | masks alone | "
        "size ratio | faint ratio | MAD index |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (part, name), found in groups.items():
        verdicts = ("backdoored", "inconclusive", "clean")
        whole = [together(f) for f in found]
        counts = [sum(w[0] == v for w in whole) for v in verdicts]
        alone = [sum(by_masks(f)[0] == v for f in found) for v in verdicts]
        truth = found[0]["truth"]
        planted = isinstance(truth, int) and truth >= 0
        right = f"{sum(is_right(f) for f in found)} of {len(found)}" if planted else "-"
        faints = [f["faint"] for f in found if isinstance(f.get("faint"), dict)]
        spread = [_span(found, "ratio"), _span(faints, "ratio"), _span(found, "index")]
        lines.append(
            f"| {part} | {name} | {found[0]['attack']} | {truth if planted else '-'} | "
            f"{' / '.join(map(str, counts))} | {right} | {' / '.join(map(str, alone))} | {' | '.join(spread)} |"
        )
    return "\n".join(lines)


def _span(rows: list[dict[str, object]], key: str) -> str:
    values = [float(str(one[key])) for one in rows]
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["published", "calibration", "report", "set"])
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
            if arguments.only in case.name:
                complete(case, seed)


def complete(case: Case, seed: int) -> None:
    """Run what is missing of one scan."""
    key = (case.name, seed)
    if not any((r["name"], r["seed"]) == key for r in read()):
        start = time.perf_counter()
        result = scan(case.path, case.clean_images(seed), seeds=1, seed=seed, additive=False, **case.settings)
        kept = row(case, seed, result, time.perf_counter() - start)
        update(lambda rows: [*rows, kept])
        print({k: v for k, v in kept.items() if k != "sizes"}, flush=True)
    if any((r["name"], r["seed"]) == key and "faint" not in r for r in read()):
        found = faint(case, seed)
        update(lambda rows: [{**r, "faint": found} if (r["name"], r["seed"]) == key else r for r in rows])
        print(case.name, seed, "truth", case.target, "faint", found, flush=True)


if __name__ == "__main__":
    main()
