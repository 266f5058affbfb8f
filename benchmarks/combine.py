"""Calibrate the combined verdict on clean nets, and measure it on nets of other kinds.

    python benchmarks/scorers.py --threads 1
    python benchmarks/combine.py --fit
    python benchmarks/combine.py --table

``--fit`` writes the scores of the clean nets of the shared and the fresh set into the package; nothing else goes into
the p-value, no backdoored net in particular. ``--table`` judges each net by the clean nets of other kinds alone: none
of the same data and architecture takes part.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

from bezoar.core.results import write_atomic
from bezoar.evidence import COMBINED, CONCENTRATION, MASKS
from bezoar.ops.combined import PAIRS, CleanNet, clean_nets_file, combine, verdict
from bezoar.ops.stats import wilson
from scorers import auroc, read, tpr

#: What a combined verdict rests on, and what it can take in besides.
SEARCHED = (MASKS, CONCENTRATION, "additive-inversion")
Kind = tuple[str, str]
SOURCES = (*SEARCHED, PAIRS, *COMBINED)
#: Sources of the rows of scorers.py that go by another name: what counts are sizes after the student.
RAW = {MASKS: "masks, no student", "additive-inversion": "faint changes, no student"}
ROWS = {f"{name}-student": name for name in RAW} | RAW
NO_STUDENT = (RAW[MASKS], CONCENTRATION, RAW["additive-inversion"])
#: Family of each attack, after what a defence has to see.
FAMILIES = {
    "patch": ("badnets", "trojan", "several", "3x3", "4x4", "L0", "watermark"),
    "blend": ("blend", "refool", "adaptive-blend", "adaptive-patch", "bppa", "issba"),
    "warp": ("wanet",),
    "frequency": ("ftrojan", "sig", "smooth"),
    "learned": ("input-aware", "lira", "dfst"),
    "clean-label": ("label-consistent", "feature-collision"),
    "source-specific": ("tact", "composite"),
}


def family(attack: str) -> str:
    """The family of an attack with its settings."""
    name = attack.split()[0]
    if "all-to-all" in attack:
        return "all-to-all"
    if name == "sig" and "dirty" not in attack or name == "refool" and "dirty" not in attack:
        return "clean-label"
    return next((kind for kind, names in FAMILIES.items() if name in names), name)


def collected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each net whose evidence is complete: scores by source."""
    nets: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["seed"] != 0 or "error" in row:
            continue
        source = ROWS.get(row["scorer"], row["scorer"])
        net = nets.setdefault((row["part"], row["name"]), {k: row[k] for k in ("part", "name", "data", "arch")})
        net |= {"attack": row["attack"], "targets": row["targets"], "planted": row["planted"]}
        net.setdefault("scores", {})[source] = {int(k): v for k, v in row["labels"].items()}
    return [net for net in nets.values() if all(source in net["scores"] for source in SEARCHED)]


def calibration(nets: list[dict[str, Any]]) -> list[tuple[Kind, CleanNet]]:
    """The clean nets of the shared and the fresh set with their kinds, and the scores of all their labels in order."""
    return [
        (kind(net), CleanNet(net["name"], {s: tuple(one[k] for k in sorted(one)) for s, one in net["scores"].items()}))
        for net in sorted(nets, key=lambda one: (str(one["part"]), str(one["name"])))
        if net["part"] in ("set", "fresh") and not net["planted"]
    ]


def kind(net: dict[str, Any]) -> Kind:
    """Data and architecture of a net."""
    return str(net["data"]), str(net["arch"])


def fit(nets: list[dict[str, Any]]) -> None:
    """Write the scores of the clean nets into the package: those of the searches, and of the scorers where they are."""
    found = [
        {"name": net.name, "scores": {source: net.scores[source] for source in SOURCES if source in net.scores}}
        for _, net in calibration(nets)
    ]
    lines = ",\n".join("  " + json.dumps(one) for one in found)
    write_atomic(clean_nets_file(), f'{{\n "made_by": "benchmarks/combine.py --fit",\n "nets": [\n{lines}\n ]\n}}\n')
    print(f"{len(found)} clean nets written to {clean_nets_file()}")


