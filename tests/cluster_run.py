"""Run by ``test_cluster.py`` in a process of its own: a Ray of two nodes on this host, and what it must do.

It prints one JSON object. Its own nodes alone are ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def slow(shared: dict[str, Any], item: int) -> tuple[int, str]:
    """A piece of work; it says on which node it ran, and that it began."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    mark = Path(shared["folder"]) / f"{item}-{node}-{os.getpid()}"
    mark.touch()
    time.sleep(shared["seconds"])
    mark.write_text("done")
    return shared["factor"] * item, node


def breaks(_shared: None, item: int) -> int:
    from bezoar.core.errors import SettingError

    if item == 2:
        raise SettingError("piece 2 is wrong", "Mend it")
    return item


def dies(_shared: None, item: int) -> int:
    if item == 1:
        os._exit(1)
    return item


def infer(model: Any, item: int) -> float:
    import torch

    return float(model(torch.full((1, 3, 8, 8), float(item))).sum())


def main() -> None:
    secret = Path(tempfile.mkdtemp()) / "token"
    secret.write_text("a" * 64)
    secret.chmod(0o600)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secret), "RAY_USAGE_STATS_ENABLED": "0"}
    # A lost node is noticed after seconds rather than half a minute.
    os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
    from ray.cluster_utils import Cluster as Hosts

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    hosts = Hosts(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = hosts.add_node(**node)
    try:
        print(json.dumps(checks(hosts, second)), flush=True)
    finally:
        import ray

        ray.shutdown()
        hosts.shutdown()


def checks(hosts: Any, second: Any) -> dict[str, Any]:
    from bezoar.core.cluster import Cluster
    from bezoar.core.errors import ClusterError, SettingError

    found: dict[str, Any] = {}
    cluster = Cluster(hosts.address, cpus=64)
    found["workers"], found["cpus"] = cluster.workers(), cluster.cpus
    found["by_value"] = by_value(cluster)
    found["scan"] = scans(hosts.address)
    try:
        list(cluster.map(breaks, None, range(4)))
    except SettingError as error:
        found["error"] = [error.message, error.hint]
    found["lost"] = sorted(cluster.map(dies, None, range(3), lost=lambda item, reason: -item))
    try:
        list(cluster.map(dies, None, [1]))
    except ClusterError as error:
        found["given_up"] = error.message
    try:
        list(cluster.map(breaks, threading.Lock(), [1]))
    except ClusterError as error:
        found["unsent"] = error.message
    found["interrupted"] = interrupted(cluster)
    found["killed_node"] = killed_node(cluster, hosts, second)
    cluster.close()
    return found


def by_value(cluster: Any) -> list[float]:
    """The class of a file that no worker can import, which uses another file beside it."""
    import torch

    folder = Path(tempfile.mkdtemp())
    (folder / "bezoar_test_part.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "own_net.py").write_text(
        "from torch import nn\nfrom bezoar_test_part import double\n"
        "class Own(nn.Module):\n    def forward(self, x):\n        return double(x).flatten(1)\n"
    )
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("_bezoar_arch_own_net", folder / "own_net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    model = module.Own()
    assert isinstance(model, torch.nn.Module)
    return [value for _, value in sorted(cluster.map(infer, model, range(3)))]


def scans(address: str) -> dict[str, Any]:
    """The same scans here and there, of a net whose class no worker knows."""
    import torch

    from bezoar.api import scan
    from tests import toys

    torch.set_num_threads(1)
    model, data = toys.trained(True), toys.images(120, seed=3)
    found = {}
    for name, settings in {
        "fast": {"seeds": 2, "steps": 20, "refine": 4},
        "reference": {"seeds": 1, "mode": "reference", "reference_steps": 1},
    }.items():
        settings |= {"threads": 1, "device": "cpu"}
        serial = scan(model, data, **settings).report
        spread = scan(model, data, ray=address, **settings).report
        found[name] = {
            "equal": serial.stable() == spread.stable(),
            "gradients": serial.run.image_gradients == spread.run.image_gradients,
            "sizes": len(serial.labels),
        }
    return found


def interrupted(cluster: Any) -> int:
    """Pieces that began although their results were not waited for any more, besides those already running."""
    folder = tempfile.mkdtemp()
    results = cluster.map(slow, {"folder": folder, "seconds": 0.5, "factor": 1}, range(50))
    next(results)
    results.close()
    time.sleep(2)
    return len(os.listdir(folder))


def killed_node(cluster: Any, hosts: Any, second: Any) -> dict[str, Any]:
    """One of two nodes goes in the middle; its pieces are run again, the others are not."""
    folder = tempfile.mkdtemp()
    shared = {"folder": folder, "seconds": 0.6, "factor": 3}
    results, nodes, killed = {}, set(), False
    for item, (value, node) in cluster.map(slow, shared, range(14)):
        assert item not in results
        results[item] = value
        nodes.add(node)
        if not killed and len(nodes) == 2 and len(results) >= 5:
            # A machine that goes takes its workers along; without this, they would finish their pieces first.
            while not (caught := _at_work(folder, second.node_id)):
                time.sleep(0.01)
            for pid in caught:
                os.kill(pid, signal.SIGKILL)
            hosts.remove_node(second, allow_graceful=False)
            killed = True
    begun = [int(name.partition("-")[0]) for name in os.listdir(folder)]
    return {
        "right": results == {n: 3 * n for n in range(14)},
        "nodes": len(nodes),
        "killed": killed,
        "repeated": len(begun) - len(set(begun)),
        "workers_left": cluster.workers(),
    }


def _at_work(folder: str, node: str) -> set[int]:
    """Workers of a node that are in the middle of a piece."""
    open_ones = [path.name.split("-") for path in Path(folder).iterdir() if not path.stat().st_size]
    return {int(pid) for _, there, pid in open_ones if there == node}


if __name__ == "__main__":
    main()
