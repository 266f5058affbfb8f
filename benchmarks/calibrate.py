"""What the bounds of the verdict rule rest on: size ratios of the calibration nets, clean and backdoored.

    python benchmarks/verdicts.py --part calibration --seeds 2
    python benchmarks/calibrate.py

Prints the highest ratio of a backdoored net's target label, the lowest ratio of any label of a clean net, and how often
the rule errs on the calibration nets. The bounds were set by hand between the two, and are not fitted further.
"""

from __future__ import annotations

from verdicts import gap, read, together

from bezoar.ops.stats import wilson
from bezoar.ops.verdict import RatioRule


def upper_bound(errors: int, count: int, z: float = 1.645) -> float:
    """One-sided 95 % Wilson bound of an error rate."""
    return wilson(errors / count, count, z)[1]


def main() -> None:
    rows = [r for r in read() if r["part"] == "calibration"]
    clean = [r for r in rows if r["truth"] is None]
    planted = [r for r in rows if r["truth"] is not None]
    rule = RatioRule()
    print(f"{len({r['name'] for r in clean})} clean nets, {len(clean)} scans: lowest ratio", end=" ")
    print(f"{min(float(str(r['ratio'])) for r in clean):.3f}")
    right = [r for r in planted if r["leader"] == r["truth"]]
    print(
        f"{len({r['name'] for r in planted})} backdoored nets, {len(planted)} scans, target first in {len(right)}:",
        end=" ",
    )
    print(f"highest ratio {max(float(str(r['ratio'])) for r in right):.3f}")
    for name, found in (("clean", clean), ("backdoored", right)):
        gaps = sorted((gap(r), str(r["name"])) for r in found)
        print(f"size over the third smallest, {name}:", ", ".join(f"{value:.2f} {net}" for value, net in gaps))
    print(f"bounds: backdoored at most {rule.backdoored_ratio}, clean at least {rule.clean_ratio}")
    for name, found in (("clean", clean), ("backdoored", planted)):
        faint = sorted(
            (float(str(r["faint"]["ratio"])), str(r["name"])) for r in found if isinstance(r.get("faint"), dict)
        )
        print(f"faint changes, {name}:", ", ".join(f"{ratio:.2f} {net}" for ratio, net in faint))
    alarms = sum(together(r)[0] == "backdoored" for r in clean)
    missed = sum(together(r)[1] != r["truth"] for r in planted)
    print(f"false alarms: {alarms} of {len(clean)} scans, upper bound {upper_bound(alarms, len(clean)):.0%}")
    print(f"not found: {missed} of {len(planted)} scans, upper bound {upper_bound(missed, len(planted)):.0%}")


if __name__ == "__main__":
    main()
