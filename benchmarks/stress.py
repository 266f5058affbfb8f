"""The stress pack: where detection and unlearning end, on small nets (Neural Cleanse, section VII, figures 11 to 17).

    python benchmarks/stress.py                            all parts that are not there yet
    python benchmarks/stress.py --parts size --data mnist --most 3
    python benchmarks/stress.py --table
    python benchmarks/stress.py --draw                     docs/images/stress-*.svg

Parts: ``size`` (side of a white square), ``infected`` (number of infected labels, each with its own trigger, then all
labels patched), ``pattern`` (noise and shapes), ``rounds`` (nine triggers on one label, unlearned in rounds) and
``source`` (a trigger that works on one label only). Each net is trained once, in about a minute, and kept beside the
other victims; each adds one line to ``results/stress.jsonl``, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import jsonl
import safetensors.torch
import torch
from datasets import CACHE, Split, load
from line_charts import draw, line_chart
from torch import nn

from bezoar.attacks._attack import Attack, GroundTruth, Training
from bezoar.attacks._store import load_truth, save_truth
from bezoar.attacks.badnets import BadNets
from bezoar.attacks.several import Several
from bezoar.attacks.tact import TaCT
from bezoar.core.evidence import Scan
from bezoar.core.examples import Examples
from bezoar.core.method import Clean
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.evaluation.measures import Measures, measure
from bezoar.nets.registry import find
from bezoar.ops.fit import Recipe
from bezoar.ops.stats import anomaly_index
from bezoar.ops.verdict import judge, size_ratio
from bezoar.purifiers.iterated_unlearning import IteratedUnlearning, suspects
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.scorers.source_specific import SourceSpecific

RESULTS = Path(__file__).parent / "results" / "stress.jsonl"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
OUT = CACHE.parent / "victims" / "stress"
#: Architecture, epochs, training images and clean images of the defender for each data set.
NETS = {
    "mnist": ("nc-mnist", 4, 20_000, 500),
    "fashion-mnist": ("convnet-16-bn", 4, 20_000, 500),
    "gtsrb": ("convnet-16-bn", 8, 20_000, 860),
}
#: What the paper found: largest side that is still detected, and number of infected labels.
PAPER_SIDE = {"mnist": 12, "gtsrb": 14}
PARTS = ("size", "infected", "pattern", "rounds", "source")
SIDES = {"mnist": (2, 4, 6, 8, 10, 12, 14, 16), "gtsrb": (2, 4, 6, 8, 10, 12, 14, 16, 18)}
INFECTED = {"mnist": (1, 2, 3, 4, 5, 7), "gtsrb": (1, 2, 4, 6, 8, 10, 12, 16)}
PATTERNS = ("square", "noise", "checkerboard", "triangle", "l-shape", "random-pixels")
#: Top rows and left columns of nine 4 x 4 triggers on 28 x 28 images: corners, middles of the edges, and the centre.
NINE = [(top, left) for top in (1, 12, 23) for left in (1, 12, 23)]


@dataclass(frozen=True)
class Point:
    """One net: a part, its data, what is varied, and the attack."""

    part: str
    data: str
    value: float
    label: str
    attack: Attack
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.part}_{self.data}_{self.label}_{self.seed}"


def infected(data: str, count: int, seed: int) -> Attack:
    """So many infected labels, each with a noise patch of its own at a place of its own."""
    size = load(data).train_x.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(load(data).classes, generator=generator)[:count].tolist()
    places = torch.randperm((size // 5) ** 2, generator=generator).tolist()
    attacks = tuple(
        BadNets(
            target=label,
            pattern="noise",
            row=5 * (place // (size // 5)),
            column=5 * (place % (size // 5)),
            rate=min(0.05, 0.5 / count),
            seed=label,
        )
        for label, place in zip(labels, places, strict=False)
    )
    return attacks[0] if count == 1 else Several(attacks=attacks)


def points(seeds: int) -> list[Point]:
    """All of the pack, the quickest answers first."""
    out = []
    for seed in range(seeds):
        for data, sides in SIDES.items():
            out += [
                Point("size", data, side, str(side), BadNets(size=side, margin=0, rate=0.1, seed=seed), seed)
                for side in sides
            ]
        for data, counts in INFECTED.items():
            out += [Point("infected", data, n, str(n), infected(data, n, seed), seed) for n in counts]
        for data in ("mnist", "gtsrb"):
            out += [
                Point("pattern", data, at, name, BadNets(pattern=name, rate=0.1, seed=seed), seed)
                for at, name in enumerate(PATTERNS)
            ]
        for data in ("mnist", "fashion-mnist"):
            nine = tuple(BadNets(row=top, column=left, rate=0.03, seed=seed) for top, left in NINE)
            out.append(Point("rounds", data, 9, "nine", Several(attacks=nine), seed))
        for data in ("fashion-mnist", "mnist"):
            one = TaCT(rate=0.02, cover_rate=0.02, seed=seed)
            out.append(Point("source", data, 1, "tact", one, seed))
    return out


@cache
def _split(name: str) -> Split:
    return load(name)


def victim(point: Point) -> tuple[nn.Module, GroundTruth]:
    """The net and its ground truth; trained where it is not there yet."""
    split, (arch, epochs, images, _) = _split(point.data), NETS[point.data]
    rows = torch.randperm(len(split.train_y), generator=torch.Generator().manual_seed(point.seed))[:images]
    data = Examples(split.train_x[rows], split.train_y[rows], split.classes)
    found = find(arch)
    assert found is not None
    folder = OUT / point.name
    bn = arch.endswith("-bn")
    recipe = Recipe(
        epochs=epochs, lr=0.1 if bn else 2e-3, optimizer="sgd" if bn else "adam", weight_decay=5e-4 if bn else 0.0
    )
    training = Training(
        lambda: found[0](split.classes, data.shape[0], data.shape[1]),
        recipe,
        Run(seed=point.seed),
        folder / ".checkpoints",
    )
    weights = folder / "model.safetensors"
    if not weights.exists():
        made = point.attack(data, training)
        save_truth(made.truth, folder)
        state = {name: value.contiguous() for name, value in made.model.state_dict().items()}
        write_atomic(weights, safetensors.torch.save(state))
        shutil.rmtree(folder / ".checkpoints", ignore_errors=True)
    model = training.build()
    model.load_state_dict(safetensors.torch.load(weights.read_bytes()))
    return model.eval(), load_truth(folder)


def clean_of(point: Point, held_out: float) -> Clean:
    """The defender's images: test images of all classes, divided."""
    split, count = _split(point.data), NETS[point.data][3]
    generator = torch.Generator().manual_seed(1000 + point.seed)
    order = torch.randperm(len(split.test_y), generator=generator)
    each = max(4, count // split.classes)
    rows = torch.cat([order[split.test_y[order] == label][:each] for label in range(split.classes)])
    kept = torch.arange(len(rows)) % each < max(1, round(each * held_out))
    x, y = split.test_x[rows].float() / 255, split.test_y[rows]
    return Clean(x=x[~kept], y=y[~kept], held_x=x[kept], held_y=y[kept], num_classes=split.classes)


def rates(found: Measures) -> dict[str, Any]:
    """ACC and ASRs, rounded."""
    return {"acc": round(found.acc.value, 4), "asr": [round(p.asr.value, 4) for p in found.plants]}


def judged(scan: Scan, targets: Sequence[int]) -> dict[str, Any]:
    """What a scan says of the planted labels."""
    verdict = judge(scan, ())
    indices = {
        label: mean(
            float(anomaly_index([s.labels[label].size], [one.size for one in s.labels.values() if one.reference])[0])
            for s in scan.seeds
            if label in s.labels
        )
        for label in scan.looked_at()
    }
    planted = [label for label in targets if label in indices]
    flagged = [label for label, value in indices.items() if value > 2]
    ours = suspects(scan)
    return {
        "verdict": verdict.verdict,
        "target": verdict.target,
        "suspects": ours,
        "found": len(set(ours) & set(targets)),
        "false": len(set(ours) - set(targets)),
        "mad_found": len(set(flagged) & set(targets)),
        "mad_false": len(set(flagged) - set(targets)),
        "index": round(max((indices[label] for label in planted), default=float("nan")), 3),
        "other_index": round(max((v for k, v in indices.items() if k not in targets), default=float("nan")), 3),
        "ratio": round(min((size_ratio(s, k) for s in scan.seeds for k in planted if k in s.labels), default=9.0), 3),
        "sizes": [round(scan.median(label, "size"), 2) for label in planted],
    }


def run_one(point: Point) -> dict[str, Any]:
    """Train, search, and clean where the part asks for it; its line."""
    start, cpu = time.perf_counter(), time.process_time()
    model, truth = victim(point)
    split = _split(point.data)
    test = (split.test_x, split.test_y)
    targets = sorted({plant.labels.target for plant in truth.plants})
    row: dict[str, Any] = {"part": point.part, "data": point.data, "value": point.value, "label": point.label}
    row |= {"seed": point.seed, "targets": targets, **rates(measure(model, *test, truth, num_classes=split.classes))}
    if point.part == "source":
        row |= _source(model, point)
    elif point.part == "rounds":
        row |= _unlearned(model, truth, point, IteratedUnlearning())
    else:
        run = Run(seed=point.seed)
        scan = NeuralCleanse(seeds=2, refine=0)(model, clean_of(point, 0.5), run)
        row |= judged(scan, targets) | {"image_gradients": run.image_gradients}
        if point.part == "infected" and point.value > 1:
            row |= _unlearned(model, truth, point, IteratedUnlearning(patch="all", seeds=1))
    spent = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    return row | spent


def _unlearned(model: nn.Module, truth: GroundTruth, point: Point, method: IteratedUnlearning) -> dict[str, Any]:
    split, run = _split(point.data), Run(seed=point.seed)
    cleaned = method(copy.deepcopy(model), clean_of(point, 0.2), run)
    after = rates(measure(cleaned, split.test_x, split.test_y, truth, num_classes=split.classes))
    return {"rounds": run.notes["rounds"], "acc_after": after["acc"], "asr_after": after["asr"]}


def _source(model: nn.Module, point: Point) -> dict[str, Any]:
    run = Run(seed=point.seed)
    found = SourceSpecific()(model, clean_of(point, 0.5), run)
    pair = max(found.pairs, key=lambda one: found.pairs[one])
    return {
        "found_source": pair[0],
        "found_target": pair[1],
        "score": round(found.model, 3),
        "suspect": found.suspect,
        "image_gradients": run.notes["gradients_for_sources"],
        "all_pairs": run.notes["gradients_of_all_pairs"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables, one for each part."""
    out = []
    for part in PARTS:
        own = sorted((r for r in rows if r["part"] == part), key=lambda r: (r["data"], r["value"], r["seed"]))
        if not own:
            continue
        if part == "source":
            out.append("\n| source | ACC | ASR | found | score | suspect | gradients, of all pairs |\n|" + "---|" * 7)
            out += [
                f"| {r['data']} {r['seed']} | {100 * r['acc']:.1f} | {100 * r['asr'][0]:.1f} | "
                f"{r['found_source']} to {r['found_target']} | {r['score']:.2f} | {r['suspect']} | "
                f"{r['image_gradients']:,} of {r['all_pairs']:,} |"
                for r in own
            ]
            continue
        out.append(
            f"\n| {part} | ACC | lowest ASR | verdict | index (others) | ratio | found by us, by MAD (false) | "
            "rounds | ACC, highest and mean ASR after |\n|" + "---|" * 9
        )
        out += [_line(r) for r in own]
    return "\n".join(out).strip()


def _line(r: dict[str, Any]) -> str:
    searched = "- | - | - | -"
    if "verdict" in r:
        count = len(r["targets"])
        searched = (
            f"{r['verdict']} | {r['index']:.1f} ({r['other_index']:.1f}) | {r['ratio']:.2f} | "
            f"{r['found']} of {count} ({r['false']}), {r['mad_found']} of {count} ({r['mad_false']})"
        )
    after = "- | -"
    if "asr_after" in r:
        asr = r["asr_after"]
        after = f"{len(r['rounds'])} | {100 * r['acc_after']:.1f}, {100 * max(asr):.1f} and {100 * mean(asr):.1f}"
    head = f"{r['data']} {r['label']} {r['seed']} | {100 * r['acc']:.1f} | {100 * min(r['asr']):.1f}"
    return f"| {head} | {searched} | {after} |"


def figures(rows: list[dict[str, Any]]) -> list[Path]:
    """Draw what is there."""
    drawn = []

    def lines(part: str, key: str) -> dict[str, list[tuple[float, float]]]:
        values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["part"] == part and row.get(key) is not None:
                values[row["data"]][row["value"]].append(row[key])
        return {data: [(x, mean(ys)) for x, ys in sorted(own.items())] for data, own in values.items()}

    charts = {
        "size-index": ("size", "index", "Side of the trigger in pixels", "anomaly index", {"paper's bound": 2.0}),
        "size-ratio": ("size", "ratio", "Side of the trigger in pixels", "size over the median", {"our bound": 0.4}),
        "infected-index": ("infected", "index", "Infected labels", "largest anomaly index", {"paper's bound": 2.0}),
        "infected-found": ("infected", "found", "Infected labels", "labels found", {}),
        "infected-mad": ("infected", "mad_found", "Infected labels", "labels found by the MAD index", {}),
    }
    for name, (part, key, across, up, bounds) in charts.items():
        series = lines(part, key)
        if series:
            path = IMAGES / f"stress-{name}.svg"
            title = f"{up.capitalize()} against: {across.lower()}"
            draw(path, line_chart(series, title=title, across=across, up=up, bounds=bounds))
            drawn.append(path)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", nargs="+", choices=tuple(NETS), default=tuple(NETS))
    parser.add_argument("--labels", nargs="+", help="only these points, such as 4 noise nine tact")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--most", type=int, default=0, help="most new points; 0 for all")
    parser.add_argument("--table", action="store_true", help="print what is there as tables")
    parser.add_argument("--draw", action="store_true", help="draw what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(jsonl.read(RESULTS)))
        return
    if arguments.draw:
        for path in figures(jsonl.read(RESULTS)):
            print(path.name)
        return
    torch.set_num_threads(arguments.threads)
    new = 0
    for point in points(arguments.seeds):
        key = (point.part, point.data, point.label, point.seed)
        done = {(r["part"], r["data"], r["label"], r["seed"]) for r in jsonl.read(RESULTS)}
        wanted = point.part in arguments.parts and point.data in arguments.data
        if not wanted or key in done or (arguments.labels and point.label not in arguments.labels):
            continue
        row = run_one(point)
        jsonl.add(RESULTS, row)
        print(json.dumps({k: v for k, v in row.items() if k not in ("sizes", "targets")}), flush=True)
        new += 1
        if new == arguments.most:
            return


if __name__ == "__main__":
    main()
