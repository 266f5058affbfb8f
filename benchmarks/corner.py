"""Does the shown trigger of the NAD student lie where the attacker's 3x3 grid does, in the bottom right corner?

    python benchmarks/corner.py --threads 1

Five scans of one seed each, with the second look at the leading label, on five draws of clean images. Writes
``benchmarks/results/corner.json``: centre of mass (row, column; of 0 to 31), size in pixels, and the share of the mask
in the bottom right quarter of a quarter (rows and columns 24 to 31).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from models import cases

from bezoar.api import scan

RESULTS = Path(__file__).parent / "results" / "corner.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (case,) = [c for c in cases("published") if c.name == "nad-student"]
    rows = []
    for seed in range(arguments.seeds):
        result = scan(case.path, case.clean_images(seed), seeds=1, seed=seed, additive=False, **case.settings)
        mask = result.triggers[5].mask[0]
        place = torch.arange(32.0)
        rows.append(
            {
                "seed": seed,
                "verdict": result.verdict,
                "target": result.target,
                "row": round(float((mask.sum(1) * place).sum() / mask.sum()), 1),
                "column": round(float((mask.sum(0) * place).sum() / mask.sum()), 1),
                "size": round(float(mask.sum()), 1),
                "in_corner": round(float(mask[24:, 24:].sum() / mask.sum()), 2),
                "image_gradients": result.report.run.image_gradients,
            }
        )
        print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
