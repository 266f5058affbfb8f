"""The table of broken and hostile models and data sets, each with the error that a user sees.

    python benchmarks/hostile.py > docs/hostile-inputs.md

Builds each of them in a temporary folder, opens it, and checks that nothing was executed and no file was left.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bezoar.core.errors import BezoarError  # noqa: E402
from bezoar.io.data import load_data  # noqa: E402
from bezoar.io.models import load_model  # noqa: E402
from tests.io.hostile_data import CASES as DATA_CASES  # noqa: E402
from tests.io.hostile_models import CASES as MODEL_CASES  # noqa: E402


def files(folder: Path) -> set[Path]:
    """All files below a folder."""
    return {p for p in folder.rglob("*") if not p.is_dir()}


def line(kind: str, case, load) -> str:  # type: ignore[no-untyped-def]
    """One row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = case.build(folder)
        before = files(folder)
        try:
            load(source, **case.kwargs)
        except BezoarError as error:
            said = f"{type(error).__name__}: {error.message}"
        else:
            said = "NO ERROR"
        after = files(folder)
    said = said.replace(name, "DIR").replace("|", "\\|").replace("\n", " ")
    left = "none" if after == before else f"{len(after - before)} new"
    return f"| {kind} | {case.name} | {said[:180]} | {left} |"


def main() -> None:
    print("# Broken and hostile inputs\n")
    print("Made by `python benchmarks/hostile.py`. Nothing of what the files bring along is executed.\n")
    print("| input | case | what the user is told | files left |\n|---|---|---|---|")
    defaults = {"num_classes": None, "size": None, "channels": None}
    for case in MODEL_CASES:
        print(line("model", case, load_model))
    for case in DATA_CASES:
        print(line("data", case, lambda source, **k: load_data(source, **(defaults | k))))


if __name__ == "__main__":
    main()
