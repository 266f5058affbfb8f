"""How well each source of evidence tells backdoored nets from clean ones, and which label it names.

    python benchmarks/scorers.py --threads 1
    python benchmarks/scorers.py --scorers mm-bd,k-arm --only mnist_nc --limit 12
    python benchmarks/scorers.py --table

The nets are the shared sets of small victims (``victim_set.py``), the victims of ``attacks.py`` and their clean twins,
and the published models, those that are in the cache; each method gets 500 clean test images, half of them to measure
with. The searches of a scan take part beside the scorers, one seed each. Each net and method is one line of
``benchmarks/results/scorers.jsonl``; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import jsonl
import torch
from models import Case, cases
from torch import nn

import attacks
from bezoar.attacks._attack import Training
from bezoar.attacks._store import load_truth
from bezoar.core.errors import BezoarError
from bezoar.core.evidence import Scan
from bezoar.core.method import Scanner
from bezoar.core.registry import methods
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.evaluation.splits import read_splits
from bezoar.evidence import student_transfer
from bezoar.nets.registry import find as find_net
from bezoar.ops.combined import concentration, label_scores
from bezoar.ops.student import Transfer, discounted
from bezoar.options import ModelOptions, RunOptions
from bezoar.scanners.additive_inversion import AdditiveInversion
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.scanning import look_for
from bezoar.session import Session, open_session

SEARCHES: dict[str, Callable[..., Scanner]] = {
    "neural-cleanse": NeuralCleanse,
    "neural-cleanse-student": NeuralCleanse,
    "mask-concentration": NeuralCleanse,
    "additive-inversion": AdditiveInversion,
    "additive-inversion-student": AdditiveInversion,
}
RESULTS = Path(__file__).parent / "results" / "scorers.jsonl"
CLEAN_TWINS = 3
LEAST_ASR = 0.8


@dataclass(frozen=True)
class Net:
    """A net to score: a case, or the clean twin of the victims of ``attacks.py``."""

    case: Case
    twin: int | None = None

    @property
    def model(self) -> Path | nn.Module:
        """What a session is opened on."""
        return self.case.path if self.twin is None else _clean_twin(self.twin)


def nets() -> list[Net]:
    """All nets in the cache, clean and backdoored in turn."""
    found = [Net(case) for part in ("set", "fresh") for case in cases(part)] + _attacked()
    found += [Net(case) for case in cases("published") if case.target != -1]
    clean = [net for net in found if net.case.target is None]
    other = [net for net in found if net.case.target is not None]
    mixed: list[Net] = []
    for place in range(max(len(clean), len(other))):
        mixed += [*clean[place : place + 1], *other[place : place + 1]]
    return mixed


def _attacked() -> list[Net]:
    found = []
    settings: dict[str, object] = {"arch": attacks.ARCH}
    for seed in range(CLEAN_TWINS):
        path = attacks.OUT / f"clean-{seed}" / "clean.pt"
        if path.exists():
            found.append(Net(Case("attacks", f"clean-{seed}", path, attacks.DATA, settings, None, "clean"), seed))
    for line in attacks.read():
        if float(str(line["asr"])) < LEAST_ASR:
            continue  # the backdoor did not take: there is nothing to find
        label = f"{line['attack']} {line['settings']}".strip()
        folder = f"{label.replace(' ', '_').replace('/', '-')[:80]}_{line['seed']}"
        path = attacks.OUT / folder / "model.safetensors"
        if not path.exists():
            continue
        plants = load_truth(path.parent).plants
        targets = tuple(sorted({p.labels.target for p in plants if p.labels.kind == "all-to-one"}))
        target = targets[0] if targets else -1
        found.append(Net(Case("attacks", folder, path, attacks.DATA, settings, target, label, targets)))
    return found


@cache
def _clean_twin(seed: int) -> nn.Module:
    splits, build = read_splits(attacks.DATA), find_net(attacks.ARCH)
    assert build is not None
    training = Training(
        lambda: build[0](splits.train.num_classes, 1, 28),
        attacks.RECIPE,
        Run(seed=seed),
        attacks.OUT / f"clean-{seed}",
    )
    return training.fit("clean", splits.train)


def read() -> list[dict[str, Any]]:
    """All lines so far."""
    return jsonl.read(RESULTS)


def add(line: dict[str, Any]) -> None:
    """Add a line and write all anew in one move; another process that does the same waits."""
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_atomic(RESULTS, "".join(json.dumps(one) + "\n" for one in [*read(), line]))


def score(net: Net, name: str, seed: int) -> dict[str, Any]:
    """Run one scorer, or one search of a scan with a single seed, with its defaults on one net; its line."""
    case, method = net.case, SEARCHES[name](seeds=1) if name in SEARCHES else methods("scorers")[name]()
    line: dict[str, Any] = {
        "part": case.part,
        "name": case.name,
        "data": case.data,
        "arch": case.settings["arch"],
        "attack": case.attack,
        "targets": list(case.targets),
        "planted": case.target is not None,
        "scorer": name,
        "config": method.config(),
        "seed": seed,
    }
    with open_session(net.model, case.clean_images(seed), _options(net), RunOptions(seed=seed), None) as session:
        start, before = time.perf_counter(), time.process_time()
        try:
            if isinstance(method, Scanner):
                key = (case.part, case.name, seed)
                evidence, cost = _searched(session, method, key)
                if name.endswith("-student"):
                    moved, cost = _student(session, evidence, cost)
                    found = label_scores(discounted(evidence, moved))
                else:
                    found = concentration(evidence) if name == "mask-concentration" else label_scores(evidence)
            else:
                found = method(session.suspect.module, session.clean, session.run)
                cost = _cost(session, start, before)
        except BezoarError as error:
            return line | {"error": str(error), "seconds": round(time.perf_counter() - start, 1)}
        return line | {
            "model": round(found.model, 4),
            "leader": found.leader,
            "suspect": found.suspect,
            "pvalue": found.pvalue,
            "labels": {str(label): round(value, 4) for label, value in found.labels.items()},
            "pairs": {f"{source}>{target}": round(value, 4) for (source, target), value in found.pairs.items()},
            **cost,
        }


_LAST: dict[tuple[Any, ...], tuple[Scan, dict[str, Any]]] = {}


def _searched(session: Session, method: Scanner, net: tuple[Any, ...]) -> tuple[Scan, dict[str, Any]]:
    """Evidence of a search and what it cost; two measures of the same search in a row run it once."""
    key = (*net, type(method))
    if key not in _LAST:
        start, before = time.perf_counter(), time.process_time()
        evidence = look_for(session, method).evidence
        _LAST.clear()
        _LAST[key] = evidence, _cost(session, start, before)
    return _LAST[key]


def _student(session: Session, scan: Scan, search: dict[str, Any]) -> tuple[Transfer, dict[str, Any]]:
    """How far the triggers of a search move a student, and what it cost with the search."""
    start, before = time.perf_counter(), time.process_time()
    moved = student_transfer(session, [scan])
    cost = _cost(session, start, before)
    return moved, search | {k: round(search[k] + cost[k], 1) for k in ("seconds", "cpu_seconds")}


def _cost(session: Session, start: float, before: float) -> dict[str, Any]:
    return {
        "notes": session.run.notes,
        "image_gradients": session.run.image_gradients,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - before, 1),
    }


def _options(net: Net) -> ModelOptions:
    return ModelOptions() if net.twin is not None else ModelOptions(**net.case.settings)  # type: ignore[arg-type]


def auroc(positive: list[float], negative: list[float]) -> float:
    """Share of the pairs in which the backdoored net has the higher score; ties count half."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative)) if positive and negative else float("nan")


