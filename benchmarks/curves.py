"""Mean loss of poisoned and of clean examples over the first epochs of plain training, for each attack.

    python benchmarks/curves.py --threads 1
    python benchmarks/curves.py --only badnets,sig
    python benchmarks/curves.py --draw

ABL rests on poison that is learned faster than anything else; this shows for which attacks that holds. 10,000 images of
Fashion-MNIST, convnet-16-bn, SGD at 0.1, no augmentation; the loss of each example in eval mode before the training and
after each epoch. Each attack is one line of ``benchmarks/results/curves.jsonl``; one that is there is not done again.
``docs/images/loss-curves.svg`` is drawn from these lines alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jsonl
import torch
from abl import DATA, network, poisoned
from markupsafe import Markup

from bezoar.core.method import own_randomness
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.evaluation.splits import read_splits
from bezoar.ops.isolation import isolate
from bezoar.ops.losses import Curves
from bezoar.ops.recipe import Recipe
from bezoar.report.svg import Axis, element

RESULTS = Path(__file__).parent / "results" / "curves.jsonl"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "loss-curves.svg"
ATTACKS = (
    *("badnets", "blend", "trojan", "ftrojan", "smooth", "tact"),
    *("adaptive-blend", "adaptive-patch", "sig", "label-consistent", "refool", "feature-collision"),
)
IMAGES, EPOCHS = 10_000, 6
COLUMNS, WIDTH, HEIGHT = 3, 240, 150
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #3f4854 }
.title { font-weight: 600; fill: #1d2430 }
.grid { stroke: #8b95a3; stroke-opacity: .35 }
.line { fill: none; stroke-width: 2 }
.poison { stroke: #b4281e; fill: #b4281e }
.clean { stroke: #2f6db5; fill: #2f6db5 }
.line.poison, .line.clean { fill: none }
.back { fill: #fff }
"""


def run_one(attack: str, images: int, device: torch.device) -> dict[str, Any]:
    """One attack; its line."""
    splits = read_splits(DATA, limit=images)
    data, poison, _ = poisoned(attack, splits, 0, device)
    run = Run(seed=0, device=device)
    curves = Curves(EPOCHS + 1, len(data.y), None)
    recipe = Recipe(epochs=EPOCHS, lr=0.1, weight_decay=1e-4, schedule="constant")
    with own_randomness(run):
        model = network().to(device)
        isolate(model, data, recipe, curves, run, how="lga-batch", gamma=0.0, until_floor=False)
    return {
        "attack": attack,
        "images": len(data.y),
        "poisoned": int(poison.sum()),
        "poison": [round(float(row[poison].mean()), 5) for row in curves.table],
        "clean": [round(float(row[~poison].mean()), 5) for row in curves.table],
    }


def picture(rows: list[dict[str, Any]]) -> Markup:
    """Small charts side by side, all with the same scale."""
    top = max(value for row in rows for name in ("poison", "clean") for value in row[name])
    lines = -(-len(rows) // COLUMNS)
    width, height = COLUMNS * WIDTH, lines * HEIGHT + 40
    charts = [_chart(row, top, (i % COLUMNS) * WIDTH, 34 + (i // COLUMNS) * HEIGHT) for i, row in enumerate(rows)]
    title = "Mean loss of poisoned and of clean examples over the first epochs, by attack"
    legend = [
        element("rect", class_=kind, x=x, y=10, width=14, height=4) + element("text", text, x=x + 20, y=17)
        for x, kind, text in ((12, "poison", "poisoned examples"), (160, "clean", "clean examples"))
    ]
    return element(
        "svg",
        element("title", title),
        element("style", Markup(STYLE)),
        element("rect", class_="back", x=0, y=0, width=width, height=height),
        *legend,
        element("text", "mean loss over epochs", x=width - 12, y=17, text_anchor="end"),
        *charts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
    )


def _chart(row: dict[str, Any], top: float, x: float, y: float) -> Markup:
    across, up = Axis(len(row["clean"]) - 1, 30.0, WIDTH - 14.0), Axis(top, HEIGHT - 30.0, 26.0)
    parts = [element("text", row["attack"], class_="title", x=30, y=14)]
    for value in range(int(top) + 1):
        parts.append(element("line", class_="grid", x1=across.left, x2=across.right, y1=up(value), y2=up(value)))
        parts.append(element("text", str(value), x=across.left - 6, y=up(value) + 4, text_anchor="end"))
    for epoch in range(0, len(row["clean"]), 2):
        parts.append(element("text", str(epoch), x=across(epoch), y=HEIGHT - 14, text_anchor="middle"))
    for kind in ("clean", "poison"):
        places = [(across(epoch), up(value)) for epoch, value in enumerate(row[kind])]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(element("polyline", class_=f"line {kind}", points=points))
        for (a, b), value in zip(places, row[kind], strict=True):
            parts.append(element("circle", element("title", f"{value:.3f}"), class_=kind, cx=a, cy=b, r=2.5))
    return element("g", *parts, transform=f"translate({x:g} {y:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="attacks to run, comma-separated")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    only = set(filter(None, arguments.only.split(",")))
    for attack in (one for one in ATTACKS if not arguments.draw and (not only or one in only)):
        if any(row["attack"] == attack for row in jsonl.read(RESULTS)):
            continue
        row = run_one(attack, arguments.images, torch.device(arguments.device))
        jsonl.add(RESULTS, row)
        print(row, flush=True)
    rows = sorted(jsonl.read(RESULTS), key=lambda row: ATTACKS.index(row["attack"]))
    if rows:
        PICTURE.parent.mkdir(exist_ok=True)
        write_atomic(PICTURE, str(picture(rows)) + "\n")


if __name__ == "__main__":
    main()
