"""Sweeps and the executor: throughput, overhead of a piece, Ray against serial, a killed sweep, a killed node.

    python benchmarks/sweep.py                      all parts
    python benchmarks/sweep.py throughput ray       some of them
    python benchmarks/sweep.py --models 4 --workers 1,2,4

The models are the small nets of ``victims.py`` and ``victim_set.py``. Each part goes to ``results/sweep.json`` when it
is done. Times by the wall depend on what else the machine does; CPU times hardly do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonl
import numpy as np
import torch
from datasets import load
from victims import OUT

from bezoar.apart import Limits
from bezoar.core.cluster import Cluster
from bezoar.core.exec import Serial, Threads
from bezoar.core.results import Report, write_atomic
from bezoar.core.surgery import frozen
from bezoar.core.swept import Swept
from bezoar.io.models import load_model
from bezoar.options import RunOptions
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.sweeping import Sweep, sweep

RESULT = Path(__file__).parent / "results" / "sweep.json"
IMAGES = 300
#: A short scan, for the parts that are about the sweep; ``cost`` takes the scan as users get it.
BRIEF = NeuralCleanse(seeds=1, steps=30, refine=0)
OPTIONS = RunOptions(images=IMAGES, threads=1, additive=False, device="cpu")


def listed(most: int, folder: Path) -> Path:
    """A list of the cached nets, each with its architecture and clean images of its own data."""
    rows = []
    for facts in sorted([*OUT.glob("*.json"), *(OUT / "set").glob("*/facts.json")]):
        told = json.loads(facts.read_text())
        model = facts.with_suffix(".safetensors") if facts.parent == OUT else facts.parent / "model.safetensors"
        images = folder / f"{told['data']}.npz"
        if not images.exists():
            split = load(told["data"])
            chosen = torch.randperm(len(split.test_x), generator=torch.Generator().manual_seed(0))[: 2 * IMAGES]
            x = split.test_x[chosen].permute(0, 2, 3, 1).numpy()
            np.savez(images, x=x if x.dtype == np.uint8 else (x * 255).round().astype(np.uint8), y=split.test_y[chosen])
        rows.append({"model": str(model), "arch": told["arch"], "data": str(images)})
    # From all over the list, since neighbours are alike.
    step = max(1, len(rows) // most)
    path = folder / "models.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::step][:most]))
    return path


def timed(models: Path, out: Path, **given: Any) -> tuple[Sweep, dict[str, Any]]:
    """A sweep from nothing, and what it took."""
    started = time.perf_counter()
    settings = {"method": BRIEF, "options": OPTIONS, "limits": Limits(seconds=900)} | given
    done = sweep(models, None, out, **settings)
    wall = time.perf_counter() - started
    cpu = sum(row.cpu_seconds for row in done.rows)
    facts = {
        "models": len(done.rows),
        "wall": round(wall, 1),
        "cpu": round(cpu, 1),
        "models_per_core_hour": round(3600 * len(done.rows) / cpu, 1),
        "models_per_hour": round(3600 * len(done.rows) / wall, 1),
        "outcomes": done.counts,
    }
    return done, facts


def verdicts(done: Sweep) -> list[tuple[Any, ...]]:
    """What must be the same whoever scanned."""
    return [(row.model, row.outcome, row.target, row.size, row.ratio, row.asr) for row in done.rows]


def throughput(models: Path, folder: Path, workers: list[int]) -> dict[str, Any]:
    """The same models with more and more workers, one thread each."""
    rows, first = [], None
    for count in workers:
        done, facts = timed(models, folder / f"workers-{count}", workers=count)
        first = first or verdicts(done)
        rows.append({"workers": count, **facts, "same": verdicts(done) == first})
    return {"rows": rows}


def cost(models: Path, folder: Path, workers: list[int]) -> dict[str, Any]:
    """The scan with its defaults, and a process that has nothing to scan."""
    del workers
    some = folder / "some.jsonl"
    lines = models.read_text().splitlines()
    some.write_text("\n".join(lines[:: max(1, len(lines) // 3)][:3]))
    done, facts = timed(some, folder / "default", method=NeuralCleanse(), options=RunOptions(threads=1, device="cpu"))
    empty = folder / "empty.pt"
    empty.write_text("no model")
    refused = sweep([empty], json.loads(lines[0])["data"], folder / "refused", options=OPTIONS)
    rows = []
    for row in done.rows:
        place = folder / "default" / "models" / row.key[:2] / row.key
        rows.append(
            {
                "arch": row.arch,
                "labels": row.num_classes,
                "cpu": row.cpu_seconds,
                "mib": row.peak_mib,
                "image_gradients": Report.from_json((place / "report.json").read_text()).run.image_gradients,
                "gflop": round(_gflop(row), 4),
                "bytes": sum(file.stat().st_size for file in place.iterdir()),
            }
        )
    return {"default": facts, "rows": rows, "process_cpu": refused.rows[0].cpu_seconds}


def _gflop(row: Swept) -> float:
    """Floating-point operations of one image forward and backward to the input, in 1e9."""
    from torch.utils.flop_counter import FlopCounterMode

    suspect = load_model(row.model, arch=row.arch)
    x = torch.full((1, suspect.facts.channels, suspect.facts.height, suspect.facts.width), 0.5, requires_grad=True)
    with frozen(suspect.module), FlopCounterMode(display=False) as counter:
        suspect.module(x).sum().backward()
    return float(counter.get_total_flops()) / 1e9


def _nothing(_shared: object, item: int) -> int:
    return item


def overhead(models: Path, folder: Path, workers: list[int]) -> dict[str, Any]:
    """Pieces that do nothing, with 45 MB that all share."""
    del models, folder, workers
    shared = torch.zeros(45 << 18)
    found: dict[str, Any] = {}
    for name, pool in (("serial", Serial()), ("threads", Threads(2))):
        started = time.perf_counter()
        count = sum(1 for _ in pool.map(_nothing, shared, range(2000)))
        found[f"{name}_ms"] = round(1000 * (time.perf_counter() - started) / count, 3)
    started = time.perf_counter()
    cluster = Cluster("local")
    found["ray_start_s"] = round(time.perf_counter() - started, 1)
    try:
        started = time.perf_counter()
        list(cluster.map(_nothing, shared, range(2)))
        found["ray_first_s"] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()
        results = cluster.map(_nothing, shared, range(2001))
        next(results)
        began = time.perf_counter()
        count = sum(1 for _ in results)
        found["ray_put_s"] = round(began - started, 2)
        found["ray_ms"] = round(1000 * (time.perf_counter() - began) / count, 2)
    finally:
        cluster.close()
    return found


def ray(models: Path, folder: Path, workers: list[int]) -> dict[str, Any]:
    """Serial, and Ray with 1 and more workers: a sweep, and the seeds of one scan."""
    serial, facts = timed(models, folder / "serial")
    found: dict[str, Any] = {"serial": facts, "rows": []}
    for count in workers:
        with _nodes([count]) as (address, _):
            done, facts = timed(models, folder / f"ray-{count}", ray=address)
            found["rows"].append({"workers": count, **facts, "same": verdicts(done) == verdicts(serial)})
    found["scan"] = _scan(models, workers)
    return found


def _scan(models: Path, workers: list[int]) -> dict[str, Any]:
    """One model with three seeds, in this process and as three pieces."""
    from bezoar.api import scan

    told = json.loads(models.read_text().splitlines()[-1])
    settings = {"arch": told["arch"], "images": IMAGES, "threads": 1, "device": "cpu", "additive": False, "steps": 60}
    started = time.perf_counter()
    here = scan(told["model"], told["data"], **settings).report
    found: dict[str, Any] = {"model": Path(told["model"]).name, "serial": here.run.seconds["scan"], "rows": []}
    found["whole"] = round(time.perf_counter() - started, 1)
    for count in workers:
        with _nodes([count]) as (address, _):
            there = scan(told["model"], told["data"], ray=address, **settings).report
        same = there.stable() == here.stable()
        found["rows"].append({"workers": count, "scan": there.run.seconds["scan"], "same": same})
    return found


class _nodes:  # noqa: N801 - a context manager, used as a function
    """A Ray of our own on this host with so many nodes; each entry is a node's number of CPUs."""

    def __init__(self, cpus: list[int]) -> None:
        self.cpus = cpus

    def __enter__(self) -> tuple[str, Any]:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "1000"}
        from bezoar.core.cluster import _own_token

        _own_token()
        from ray.cluster_utils import Cluster as Hosts

        memory = {"object_store_memory": 100 << 20}
        head = {"num_cpus": self.cpus[0], "include_dashboard": False, **memory}
        self.hosts = Hosts(initialize_head=True, head_node_args=head)
        self.others = [self.hosts.add_node(num_cpus=count, **memory) for count in self.cpus[1:]]
        return self.hosts.address, self

    def lose(self) -> None:
        """The last node goes, with all that runs on it."""
        node = self.others.pop()
        for pid in _below(node.all_processes["raylet"][0].process.pid):
            os.kill(pid, signal.SIGKILL)
        self.hosts.remove_node(node, allow_graceful=False)

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()
        self.hosts.shutdown()


