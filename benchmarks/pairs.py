"""What the search for pairs of labels finds: source-specific and all-to-all backdoors, and clean nets.

    python benchmarks/scorers.py --threads 1 --scorers source-specific
    python benchmarks/pairs.py

The rows are those of ``scorers.py``; this prints them as a table, with the planted source and target beside the pair
that was found. The bound was chosen on the shared set (``set``), with ``tact_0`` and the all-to-all net of ``attacks``
in view; the fresh nets are for measuring.
"""

from __future__ import annotations

import math
from typing import Any

from bezoar.attacks._store import load_truth
from bezoar.ops.stats import wilson
from bezoar.scorers.source_specific import SourceSpecific, can_judge
from scorers import nets, read


def planted() -> dict[tuple[str, str], str]:
    """Backdoors that work on chosen sources, or differ from label to label: their pairs, by part and name of net."""
    out = {}
    for net in nets():
        folder = net.case.path.parent
        if net.case.target is None or not (folder / "truth.json").exists():
            continue
        labels = load_truth(folder).plants[0].labels
        if labels.kind == "all-to-all":
            out[net.case.part, net.case.name] = "each to the next"
        elif labels.sources:
            out[net.case.part, net.case.name] = f"{', '.join(map(str, labels.sources))} to {labels.target}"
    return out


def right(pair: str, truth: str, labels: int) -> bool:
    """Whether ``SOURCE>TARGET`` is a planted pair."""
    source, target = map(int, pair.split(">"))
    if truth == "each to the next":
        return target == (source + 1) % labels
    sources, _, end = truth.partition(" to ")
    return target == int(end) and str(source) in sources.split(", ")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each net with such a backdoor, then how many of all others are called backdoored."""
    found = [row for row in rows if row["scorer"] == "source-specific" and row["seed"] == 0 and "error" not in row]
    truths, method = planted(), SourceSpecific()
    lines = [
        "| net | planted | foremost pair | score | of other pairs | suspect | gradients, of all pairs | CPU s |",
        "|" + "---|" * 8,
    ]
    for row in found:
        truth = truths.get((row["part"], row["name"]))
        if truth is None:
            continue
        ranked = sorted(row["pairs"], key=row["pairs"].__getitem__, reverse=True)
        count = len(row["labels"])
        is_right = [right(pair, truth, count) for pair in ranked]
        wrong = [row["pairs"][pair] for pair, good in zip(ranked, is_right, strict=True) if not good]
        notes = row["notes"]
        share = f"{notes['gradients_for_sources']:,} of {notes['gradients_of_all_pairs']:,}"
        lines.append(
            f"| {row['part']} {row['name']} | {truth} | {ranked[0].replace('>', ' to ')}"
            f"{'' if is_right[0] else ' (wrong)'} | {row['model']:.2f} | {max(wrong, default=math.nan):.2f} | "
            f"{_suspect(row, method)} | {share} | {row['cpu_seconds']:.0f} |"
        )
    lines += ["", "| other nets of ten labels | part | suspect | highest score |", "|---|---|---|---|"]
    for kind, is_planted in (("clean", False), ("with another backdoor", True)):
        for part in ("set", "fresh", "attacks", "published"):
            some = [
                row
                for row in found
                if (row["part"], row["planted"]) == (part, is_planted)
                and (part, row["name"]) not in truths
                and can_judge(len(row["labels"]))
            ]
            if some:
                over = sum(_suspect(row, method) == "yes" for row in some)
                high = f" (under {wilson(over / len(some), len(some), 1.645)[1]:.1%})" if not is_planted else ""
                lines.append(
                    f"| {kind} | {part} | {over} of {len(some)}{high} | {max(row['model'] for row in some):.2f} |"
                )
    return "\n".join(lines)


def _suspect(row: dict[str, Any], method: SourceSpecific) -> str:
    count = len(row["labels"])
    return "no verdict" if not can_judge(count) else "yes" if row["model"] > method.bound_for(count) else "no"


if __name__ == "__main__":
    print(table(read()))
