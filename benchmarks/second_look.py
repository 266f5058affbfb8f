"""What the second look with a student of the model changes in the verdicts of a scan by its own rule.

    python benchmarks/second_look.py --part fresh --threads 1
    python benchmarks/second_look.py --table

The nets are those of ``scorers.py``, each with 500 clean test images and one seed. Each is one line of
``benchmarks/results/second_look.jsonl``; a finished one is not run again. The settings of the look were chosen on the
shared set; all other nets are for measuring.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonl
import torch

from bezoar.core.evidence import Scan
from bezoar.evidence import student_transfer
from bezoar.ops.second_look import second_look
from bezoar.ops.stats import wilson
from bezoar.ops.student import Transfer
from bezoar.ops.verdict import Judgement, confirm, judge, lead
from bezoar.options import RunOptions
from bezoar.scanners.additive_inversion import AdditiveInversion
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.scanning import look_for
from bezoar.session import open_session
from scorers import Net, _options, nets

RESULTS = Path(__file__).parent / "results" / "second_look.jsonl"
PARTS = ("set", "fresh", "attacks", "published")


def line(net: Net, scans: Sequence[Scan], names: tuple[str, ...], moved: Transfer) -> dict[str, Any]:
    """Both verdicts of a net from what was found in it."""
    before = [judge(scan, names) for scan in scans]
    before[1:] = [confirm(one, scans[0]) for one in before[1:]]
    first = before[lead(before)]
    again = first
    if first.verdict != "clean":
        after = second_look(scans, before, names, moved)
        again = after[lead(after)]
    return {
        "part": net.case.part,
        "name": net.case.name,
        "attack": net.case.attack,
        "targets": list(net.case.targets),
        "planted": net.case.target is not None,
        "before": _told(first),
        "after": _told(again),
        "transfer": [round(moved(first.leader, scan.seeds[0].labels[first.leader]), 4) for scan in scans],
    }


def _told(one: Judgement) -> dict[str, Any]:
    return {"verdict": one.verdict, "target": one.target, "leader": one.leader}


def run_one(net: Net) -> dict[str, Any]:
    """Search a net for masks and for faint changes, and judge it twice."""
    with open_session(net.model, net.case.clean_images(0), _options(net), RunOptions(), None) as session:
        methods = (NeuralCleanse(seeds=1), AdditiveInversion(seeds=1))
        scans = [look_for(session, method).evidence for method in methods]
        return line(net, scans, session.data.facts.names, student_transfer(session, scans))


def kind(row: dict[str, Any], when: str) -> str:
    """A verdict in a word, with whether the label is right."""
    told = row[when]
    if told["verdict"] != "backdoored" or not row["planted"]:
        return str(told["verdict"])
    return "right label" if told["target"] in row["targets"] else "other label"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: counts of the verdicts before and after, and which nets changed."""
    words = ("right label", "other label", "inconclusive", "clean")
    lines = [
        "| nets | | backdoored, right label | other label | inconclusive | clean |",
        "|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        for planted in (True, False):
            some = [row for row in rows if row["part"] == part and row["planted"] == planted]
            for when in ("before", "after") if some else ():
                count = Counter(kind(row, when) for row in some)
                count["other label"] += count["backdoored"]
                name = f"{part}, {'backdoored' if planted else 'clean'} ({len(some)})"
                lines.append(f"| {name} | {when} | " + " | ".join(str(count[word]) for word in words) + " |")
    clean = [row for row in rows if not row["planted"] and row["part"] != "set"]
    alarms = sum(row["after"]["verdict"] == "backdoored" for row in clean)
    if clean:
        high = wilson(alarms / len(clean), len(clean), 1.645)[1]
        lines += ["", f"False alarms outside the set: {alarms} of {len(clean)} clean nets (under {high:.1%})."]
    changed = [row for row in rows if row["before"]["verdict"] != row["after"]["verdict"]]
    lines += ["", "Changed: " + ", ".join(f"{row['name']} ({kind(row, 'after')})" for row in changed) + "."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--only", default="", help="only nets whose name contains one of these, separated by commas")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(jsonl.read(RESULTS)))
        return
    torch.set_num_threads(arguments.threads)
    for net in nets():
        case = net.case
        wanted = arguments.part in (None, case.part) and any(one in case.name for one in arguments.only.split(","))
        done = any((row["part"], row["name"]) == (case.part, case.name) for row in jsonl.read(RESULTS))
        if wanted and not done:
            row = run_one(net)
            jsonl.add(RESULTS, row)
            print({k: row[k] for k in ("name", "targets", "before", "after")}, flush=True)


if __name__ == "__main__":
    main()
