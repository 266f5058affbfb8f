"""How time and peak memory of a fast scan grow with the number of labels, on a random net of each size.

    python benchmarks/scaling.py --labels 10 43 100 1000

The cost does not depend on what the weights are, so the nets are untrained: the MNIST net of Neural Cleanse on 28x28
images, one seed. Each size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "scaling.json"


def one(labels: int, threads: int) -> dict[str, float]:
    """Scan a random net with this many labels; times exclude imports."""
    import torch

    from bezoar.core.method import Clean
    from bezoar.core.run import Run
    from bezoar.nets.neural_cleanse import MnistNet
    from bezoar.scanners.neural_cleanse import NeuralCleanse

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = MnistNet(labels)
    count = max(500, 2 * labels)
    x, y = torch.rand(count, 1, 28, 28), torch.arange(count) % labels
    clean = Clean(
        x=x[: count // 2], y=y[: count // 2], held_x=x[count // 2 :], held_y=y[count // 2 :], num_classes=labels
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = Run()
    start, cpu = time.perf_counter(), time.process_time()
    NeuralCleanse(seeds=1)(model, clean, run)
    return {
        "labels": labels,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "image_gradients": run.image_gradients,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "mib_before": round(before / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 43, 100, 1000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="run in this process (used by the command itself)")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(one(arguments.labels[0], arguments.threads)))
        return
    rows = []
    for labels in arguments.labels:
        command = [sys.executable, __file__, "--here", "--threads", str(arguments.threads), "--labels", str(labels)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(rows[-1], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