def _below(pid: int) -> list[int]:
    """Processes that a process of ours started, and those that these did."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [*_below(child), child]
    return found


def node(models: Path, folder: Path, workers: list[int]) -> dict[str, Any]:
    """A sweep over two nodes, one of which is killed after a third of the models."""
    del workers
    whole, _ = timed(models, folder / "serial")
    count, killed = len(whole.rows), []
    with _nodes([1, 1]) as (address, hosts):

        def told(_phase: str, done: int, _total: int, _note: str) -> None:
            if done >= count // 3 and not killed:
                killed.append(done)
                hosts.lose()

        done, facts = timed(models, folder / "node", ray=address, report=told)
    return {
        **facts,
        "killed_after": killed[0] if killed else None,
        "same": verdicts(done) == verdicts(whole),
        "lost": count - len(done.rows),
    }


def kill(models: Path, folder: Path, workers: list[int]) -> dict[str, Any]:
    """A sweep of all nets, killed again and again, until it is done; with a trace of each scan that was begun."""
    del models, workers
    everything = listed(10_000, folder)
    out = folder / "killed"
    code = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[3])\nimport sweep\n"
        "sweep.timed(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, method=sweep.QUICK)"
    )
    command = [sys.executable, "-c", code, str(everything), str(out), str(Path(__file__).parent)]
    stamps: dict[str, int] = {}
    kills, twice = 0, 0
    started = time.perf_counter()
    for pause in (25, 40, 60):
        with subprocess.Popen(command, start_new_session=True) as process:
            time.sleep(pause)
            process.kill()
        kills += 1
        now = _stamps(out)
        twice += sum(now[key] != stamp for key, stamp in stamps.items())
        stamps = now
    there = len(stamps)
    subprocess.run(command, check=True)
    now = _stamps(out)
    twice += sum(now[key] != stamp for key, stamp in stamps.items())
    rows = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    outcomes: dict[str, int] = {}
    for row in rows:
        outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
    return {
        "models": len(everything.read_text().splitlines()),
        "kills": kills,
        "before_the_last": there,
        "scanned_twice": twice,
        "missing": len(everything.read_text().splitlines()) - len(rows),
        "records": len(now),
        "outcomes": outcomes,
        "wall": round(time.perf_counter() - started, 1),
    }


QUICK = NeuralCleanse(seeds=1, steps=6, refine=0)


def _stamps(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.rglob("record.json")}


PARTS = {"throughput": throughput, "cost": cost, "overhead": overhead, "ray": ray, "node": node, "kill": kill}


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, for docs/results.md."""
    lines = []
    if "throughput" in found:
        rows = found["throughput"]["rows"]
        lines += ["| workers | models | wall s | CPU s | models per hour | against one worker | same verdicts |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in rows:
            gain = row["models_per_hour"] / rows[0]["models_per_hour"]
            lines.append(
                f"| {row['workers']} | {row['models']} | {row['wall']} | {row['cpu']} | {row['models_per_hour']:.0f} | "
                f"{gain:.2f} x | {'yes' if row['same'] else 'no'} |"
            )
    if "ray" in found:
        serial = found["ray"]["serial"]
        lines += ["", "| | workers | sweep: wall s | same verdicts | seeds of one scan: s | same report |"]
        lines += [
            "|---|---|---|---|---|---|",
            f"| serial | - | {serial['wall']} | | {found['ray']['scan']['serial']} | |",
        ]
        for one, other in zip(found["ray"]["rows"], found["ray"]["scan"]["rows"], strict=True):
            same = ["yes" if row["same"] else "no" for row in (one, other)]
            lines.append(f"| Ray | {one['workers']} | {one['wall']} | {same[0]} | {other['scan']} | {same[1]} |")
    if "overhead" in found:
        o = found["overhead"]
        lines += ["", "| executor | a piece, ms | start, s | first pieces, s |", "|---|---|---|---|"]
        lines += [f"| serial | {o['serial_ms']} | 0 | 0 |", f"| threads | {o['threads_ms']} | 0 | 0 |"]
        lines += [f"| Ray | {o['ray_ms']} | {o['ray_start_s']} | {o['ray_first_s']} |"]
    for name, text in (("node", _node_text), ("kill", _kill_text), ("cost", _cost_text)):
        if name in found:
            lines += ["", text(found[name])]
    return "\n".join(lines)


#: Assumed kinds of models: name, 1e9 multiply-adds of an image forward, labels, and their share of the hub. Forward and
#: backward to the input take four operations for each of them.
KINDS = (
    ("small net, 32 x 32", None, 10, 0.1),
    ("ResNet-18, 224 x 224", 1.8, 10, 0.4),
    ("ResNet-50, 224 x 224", 4.1, 1000, 0.2),
    ("ViT-B/16, 224 x 224", 17.6, 10, 0.3),
)
GPU = 100.0  # assumed rate of an accelerator in such a scan, in 1e12 operations a second; not measured here
MILLION = 1_000_000


def image_gradients(labels: int, scaling: list[dict[str, Any]]) -> float:
    """Of a default scan: two searches with three seeds, of which the last two follow 16 labels at most."""
    known = sorted((row["labels"], row["image_gradients"]) for row in scaling)
    each = [float(np.interp(count, *zip(*known, strict=True))) for count in (labels, min(labels, 16))]
    return 2 * (each[0] + 2 * each[1])


def plan(found: dict[str, Any], scaling: list[dict[str, Any]]) -> str:
    """What a hub of a million models would take, by the measured figures."""
    rows, start = found["cost"]["rows"], found["cost"]["process_cpu"]
    work = sum(row["image_gradients"] * row["gflop"] for row in rows)
    rate = work / sum(row["cpu"] - start for row in rows)
    small = statistics.mean(row["gflop"] for row in rows)
    kept = statistics.mean(row["bytes"] for row in rows) / 1e6
    most = found["throughput"]["rows"][-1]
    gain = most["models_per_hour"] / found["throughput"]["rows"][0]["models_per_hour"]
    lines = [
        f"Measured: *s* = {start:.1f} core seconds; "
        f"*r* = {rate:.1f} GFLOP/s for a core, over {len(rows)} small nets "
        "with the default settings. "
        f"{most['workers']} workers on {found['throughput']['cores']} cores, which others used as well, "
        f"scan {gain:.2f} "
        "times what one does. "
        f"A piece costs Ray {found['overhead']['ray_ms']} ms: one driver hands out "
        f"{1000 / found['overhead']['ray_ms']:.0f} models a second. A report takes {kept:.1f} MB.",
        "",
        "Assumed: the shares; four operations for each multiply-add of a forward pass; that *r* holds for larger nets; "
        f"an accelerator that reaches {GPU:.0f} TFLOP/s in such a scan, which was not measured.",
        "",
        "| model | labels | share | *G* | *g*, GFLOP | core hours a model | core hours in all | accelerator hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cores = gpus = 0.0
    for name, macs, labels, share in KINDS:
        each = small if macs is None else 4 * macs
        gradients = image_gradients(labels, scaling)
        hours = (start + gradients * each / rate) / 3600
        accelerated = (start + gradients * each / (1000 * GPU)) / 3600
        cores += share * MILLION * hours
        gpus += share * MILLION * accelerated
        lines.append(
            f"| {name} | {labels:,} | {share:.0%} | {gradients:,.0f} | {each:.2f} | {hours:,.3f} | "
            f"{share * MILLION * hours:,.0f} | {share * MILLION * accelerated:,.0f} |"
        )
    lines += [
        "",
        f"In all {cores / 1e6:,.1f} million core hours, or {gpus:,.0f} hours of an accelerator: {gpus / 24 / 64:,.0f} "
        f"days on 64 of them. Reports and records: {kept * MILLION / 1e6:,.1f} TB.",
    ]
    return "\n".join(lines)


def write_plan(found: dict[str, Any]) -> None:
    """Put the plan into docs/sweep.md."""
    page = RESULT.parents[2] / "docs" / "sweep.md"
    scaling = [row for row in jsonl.read(RESULT.parent / "scaling.jsonl") if row.get("kind") == "fast"]
    head, _, rest = page.read_text().partition("<!-- plan -->\n")
    tail = rest.partition("<!-- /plan -->")[2]
    write_atomic(page, f"{head}<!-- plan -->\n{plan(found, scaling)}\n<!-- /plan -->{tail}")


def _node_text(row: dict[str, Any]) -> str:
    return (
        f"Two nodes on one host, one killed with all its processes after {row['killed_after']} of {row['models']} "
        f"models: {row['lost']} lost, verdicts {'the same as' if row['same'] else 'other than'} in a serial sweep."
    )


def _kill_text(row: dict[str, Any]) -> str:
    return (
        f"All {row['models']} cached nets, the sweep killed {row['kills']} times (SIGKILL) and given again: "
        f"{row['before_the_last']} records were there before the last run, {row['scanned_twice']} of them were written "
        f"again, {row['missing']} models are missing at the end."
    )


def _cost_text(row: dict[str, Any]) -> str:
    cpu = statistics.mean(one["cpu"] for one in row["rows"])
    return (
        f"With the default settings a model takes {cpu:.0f} CPU seconds here (mean of {len(row['rows'])} nets), "
        f"{row['process_cpu']:.1f} of them to start its process."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--models", type=int, default=8, help="nets to scan in most parts")
    parser.add_argument("--workers", default="1,2", help="numbers of workers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            row = PARTS[part](listed(arguments.models, folder), folder, list(map(int, arguments.workers.split(","))))
        found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        found[part] = row | {"cores": os.cpu_count(), "load": os.getloadavg()[0], "machine": platform.machine()}
        write_atomic(RESULT, json.dumps(found, indent=1) + "\n")
        print(json.dumps({part: row}, indent=1), flush=True)
    found = json.loads(RESULT.read_text())
    if {"cost", "throughput", "overhead"} <= found.keys():
        write_plan(found)
    print(table(found))


if __name__ == "__main__":
    main()
