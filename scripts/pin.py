"""Resolve the requirements of pyproject.toml and write exact pins to ``requirements/*.txt``.

    python scripts/pin.py

Run it with the Python that the project supports first (3.11), then run ``make test``, and look at what changed.
Nothing is installed: pip only resolves. All files come from one resolution, so a library has one version everywhere.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

#: Raised by hand only: they belong together, and pip would otherwise take the newest torch.
HELD = {"torch": "2.13.0", "torchvision": "0.28.0"}

#: File, what it is for, and the extras that it adds to the dependencies.
FILES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("run", "what bezoar itself needs (make demo)", ()),
    (
        "test",
        "run, the optional readers, tests and linters (make test, make lint)",
        ("hf", "onnx", "data", "train", "ray", "test", "lint"),
    ),
    ("docs", "run and the documentation (make docs)", ("docs",)),
)


def wanted(project: dict[str, Any], extras: tuple[str, ...]) -> list[str]:
    """Direct requirements: the dependencies, some extras, and the build backend (installed, so builds are offline)."""
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        found += project["project"]["optional-dependencies"][extra]
    return found


def resolve(requirements: list[str], held: dict[str, str]) -> dict[str, str]:
    """Ask pip for the versions that it would install, as {normalised name: version without a local part}."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()))
        options = ["--quiet", "--dry-run", "--ignore-installed", "--constraint", str(constraints)]
        command = [sys.executable, "-m", "pip", "install", *options, "--report", str(report), *requirements]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    named = {_normal(item["metadata"]["name"]): item["metadata"]["version"].split("+")[0] for item in found}
    return dict(sorted(named.items()))


def render(purpose: str, pins: dict[str, str]) -> str:
    """Text of one requirements file."""
    head = f"# Made by scripts/pin.py: {purpose}.\n"
    return head + "".join(f"{name}=={version}\n" for name, version in pins.items())


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    everything = tuple(extra for _, _, extras in FILES for extra in extras)
    versions = resolve(wanted(project, everything), HELD)
    for name, purpose, extras in FILES:
        pins = resolve(wanted(project, extras), versions)
        (ROOT / "requirements" / f"{name}.txt").write_text(render(purpose, pins))
        print(f"requirements/{name}.txt: {len(pins)} pins")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
