"""Cost and agreement of the scans with the number of labels: ours, the paper's low-cost scheme, and the full procedure.

    python benchmarks/scaling.py --labels 10 43 170 1283 2622 --kinds fast low-cost
    python benchmarks/scaling.py --labels 10 43 170 --kinds full
    python benchmarks/scaling.py --memory
    python benchmarks/scaling.py --table

Each net has as many labels and one backdoor (``many_labels.py``); each scan runs in a process of its own, so that its
peak memory is its own, and adds one line to ``results/scaling.jsonl``: what is there is not run again. ``low-cost`` and
``full`` are the published procedure with shorter searches (``--batches``, ``--iterations``), alike for both: with the
authors' 31 batches of 32 and 1,000 iterations the full one takes days here. The foremost and random labels of the
low-cost scheme are 100 each from 1,283 labels on, and as large a share of fewer labels (at least 4).

``--memory`` takes two steps with images of 224 x 224 (Trojaned VGG-Face, 2,622 labels) and 55 x 47 (YouTube Face,
1,283 labels) on an untrained thin net, where the triggers themselves are what fills the memory; its lines go to
``results/scaling_memory.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonl

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
MEMORY = RESULTS.with_name("scaling_memory.jsonl")
KINDS = ("fast", "low-cost", "full")
#: Labels, channels, height and width of the two faces of the paper.
FACES = {"youtube-face": (1283, 3, 55, 47), "vgg-face": (2622, 3, 224, 224)}


def followed(labels: int) -> int:
    """Foremost labels of the low-cost scheme, and as many random others: 100 of 1,283."""
    return 100 if labels >= 1283 else max(4, round(labels * 100 / 1283))


def scanner(kind: str, labels: int, batches: int, iterations: int) -> Any:
    """The scan of a kind."""
    from bezoar.scanners.low_cost_neural_cleanse import LowCostNeuralCleanse
    from bezoar.scanners.neural_cleanse import NeuralCleanse

    if kind == "fast":
        return NeuralCleanse(seeds=1, refine=0)
    count = followed(labels) if kind == "low-cost" else labels
    return LowCostNeuralCleanse(
        candidates=count, reference_labels=max(4, count), batches=batches, iterations=iterations
    )


def measured(method: Any, model: Any, clean: Any) -> tuple[Any, dict[str, Any]]:
    """The scan and what it cost; times leave out the imports."""
    from bezoar.core.run import Run

    run = Run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    found = method(model, clean, run)
    return found, {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "image_gradients": run.image_gradients,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "mib_before": round(before / 1024),
        **run.notes,
    }


def one(kind: str, labels: int, batches: int, iterations: int) -> dict[str, Any]:
    """Scan the net with this many labels."""
    import torch
    from many_labels import TARGET, victim

    from bezoar.core.method import Clean
    from bezoar.ops.stats import anomaly_index

    model, test, facts = victim(labels)
    x, half = test.x.float() / 255, len(test.y) // 2
    clean = Clean(x=x[:half], y=test.y[:half], held_x=x[half:], held_y=test.y[half:], num_classes=labels)
    found, cost = measured(scanner(kind, labels, batches, iterations), model, clean)
    scan = found.seeds[0].labels
    whole = {label: s for label, s in scan.items() if s.status == "complete"}
    reference = [s.size for s in scan.values() if s.reference]
    ranked = sorted(whole, key=lambda label: whole[label].size)
    target = scan[TARGET]
    return {
        "kind": kind,
        **facts,
        "batches": batches,
        "iterations": iterations,
        **cost,
        "target_rank": ranked.index(TARGET) + 1 if TARGET in whole else None,
        "target_size": round(target.size, 2),
        "target_index": round(float(anomaly_index([target.size], reference)[0]), 2),
        "median": round(float(torch.tensor(reference).median()), 2),
        "flagged": sum(bool(v > 2) for v in anomaly_index([s.size for s in whole.values()], reference)),
        "smallest": ranked[: followed(labels)],
    }


def memory(kind: str, name: str) -> dict[str, Any]:
    """Peak memory of two steps over all labels of a large task."""
    import torch

    from bezoar.core.method import Clean
    from bezoar.nets.convnet import ConvNet

    labels, channels, height, width = FACES[name]
    torch.manual_seed(0)
    model = ConvNet(4, labels, channels)
    x, y = torch.rand(64, channels, height, width), torch.arange(64)
    clean = Clean(x=x[:32], y=y[:32], held_x=x[:1], held_y=y[:1], num_classes=labels)
    method = scanner(kind, labels, 1, 2)
    # Few images: what counts is what is kept of each label.
    method = dataclasses.replace(method, batch=2, **({"steps": 2} if kind == "fast" else {}))
    _, cost = measured(method, model, clean)
    return {"kind": kind, "memory": name, "labels": labels, **cost}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of all lines, with saving and agreement against the full run where there is one."""
    lines = [
        "| labels | ACC / ASR | scan | image-gradients | CPU s | peak MiB | target: rank, size, index | flagged | "
        "saving | foremost shared with full |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    full = {row["labels"]: row for row in rows if row["kind"] == "full" and "memory" not in row}
    for row in sorted((r for r in rows if "memory" not in r), key=lambda r: (r["labels"], KINDS.index(r["kind"]))):
        whole = full.get(row["labels"])
        saving = agreement = "-"
        if whole is not None and row is not whole:
            saving = f"{1 - row['image_gradients'] / whole['image_gradients']:.0%}"
            shared = len(set(row["smallest"]) & set(whole["smallest"]))
            agreement = f"{shared} of {len(whole['smallest'])}"
        lines.append(
            f"| {row['labels']:,} | {100 * row['acc']:.1f} / {100 * row['asr']:.1f} | {row['kind']} | "
            f"{row['image_gradients']:,} | {row['cpu_seconds']:.0f} | {row['peak_mib']:,} | "
            f"{row['target_rank']}, {row['target_size']:.1f} px, {row['target_index']:.2f} | {row['flagged']} | "
            f"{saving} | {agreement} |"
        )
    for row in rows:
        if "memory" in row:
            lines.append(
                f"| {row['labels']:,} | {row['memory']}, 2 steps | {row['kind']} | {row['image_gradients']:,} | "
                f"{row['cpu_seconds']:.0f} | {row['peak_mib']:,} | - | - | - | - |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 43, 170, 1283, 2622])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["fast", "low-cost"])
    parser.add_argument("--batches", type=int, default=4, help="batches of 32 in an iteration (the authors' 31)")
    parser.add_argument("--iterations", type=int, default=100, help="most iterations of a search (the authors' 1000)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="peak memory with the faces' labels and image sizes")
    parser.add_argument("--table", action="store_true", help="print what is there as a table")
    parser.add_argument("--here", help="run one piece in this process (used by the command itself)")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(jsonl.read(RESULTS) + jsonl.read(MEMORY)))
        return
    if arguments.here:
        import torch

        torch.set_num_threads(arguments.threads)
        kind, what = arguments.here.split(":")
        if kind == "train":
            from many_labels import victim

            victim(int(what))
            return
        row = memory(kind, what) if what in FACES else one(kind, int(what), arguments.batches, arguments.iterations)
        print(json.dumps(row))
        return
    pieces: list[tuple[str, Any]] = [(kind, n) for n in arguments.labels for kind in arguments.kinds]
    if arguments.memory:
        pieces = [(kind, name) for name in FACES for kind in ("fast", "low-cost")]
    results = MEMORY if arguments.memory else RESULTS
    for kind, what in pieces:
        done = [(r["kind"], r.get("memory", r["labels"])) for r in jsonl.read(results)]
        if (kind, what) in done:
            continue
        if what not in FACES:  # in a process of its own, so that its memory is not the scan's
            subprocess.run([sys.executable, __file__, "--here", f"train:{what}"], check=True)
        settings = [f"--{name}={getattr(arguments, name)}" for name in ("batches", "iterations", "threads")]
        command = [sys.executable, __file__, "--here", f"{kind}:{what}", *settings]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(out.splitlines()[-1])
        jsonl.add(results, row)
        print({k: v for k, v in row.items() if k != "smallest"}, flush=True)


if __name__ == "__main__":
    main()