def judged(net: dict[str, Any], sources: tuple[str, ...], reference: list[tuple[Kind, CleanNet]]) -> dict[str, Any]:
    """P-value and label of a net, from some of the sources; it is held against clean nets of other kinds alone."""
    others = [one for its, one in reference if its != kind(net)]
    whole = combine({source: net["scores"][source] for source in sources}, others)
    return net | {"pvalue": whole.pvalue, "label": whole.target}


def table(nets: list[dict[str, Any]], fpr: float) -> str:
    """Markdown: all together, over families of attacks, and each source alone."""
    lines = [
        "| sources | nets | attack | backdoored / clean | AUROC | TPR at 1 % FPR | TPR at 5 % FPR | right label | "
        f"p at most {fpr:g}: backdoored, clean | p above 0.1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = calibration(nets)
    looks: list[tuple[str, tuple[str, ...]]] = [("searches and student", SEARCHED), ("without the student", NO_STUDENT)]
    looks += [("with pairs of labels", (*SEARCHED, PAIRS)), ("with the scorers", (*SEARCHED, *COMBINED))]
    looks += [*((source, (source,)) for source in (*SOURCES, *RAW.values()))]
    for name, sources in looks:
        rows = [judged(net, sources, reference) for net in nets if all(s in net["scores"] for s in sources)]
        for part in ("all", "set", "fresh", "attacks", "published"):
            some = [row for row in rows if part in ("all", row["part"])]
            if some:
                full = part == "all" and sources in (SEARCHED, (*SEARCHED, PAIRS))
                lines += _families(name, part, some, fpr)[: None if full else 1]
    return "\n".join(lines)


def _families(name: str, part: str, rows: list[dict[str, Any]], fpr: float) -> list[str]:
    clean = [row for row in rows if not row["planted"]]
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    families["all"] = [row for row in rows if row["planted"]]
    for row in families["all"]:
        families[family(row["attack"])].append(row)
    return [_line(name, part, kind, found, clean, fpr) for kind, found in families.items()]


def _line(name: str, part: str, kind: str, found: list[dict[str, Any]], clean: list[dict[str, Any]], fpr: float) -> str:
    positive, negative = ([-row["pvalue"] for row in rows] for rows in (found, clean))
    claimed = [row for row in found if row["targets"]]
    right = f"{sum(row['label'] in row['targets'] for row in claimed)} of {len(claimed)}"
    hits, alarms = (sum(row["pvalue"] <= fpr for row in rows) for rows in (found, clean))
    missed, passed = (sum(verdict(row["pvalue"], fpr, "clean") == "clean" for row in rows) for rows in (found, clean))
    high = f" (under {wilson(alarms / len(clean), len(clean), 1.645)[1]:.1%})" if clean else ""
    rates = " | ".join(f"{tpr(positive, negative, at):.2f}" for at in (0.01, 0.05))
    return (
        f"| {name} | {part} | {kind} | {len(found)} / {len(clean)} | {auroc(positive, negative):.3f} | {rates} "
        f"| {right} | {hits} of {len(found)}, {alarms} of {len(clean)}{high} | {missed}, {passed} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="write the clean nets into the package")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--each", action="store_true", help="print each net")
    parser.add_argument("--fpr", type=float, default=0.01)
    arguments = parser.parse_args()
    nets = collected(read())
    if arguments.fit:
        fit(nets)
    if arguments.table:
        print(table(nets, arguments.fpr))
    if arguments.each:
        for row in sorted((judged(net, SEARCHED, calibration(nets)) for net in nets), key=lambda row: row["pvalue"]):
            print(f"{row['pvalue']:.2e} {row['label']:>3} {row['targets']!s:8} {row['part']} {row['name']}")


if __name__ == "__main__":
    main()
