"""The measurements behind docs/results.md, in order. Each keeps what it has finished, so a killed run goes on.

python benchmarks/run.py --list
python benchmarks/run.py                 all of them: hours on two cores
python benchmarks/run.py scaling speed   some of them
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STUDIES: dict[str, list[str]] = {
    "victims-calibration": ["victims.py", "--part", "calibration"],
    "victims-report": ["victims.py", "--part", "report"],
    "verdicts-calibration": ["verdicts.py", "--part", "calibration", "--seeds", "2"],
    "calibrate": ["calibrate.py"],
    "verdicts-published": ["verdicts.py", "--part", "published", "--seeds", "5"],
    "verdicts-report": ["verdicts.py", "--part", "report", "--seeds", "5"],
    "speed": ["speed.py"],
    "scaling": ["scaling.py"],
    "sweep": ["sweep.py", "--models", "8", "--workers", "1,2"],
    "unlearning": ["unlearning.py"],
    "corner": ["corner.py"],
    "attacks": ["attacks.py"],
    "victim-set": ["victim_set.py"],
    "verdicts-set": ["verdicts.py", "--part", "set", "--seeds", "1"],
    "student-500": ["student.py", "--images", "500"],
    "student-50": ["student.py", "--images", "50"],
    "student-2500": ["student.py", "--images", "2500", "--only", "nad,finetune", "--seeds", "3"],
    "hostile": ["hostile.py"],
    "page": ["results_page.py"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], help="some of them; all by default")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    for name in arguments.studies or STUDIES:
        command = " ".join(["python", f"benchmarks/{STUDIES[name][0]}", *STUDIES[name][1:]])
        print(f"{name}: {command}", flush=True)
        if not arguments.list:
            subprocess.run([sys.executable, HERE / STUDIES[name][0], *STUDIES[name][1:]], check=True)


if __name__ == "__main__":
    main()
