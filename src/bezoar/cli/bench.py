"""``bezoar bench``: attacks times purifiers, measured under equal means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bezoar.cli import _output
from bezoar.core.errors import SettingError

WEAK = 0.8  #: ASR below which a victim proves little about a defence.


def bench(
    grid: Path,
    /,
    *,
    out: Path,
    cell: str = "",
    again: Annotated[bool, Parameter(negative="")] = False,
    jobs: int = 1,
    ray: str = "",
    device: str = "auto",
    threads: int = 0,
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure purifiers on known backdoors, and write a leaderboard.

    The grid is a TOML file: victims (attacks, or folders of bezoar attack), purifiers, numbers of clean images and
    seeds. Victims that are missing are trained. Each cell is one JSON file, so a killed run goes on where it was, one
    that fails is noted and the others go on, and the same command may run several times side by side.

    For instance, a grid.toml:

        [grid]
        data = "fashion-mnist"
        archs = ["convnet-16-bn"]
        images = [500, 100]
        [recipe]
        epochs = 6
        [[victim]]
        attack = "badnets"
        [[victim]]
        attack = "none"
        [[purifier]]
        method = "finetune"
        [[purifier]]
        method = "auto"

        bezoar bench grid.toml --out bench/

    It leaves bench/leaderboard.html to look at and bench/results.sqlite to ask:

        sqlite3 bench/results.sqlite "SELECT purifier, avg(asr_after) FROM cells GROUP BY purifier"

    Exit codes: 0 all cells measured, 1 some failed, 2 the grid cannot be used.

    Args:
        grid: The TOML file.
        out: Folder for victims, cells, index and leaderboard.
        cell: Measure this cell alone, again; its key stands in the leaderboard.
        again: Also repeat cells that failed.
        jobs: Processes that share the work; with more than one, give --threads 1.
        ray: Spread the cells over a Ray cluster: local, auto for the one that runs here, or its address. All its nodes
            must share the folder of --out.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        quiet: No progress and no summary.
    """
    if jobs < 1 or threads < 0:
        raise SettingError("--jobs must be at least 1, and --threads at least 0")
    if ray and jobs > 1:
        raise SettingError("--jobs and --ray exclude each other", "Ray knows how many workers it has")
    _output.check_folder(out)
    from bezoar.bench.grid import read_grid
    from bezoar.bench.run import run_grid
    from bezoar.core.cluster import check_address
    from bezoar.session import device_named
    from bezoar.version import versions

    read = read_grid(grid)
    device_named(device)
    command = [sys.executable, "-m", "bezoar.cli.main", "bench", str(grid), "--out", str(out), "--quiet"]
    command += ["--device", device, "--threads", str(threads), *(["--again"] if again else [])]
    others = [subprocess.Popen(command) for _ in range(0 if cell else jobs - 1)]
    try:
        with _output.progress(quiet) as report:
            outcome = run_grid(
                read,
                out,
                {key: value for key, value in versions().items() if key in ("bezoar", "torch")},
                only=cell,
                again=again,
                device=device,
                threads=threads,
                ray=check_address(ray),
                report=report,
            )
        for other in others:
            other.wait()
    finally:
        for other in others:
            other.terminate()
    if not quiet:
        counts = ", ".join(f"{outcome.count(status)} {status}" for status in ("done", "refused", "failed"))
        print(f"{len(outcome.results)} cells: {counts}; {outcome.missing} missing")
        told: set[str] = set()
        for one in outcome.results:
            if one.status != "done" and one.error not in told:
                told.add(one.error)
                print(f"  {one.status}: {one.purifier} on {one.victim} ({one.key}): {one.error}")
        weak = sorted({o.victim for o in outcome.results if o.asr_before is not None and o.asr_before < WEAK})
        if weak:
            print(f"  weak: the backdoor works on under {WEAK:.0%} of the images in {', '.join(weak)}: no ground truth")
        print(outcome.page)
    return 1 if outcome.count("failed") else 0