def tpr(positive: list[float], negative: list[float], fpr: float) -> float:
    """Share of the backdoored nets above the bound that at most this share of the clean ones exceeds."""
    if not positive or not negative:
        return float("nan")
    bound = sorted(negative, reverse=True)[int(fpr * len(negative))]
    return sum(p > bound for p in positive) / len(positive)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each scorer and family of attacks, against all clean nets."""
    lines = [
        "| scorer | attack | backdoored / clean | AUROC | TPR at 1 % FPR | TPR at 5 % FPR | right label | own rule: "
        "backdoored, clean | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_scorer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            by_scorer[row["scorer"]].append(row)
    for name, found in sorted(by_scorer.items()):
        clean = [row for row in found if not row["planted"]]
        families: dict[str, list[dict[str, Any]]] = {"all": [row for row in found if row["planted"]]}
        for row in families["all"]:
            families.setdefault(str(row["attack"]).split()[0], []).append(row)
        lines += [_line(name, family, some, clean) for family, some in families.items()]
    return "\n".join(lines)


def _line(name: str, family: str, found: list[dict[str, Any]], clean: list[dict[str, Any]]) -> str:
    positive, negative = ([row["model"] for row in rows] for rows in (found, clean))
    claimed = [row for row in found if row["targets"]]
    right = f"{sum(row['leader'] in row['targets'] for row in claimed)} of {len(claimed)}"
    rule = ", ".join(f"{sum(row['suspect'] is True for row in rows)} of {len(rows)}" for rows in (found, clean))
    seconds = median([row["seconds"] for row in found + clean if row["seconds"] is not None] or [float("nan")])
    rates = " | ".join(f"{tpr(positive, negative, fpr):.2f}" for fpr in (0.01, 0.05))
    return (
        f"| {name} | {family} | {len(found)} / {len(clean)} | {auroc(positive, negative):.2f} | {rates} | {right} | "
        f"{rule} | {seconds:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scorers", default="", help="only these, separated by commas")
    parser.add_argument("--only", default="", help="only nets whose name contains one of these, separated by commas")
    parser.add_argument("--part", choices=["set", "fresh", "attacks", "published"])
    parser.add_argument("--limit", type=int, default=0, help="most nets")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read()))
        return
    torch.set_num_threads(arguments.threads)
    RESULTS.parent.mkdir(exist_ok=True)
    names = arguments.scorers.split(",") if arguments.scorers else [*SEARCHES, *methods("scorers")]
    chosen = [net for net in nets() if arguments.part in (None, net.case.part)]
    chosen = [net for net in chosen if any(part in net.case.name for part in arguments.only.split(","))]
    for net in chosen[: arguments.limit or None]:
        for name in names:
            key = (net.case.part, net.case.name, name, arguments.seed)
            if any((r["part"], r["name"], r["scorer"], r["seed"]) == key for r in read()):
                continue
            line = score(net, name, arguments.seed)
            add(line)
            kept = ("name", "targets", "scorer", "model", "leader", "suspect", "seconds", "error")
            print({k: line[k] for k in kept if k in line}, flush=True)


if __name__ == "__main__":
    main()
