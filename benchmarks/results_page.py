"""Fill ``benchmarks/results_page.md.in`` with the figures of ``benchmarks/results/``: docs/results.md.

    python benchmarks/results_page.py

Tables and every figure that a study wrote are put in here; the words around them are in the template.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import abl
import calibrate
import combine
import guard
import jsonl
import pairs
import purify
import scaling
import second_look
import stress
import student
import sweep
import verdicts
import victim_set
from victims import OUT

import attacks
import filters
import scorers
from bezoar.scorers.source_specific import SourceSpecific

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "results.md"
_ORDER = {"published": 0, "report": 1, "calibration": 2, "set": 3}


def _json(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _rows() -> list[dict[str, Any]]:
    return sorted(verdicts.read(), key=lambda r: (_ORDER[str(r["part"])], r["truth"] is None, r["name"], r["seed"]))


def _summary(rows: list[dict[str, Any]]) -> str:
    clean = [r for r in rows if r["truth"] is None]
    planted = [r for r in rows if r["truth"] is not None and r["truth"] >= 0]
    told = {id(r): verdicts.together(r) for r in rows}

    def count(found: list[dict[str, Any]], wanted: str) -> int:
        return sum(told[id(r)][0] == wanted for r in found)

    right = sum(verdicts.is_right(r) for r in planted)
    wrong = count(planted, "backdoored") - right
    found, first = (sum(r[key] in (r.get("targets") or [r["truth"]]) for r in planted) for key in ("target", "leader"))
    return (
        f"{count(clean, 'backdoored')} of {len(clean)} scans of "
        f"{len({r['name'] for r in clean})} clean nets say `backdoored` ({count(clean, 'inconclusive')} say "
        f"`inconclusive`); {right} of {len(planted)} scans of {len({r['name'] for r in planted})} backdoored nets say "
        f"`backdoored` with the right label, {wrong} with a wrong one, {count(planted, 'inconclusive')} are "
        f"`inconclusive` and {count(planted, 'clean')} say `clean`. The search for masks alone finds {found}; it ranks "
        f"a right label first in {first}."
    )


def _mad(rows: list[dict[str, Any]]) -> tuple[str, str]:
    clean = [r for r in rows if r["truth"] is None]
    planted = [r for r in rows if r["truth"] is not None and r["truth"] >= 0]
    return (
        f"{sum(r['index'] > 2 for r in clean)} of {len(clean)}",
        f"{sum(r['index'] <= 2 for r in planted)} of {len(planted)}",
    )


def _victims() -> str:
    lines = ["| net | planted | ACC | ASR |", "|---|---|---|---|"]
    for file in sorted(OUT.glob("*.json")):
        facts = json.loads(file.read_text())
        planted = "-" if facts["attack"] is None else f"{facts['attack']}, target {facts['target']}"
        asr = f"{facts['asr']:.1%}" if "asr" in facts else "-"
        lines.append(f"| {facts['name']} | {planted} | {facts['acc']:.1%} | {asr} |")
    return "\n".join(lines)


def _speed() -> str:
    rows = _json("speed.json")["rows"]
    lines = ["| procedure | wall s | CPU s | image-gradients | verdict |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        told = f"{row['verdict']}, label {row['target']}"
        lines.append(f"| {name} | {row['wall']} | {row['cpu']} | {row['image_gradients']:,} | {told} |")
    slow, one, three = (rows[k] for k in ("reference, 1 seed", "fast, 1 seed", "fast, 3 seeds (default)"))

    def times(key: str) -> str:
        return f"{slow[key] / one[key]:.0f} and {slow[key] / three[key]:.0f}"

    return "\n".join(
        [
            *lines,
            "",
            "For the same verdict, and held against `reference` with one seed, `fast` with one seed and with three "
            f"takes {times('cpu')} times less CPU time, {times('wall')} times less wall time and "
            f"{times('image_gradients')} times fewer image-gradients.",
        ]
    )


def _peers() -> str:
    rows = _json("speed.json")["rows"]
    one, three = (rows[k]["image_gradients"] for k in ("fast, 1 seed", "fast, 3 seeds (default)"))
    return (
        f"That is {2e6 / one:.0f} and {5e6 / one:.0f} times what `fast` takes with one seed, {2e6 / three:.0f} and "
        f"{5e6 / three:.0f} times with its default of three, the search for faint changes and the second look included."
    )


def _unlearning() -> str:
    lines = [
        "| seed | before: ACC / ASR | unlearn: ACC / ASR / RA | finetune: ACC / ASR |",
        "|---|---|---|---|",
    ]
    for row in _json("unlearning.json"):
        before, after, tuned = row["before"], row["unlearn"], row["finetune"]
        lines.append(
            f"| {row['seed']} | {before['acc']:.2%} / {before['asr']:.2%} | "
            f"{after['acc']:.2%} / {after['asr']:.2%} / {after['ra']:.2%} | {tuned['acc']:.2%} / {tuned['asr']:.2%} |"
        )
    return "\n".join(lines)


def _corner() -> str:
    lines = ["| seed | verdict | size, px | centre (row, column) | share in the corner |", "|---|---|---|---|---|"]
    for row in _json("corner.json"):
        lines.append(
            f"| {row['seed']} | {row['verdict']}, label {row['target']} | {row['size']} | "
            f"{row['row']}, {row['column']} | {row['in_corner']:.0%} |"
        )
    return "\n".join(lines)


def _set_count() -> str:
    made = victim_set.finished()
    clean = sum(facts["attack"] is None for facts in made)
    if len(made) == len(victim_set.members()):
        return "All are trained."
    return f"Trained so far: {clean} clean, {len(made) - clean} backdoored; the command goes on with the rest."


def _asr(attack: str, settings: str) -> str:
    found = [r["asr"] for r in attacks.read() if r["attack"] == attack and r["settings"] == settings]
    return f"{100 * float(str(found[0])):.1f} %" if found else "(not run)"


def _consistent() -> str:
    values = [_asr("label-consistent", one) for one in ("epsilon=8/255", "", "epsilon=64/255")]
    return "the trigger moves " + ", ".join(values[:2]) + f" and {values[2]}"


def _refool() -> str:
    return (
        f"{_asr('refool', '')} with reflections that no training image carried, "
        f"{_asr('refool', 'test_reflections=0')} with those of the training images"
    )


def _printed(call: Any) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call()
    return out.getvalue().strip()


def main() -> None:
    rows = _rows()
    shown = [r for r in rows if r["part"] in ("published", "report")]
    small = [r for r in rows if r["part"] == "set"]
    alarms, misses = _mad(shown)
    hostile = (HERE.parent / "docs" / "hostile-inputs.md").read_text().splitlines()
    found = {
        "VERDICTS": verdicts.table([r for r in rows if r["part"] != "set"]),
        "SUMMARY": "Over the published and the report nets: " + _summary(shown),
        "SETVERDICTS": verdicts.table(small),
        "SETSUMMARY": _summary(small),
        "MADFALSE": alarms,
        "MADMISS": misses,
        "VICTIMS": _victims(),
        "CALIBRATE": _printed(calibrate.main),
        "SPEED": _speed(),
        "PEERS": _peers(),
        "SCALING": scaling.table(jsonl.read(scaling.RESULTS) + jsonl.read(scaling.MEMORY)),
        "SECOND": second_look.table(jsonl.read(second_look.RESULTS)),
        "PAIRS": pairs.table(scorers.read()),
        "BOUND": f"{SourceSpecific.bound:g}",
        "TOGETHER": combine.table(combine.collected(scorers.read()), 0.01),
        "UNLEARN": _unlearning(),
        "STRESS": stress.table(jsonl.read(stress.RESULTS)),
        "SWEEP": sweep.table(_json("sweep.json")),
        "CORNER": _corner(),
        "ATTACKS": attacks.table(attacks.read()),
        "CONSISTENT": _consistent(),
        "REFOOL": _refool(),
        "TRAIN": abl.table(abl.read()),
        "GUARDS": guard.table(guard.read()),
        "FILTERS": filters.table(sorted(filters.read(), key=lambda r: (r["victim"], r["filter"]))),
        "SET": _printed(victim_set.show),
        "SETCOUNT": _set_count(),
        "PURIFY": purify.tables(purify.read()),
        "STUDENT": student.table(student.read()),
        "HOSTILE": str(sum(line.startswith("| ") for line in hostile) - 1),
    }
    text = (HERE / "results_page.md.in").read_text()
    for name, value in found.items():
        text = text.replace(f"@@{name}@@", value)
    PAGE.write_text(text)
    print(f"{PAGE.relative_to(HERE.parent)}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
