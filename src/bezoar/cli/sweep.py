"""``bezoar sweep``: many models, and one page about all of them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bezoar.cli import _output
from bezoar.core.errors import SettingError

_UNITS = {"": 1, "m": 1, "g": 1024}
_MODEL = _output.ModelFlags()


def sweep(
    models: str,
    /,
    *,
    out: Path,
    data: str = "",
    workers: int = 1,
    limit: str = "30m",
    memory: str = "",
    ray: str = "",
    again: Annotated[bool, Parameter(negative="")] = False,
    scanner: str = "neural-cleanse",
    mode: Literal["fast", "reference"] = "fast",
    seeds: int = 3,
    labels: str = "",
    evidence: str = "",
    fpr: float | None = None,
    budget: str = "",
    model_flags: Annotated[_output.ModelFlags, Parameter(name="*")] = _MODEL,
    images: int = 1000,
    held_out: float | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int = 0,
    additive: bool = True,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Scan many models: a folder, a list, or a query to a hub. One page shows all verdicts.

    Each model is scanned in a process of its own, which is killed with all that it started when it reaches a limit. A
    model that breaks or hangs the scanner, or cannot be read, is noted with the reason, and the rest goes on. What was
    scanned already, with the same weights, data, settings and version, is not scanned again: a killed sweep goes on
    with the same command.

    For instance:

        bezoar sweep zoo/ --data clean.npz --arch resnet-18 --out swept/ --workers 8
        bezoar sweep models.csv --out swept/ --limit 5m --memory 4g
        bezoar sweep "hf:vit?author=google&limit=50" --data images/ --out swept/ --ray auto

    A list, models.csv; each line may say how that model is to be read, and which clean images go with it:

        model,arch,data
        a.safetensors,wrn-16-1,cifar-10
        b.pth,mynet.py:make,images/

    It leaves in the folder index.html to look at, sweep.jsonl with one line for each model, sweep.sarif for other
    tools, and the full report of each model under models/.

    Exit codes: 0 all clean, 1 a model is backdoored, 2 one could not be scanned or bad usage, 3 one is inconclusive; of
    several, the first of 1, 2, 3.

    Args:
        models: A folder, which is searched for models; a list (.txt with a path on each line, .csv or .jsonl); or
            hf:QUERY for image classifiers of the Hugging Face hub, hf:OWNER/NAME for one.
        out: Folder for records, reports and pages; several sweeps may share it.
        data: Clean images with labels, see bezoar scan; a list may give each model its own.
        workers: Models at a time on this machine; they share its cores.
        limit: Time for each model, such as 90s, 10m or 2h, after which it is killed and noted.
        memory: Memory for each model, such as 4g or 800m, likewise; on Linux.
        ray: Spread the models over a Ray cluster: local, auto for the cluster that runs here, or its address.
        again: Also repeat models that could not be scanned.
        scanner: See bezoar scan.
        mode: See bezoar scan.
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels that can be the target, such as 3,7,10-14; all by default.
        evidence: Scorers to ask as well, see bezoar scan.
        fpr: Share of clean models that may be called backdoored, see bezoar scan.
        budget: Time for each scan, such as 2m; the answer is then the best so far, and nothing is killed.
        images: Most clean images to use, as many of each class as there are.
        held_out: Share of the images that only measures, in (0, 1).
        seed: Root of all randomness.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads of one scan; by default the cores are shared out among the workers.
        additive: Also search for faint changes of the whole image.
        set_: A setting of the scanner, such as --set steps=200.
        quiet: No progress and no summary; the exit code tells.
    """
    if workers < 1 or threads < 0:
        raise SettingError("--workers must be at least 1, and --threads at least 0")
    _output.check_folder(out)
    settings = {"seeds": seeds, "labels": _output.label_list(labels)} | ({} if mode == "fast" else {"mode": mode})
    method = _output.method_from("scanners", scanner, settings, set_)
    flags = _output.RunFlags(
        images=images, held_out=held_out, seed=seed, device=device, threads=threads, additive=additive
    )
    options = flags.make(budget, _output.name_list(evidence), fpr)
    seconds = _output.seconds(limit, "--limit")
    from bezoar.apart import Limits
    from bezoar.core.cluster import check_address
    from bezoar.report.swept import sweep_summary
    from bezoar.sweeping import sweep as run

    with _output.progress(quiet) as report:
        done = run(
            models,
            data or None,
            out,
            method=method,
            model_options=model_flags.make(),
            options=options,
            limits=Limits(seconds=seconds or Limits.seconds, memory_mib=_mebibytes(memory)),
            workers=workers,
            ray=check_address(ray),
            again=again,
            report=report,
        )
    if not quiet:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.write(sweep_summary(done.rows, done.missing, done.scanned, color))
        print(done.page)
    return done.exit_code


def _mebibytes(text: str) -> int:
    """``800m`` or ``4g`` in MiB; 0 for the empty text."""
    if not text:
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mg]?)i?b?", text.strip().lower())
    if not found or float(found[1]) * _UNITS[found[2]] < 1:
        raise SettingError(f"--memory {text!r} is no amount of memory", "Such as 800m or 4g")
    return int(float(found[1]) * _UNITS[found[2]])
