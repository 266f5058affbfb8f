"""Unlearning on the published NAD student: the true trigger's ASR, which only the evaluation knows, before and after.

    python benchmarks/unlearning.py --seeds 3

From 500 clean test images; ACC and ASR on the other 9,500. ``finetune`` stands beside it with the same images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import load
from models import cases

from bezoar.api import purify, scan
from bezoar.attacks.badnets import BadNets
from bezoar.evaluation.measures import all_to_one, measure
from bezoar.io.models import load_model

RESULTS = Path(__file__).parent / "results" / "unlearning.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = next(c for c in cases("published") if c.name == "nad-student")
    split = load(case.data)
    trigger = BadNets(pattern="grid", size=3, margin=0).trigger((3, 32, 32))
    assert case.target is not None
    truth = all_to_one(trigger, case.target, split.classes)
    rows = []
    for seed in range(arguments.seeds):
        order = torch.randperm(len(split.test_y), generator=torch.Generator().manual_seed(seed))
        chosen, rest = order[:500], order[500:]
        images = (split.test_x[chosen], split.test_y[chosen])

        def measured(model: torch.nn.Module, rest: torch.Tensor = rest) -> dict[str, float]:
            found = measure(model, split.test_x[rest], split.test_y[rest], truth)
            return {k: round(getattr(found, k).value, 4) for k in ("acc", "asr", "ra")}

        found = scan(case.path, images, seed=seed, seeds=1, **case.settings)
        kept = {"seed": seed, "verdict": found.verdict, "target": found.target}
        kept["before"] = measured(load_model(case.path, **case.settings).module)
        for method in ("unlearn", "finetune"):
            cleaned, report = purify(case.path, images, method=method, found=found, seed=seed, **case.settings)
            assert report.cleaning is not None
            kept[method] = measured(cleaned) | {"inverted_asr": report.cleaning.asr_after}
        rows.append(kept)
        print(kept, flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
