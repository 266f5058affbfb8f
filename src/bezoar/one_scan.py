"""One scan in a process of its own: the job comes on standard input, the report goes to a folder.

    python -m bezoar.one_scan < job.json

A sweep starts it, so that a model that breaks or hangs the scanner takes nothing else with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from bezoar.apart import ERROR
from bezoar.core.errors import BezoarError, ModelError
from bezoar.core.results import write_atomic


def main() -> None:
    """Scan what the first line of standard input says; code 0 also where the model was refused, see ``error.json``."""
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    folder = Path(job["folder"])
    try:
        _scan(job, folder)
    except BezoarError as error:
        _failed(folder, "refused", error.message, error.hint)
    except Exception as error:  # a stranger's model raises anything
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        _failed(folder, "crashed", f"{type(error).__name__}: {lines[0] if lines else ''}"[:500], "")
    sys.stderr.flush()
    os._exit(0)  # what a model left behind, such as threads that never end, is no reason to wait


def _scan(job: dict[str, Any], folder: Path) -> None:
    from bezoar.api import scan
    from bezoar.core.registry import find
    from bezoar.io.hub_models import HubModel
    from bezoar.options import ModelOptions, RunOptions

    model = job["model"]
    if job["hub"] is not None:
        model = HubModel(**job["hub"]).fetch(folder / "model")
    result = scan(
        model,
        job["data"],
        method=find("scanners", job["method"])(**_tuples(job["config"])),
        model_options=ModelOptions(**_tuples(job["model_options"])),
        options=RunOptions(**_tuples(job["options"])),
    )
    if job["sha256"] not in ("", result.report.model.sha256):
        raise ModelError("the model changed between hashing and scanning it", "Scan it again with --again")
    if job["hub"] is not None:  # the folder is gone when the report is read
        facts = dataclasses.replace(result.report.model, path=job["name"])
        result = dataclasses.replace(result, report=dataclasses.replace(result.report, model=facts))
    result.save(folder)


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _failed(folder: Path, outcome: str, error: str, hint: str) -> None:
    write_atomic(folder / ERROR, json.dumps({"outcome": outcome, "error": error, "hint": hint}))


def _leave_with_the_parent() -> None:
    while sys.stdin.buffer.read(1024):
        pass
    with contextlib.suppress(OSError):
        os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
