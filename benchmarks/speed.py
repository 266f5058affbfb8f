"""Neural Cleanse, fast against the paper's own procedure, on the published NAD student: one run, same threads.

    python benchmarks/speed.py --threads 1

Wall and CPU seconds are of the scan alone, after one warm-up. The peers' procedures are not run: their cost in
image-gradients (one forward and backward pass of one image) follows from their published defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from models import cases

from bezoar.api import scan

RESULTS = Path(__file__).parent / "results" / "speed.json"
CLASSES = 10
PEERS = {
    "BackdoorBench nc: 80 epochs of 2,500 images a label": 80 * 2500 * CLASSES,
    "TrojanZoo neural_cleanse: 10 epochs of 50,000 images a label": 10 * 50_000 * CLASSES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = next(c for c in cases("published") if c.name == "nad-student")
    images = case.clean_images(0)
    scan(case.path, images, seeds=1, steps=4, **case.settings)
    rows = {}
    for name, settings in (
        ("fast, 1 seed", {"seeds": 1}),
        ("fast, 3 seeds (default)", {"seeds": 3}),
        ("reference, 1 seed", {"seeds": 1, "mode": "reference"}),
    ):
        wall, cpu = time.perf_counter(), time.process_time()
        report = scan(case.path, images, **settings, **case.settings).report
        rows[name] = {
            "wall": round(time.perf_counter() - wall, 1),
            "cpu": round(time.process_time() - cpu, 1),
            "scan": round(report.run.seconds["scan"], 1),
            "image_gradients": report.run.image_gradients,
            "verdict": report.verdict,
            "target": report.target,
            "sizes": {str(r.label): round(r.size, 2) for r in report.labels},
        }
        print(name, rows[name], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"threads": arguments.threads, "rows": rows, "peers": PEERS}, indent=1) + "\n")
    for name, count in PEERS.items():
        for ours in ("fast, 1 seed", "fast, 3 seeds (default)"):
            print(
                f"{name}: {count:,} image-gradients, {count / rows[ours]['image_gradients']:.0f} times those of {ours}"
            )


if __name__ == "__main__":
    main()
