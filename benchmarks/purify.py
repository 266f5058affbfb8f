"""The grids of all purifiers as tables: what ``bezoar bench benchmarks/grids/purify-*.toml --out OUT`` measured.

python benchmarks/purify.py --keep OUT...   put the cells of finished or running grids into results/purify.jsonl, where
                                            they replace earlier ones of the same victim, purifier, images and seed
python benchmarks/purify.py                 print the tables
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from bezoar.core.cell import CellResult
from bezoar.core.plain import built
from bezoar.core.results import write_atomic
from bezoar.report.board import Line, lines

RESULTS = Path(__file__).parent / "results" / "purify.jsonl"
#: Kept of each cell; keys, settings and versions stand in the grid's own folder.
KEPT = (
    *("victim", "attack", "arch", "data", "purifier", "method", "oracle", "images", "seed", "status", "error"),
    *("acc_before", "acc_after", "asr_before", "asr_after", "ra_before", "ra_after", "der"),
    *("seconds", "cpu_seconds", "scan_seconds", "image_gradients", "notes"),
)


def keep(folders: list[Path]) -> int:
    """Copy the figures of all cells of some grids."""
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for folder in folders:
        found += [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]
    kept = {
        (row["arch"], -row["images"], row["victim"], row["purifier"], row["seed"]): {name: row[name] for name in KEPT}
        for row in found
    }
    rows = [kept[key] for key in sorted(kept)]
    write_atomic(RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def read() -> list[CellResult]:
    """All cells that are kept."""
    if not RESULTS.exists():
        return []
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    made: list[CellResult] = [built(CellResult, {"key": str(n), "config": {}, **row}) for n, row in enumerate(rows)]
    return made


def tables(results: list[CellResult]) -> str:
    """For each architecture and number of images: means over the victims, then victim by victim."""
    groups: dict[tuple[str, int], list[CellResult]] = defaultdict(list)
    for one in results:
        groups[one.arch, one.images].append(one)
    parts = []
    for (arch, images), found in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1])):
        whole = _complete(found)
        parts.append(f"### {arch}, {images} clean images\n\n{_means(whole)}\n\n{_victims(whole)}")
    return "\n\n".join(parts)


def _complete(found: list[CellResult]) -> list[CellResult]:
    """Only victims that every purifier was tried on, so that means are over the same ones."""
    purifiers = {one.purifier for one in found}
    seen: dict[str, set[str]] = defaultdict(set)
    for one in found:
        seen[one.victim].add(one.purifier)
    return [one for one in found if seen[one.victim] == purifiers]


def _means(found: list[CellResult]) -> str:
    head = "| purifier | DER | mean ASR | worst ASR | RA | ACC loss | worst | clean net's | CPU s | image-gradients |"
    rows = [head, "|" + "---|" * 10]
    best: dict[str, float] = {}
    for one in found:
        if one.der is not None and one.method != "auto":
            best[one.victim] = max(best.get(one.victim, 0.0), one.der)
    for line in lines(found):
        rows.append(f"| {_name(line)} | {' | '.join(_figures(line))} |")
    mine = {one.victim: one.der for one in found if one.method == "auto" and one.der is not None}
    near = sum(mine[v] >= best[v] - 0.01 for v in mine if v in best)
    over = sum(mine[v] >= best[v] for v in mine if v in best)
    note = (
        f"`auto` has the highest DER of all on {over} of {len(mine)} victims, and is within one point of it on {near}."
    )
    return "\n".join([*rows, "", note])


def _name(line: Line) -> str:
    more = [f"{line.refused} refused"] if line.refused else []
    more += [f"{line.failed} failed"] if line.failed else []
    return f"{line.purifier} ({', '.join(more)})" if more else line.purifier


def _figures(line: Line) -> list[str]:
    rates = (line.der, line.asr, line.worst_asr, line.ra, line.acc_loss, line.worst_acc_loss, line.clean_loss)
    cost = "-" if line.cpu_seconds is None else f"{line.cpu_seconds:.1f}"
    gradients = "-" if line.image_gradients is None else f"{line.image_gradients:,.0f}"
    return [*("-" if v is None else f"{100 * v:.1f}" for v in rates), cost, gradients]


def _victims(found: list[CellResult]) -> str:
    names = sorted({one.victim for one in found if one.asr_after is not None})
    rows = [f"| ACC / ASR | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    by: dict[tuple[str, str], list[CellResult]] = defaultdict(list)
    for one in found:
        by[one.purifier, one.victim].append(one)

    def rates(rows: list[CellResult], when: str) -> str:
        values: list[Any] = [
            [getattr(r, f"{kind}_{when}") for r in rows if getattr(r, f"{kind}_{when}") is not None]
            for kind in ("acc", "asr")
        ]
        return " / ".join(f"{100 * mean(v):.1f}" for v in values) if all(values) else "-"

    first = found[0].purifier if found else ""
    rows.append(f"| before | {' | '.join(rates(by[first, name], 'before') for name in names)} |")
    for line in lines(found):
        rows.append(f"| {line.purifier} | {' | '.join(rates(by[line.purifier, name], 'after') for name in names)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, nargs="+", help="folders that bezoar bench --out wrote")
    arguments = parser.parse_args()
    if arguments.keep is not None:
        print(f"{keep(arguments.keep)} cells")
        return
    print(tables(read()))


if __name__ == "__main__":
    main()
