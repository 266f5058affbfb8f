"""Pieces of work on a Ray cluster: the only module that imports ray."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from bezoar.core.errors import ClusterError, MissingExtra, SettingError
from bezoar.core.exec import Item, Lost, Result, Shared

#: Pieces handed out for each one that can run, so that no worker waits for the next.
_AHEAD = 2
#: How often Ray repeats a piece whose worker or node was lost.
_RETRIES = 3
#: What all pieces share, kept by a worker between two pieces; the last one only.
_KEPT: dict[str, tuple[Any, Any]] = {}


class Cluster:
    """Runs pieces on Ray; model and data are put into its store once, and each worker fetches them once.

    A piece whose worker or node is lost is repeated elsewhere, the others are not. Classes and functions of the user's
    own files travel by value, so that no worker has to have them.

    Args:
        address: ``local``, ``auto``, or the address of a cluster.
        cpus, gpus: What a piece takes; no more CPUs than the largest node has.

    Raises:
        MissingExtra: Ray is not installed.
        ClusterError: The cluster cannot be reached or has no CPU.
    """

    away: ClassVar[bool] = True

    def __init__(self, address: str = "local", *, cpus: int = 1, gpus: float = 0.0) -> None:
        self.ray = _ray(address)
        self.ours = not self.ray.is_initialized()
        if self.ours:
            _connect(self.ray, address)
        try:
            nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            most = int(max((node.get("CPU", 0) for node in nodes), default=0))
            if most < 1:
                raise ClusterError(f"the Ray cluster {address!r} has no CPU to work with", "Add a node with CPUs")
            if gpus > max(node.get("GPU", 0) for node in nodes):
                raise ClusterError(f"the Ray cluster {address!r} has no GPU", "Try --device cpu")
        except BaseException:
            self.close()
            raise
        self.cpus, self.gpus = min(cpus, most), gpus

    def workers(self) -> int:
        """Pieces that can run at a time, as the cluster is now."""
        there = self.ray.cluster_resources()
        by_cpu = int(there.get("CPU", 0) // self.cpus)
        return max(1, min(by_cpu, int(there.get("GPU", 0) // self.gpus)) if self.gpus else by_cpu)

    def map(
        self,
        fn: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[Item],
        lost: Lost | None = None,
    ) -> Generator[tuple[Item, Result], None, None]:
        """See :class:`bezoar.core.exec.Executor`."""
        ray = self.ray
        source = iter(items)
        running: dict[Any, Item] = {}
        with _own_code_by_value(ray.cloudpickle):
            held = [self._put(fn, shared)]
            piece = ray.remote(_piece).options(
                num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_RETRIES, name=getattr(fn, "__name__", "piece")
            )
            try:
                while True:
                    for item in islice(source, max(0, _AHEAD * self.workers() - len(running))):
                        running[piece.remote(held, item)] = item
                    if not running:
                        return
                    done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                    for reference in done:
                        item = running.pop(reference)
                        yield item, self._result(reference, item, lost)
            finally:
                for reference in running:  # nobody waits for these any more
                    ray.cancel(reference, force=True)

    def _put(self, fn: Any, shared: Any) -> Any:
        try:
            return self.ray.put((fn, shared))
        except Exception as error:  # a stranger's module raises anything when it is pickled
            raise ClusterError(
                f"the model or the data cannot be sent to other processes: {_first_line(error)}",
                "Run it without --ray, or as a state dict with --arch",
            ) from error

    def _result(self, reference: Any, item: Any, lost: Lost | None) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ModuleNotFoundError):
                raise ClusterError(
                    f"a worker of the cluster cannot import {error.cause.name}",
                    "Install the same bezoar and libraries on every node",
                ) from None
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayError as error:
            reason = f"its worker was lost {_RETRIES + 1} times ({type(error).__name__})"
            if lost is not None:
                return lost(item, reason)
            raise ClusterError(
                f"a piece of work was given up: {reason}", "Look at memory and health of the nodes"
            ) from (error)

    def close(self) -> None:
        """Leave the cluster; one of our own ends."""
        if self.ours:
            self.ray.shutdown()


def _piece(held: list[Any], item: Any) -> Any:
    """What a worker runs; the reference comes in a list, since Ray would fetch a bare one for each piece anew."""
    import ray

    name = held[0].hex()
    if name not in _KEPT:
        _KEPT.clear()
        _KEPT[name] = ray.get(held[0])
    fn, shared = _KEPT[name]
    return fn(shared, item)


def _ray(address: str) -> Any:
    if address == "local" and "ray" not in sys.modules:  # it looks at these when it is imported
        _own_token()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtra("ray is not installed", "Run: pip install 'bezoar[ray]'") from None
    except Exception as error:
        raise MissingExtra(
            f"ray is installed but cannot be imported ({_first_line(error)})",
            "Run: pip install --force-reinstall 'bezoar[ray]'",
        ) from None
    return ray


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # of many kinds, also those of its RPC library
        hint = "Start one with: ray start --head, or use --ray local"
        if "auth" in f"{type(error).__name__} {error}".lower():
            hint = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on the nodes of the cluster"
        raise ClusterError(f"the Ray cluster {address!r} cannot be reached: {_first_line(error)}", hint) from None


def _own_token() -> None:
    """Nobody else on the network may send work to a Ray of ours, and nothing is left in the user's home."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="bezoar-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@contextmanager
def _own_code_by_value(cloudpickle: Any) -> Iterator[None]:
    """Modules that are files of the user's, such as that of ``--arch FILE.py:function``, travel whole."""
    registered = []
    for module in _own_modules():
        try:
            cloudpickle.register_pickle_by_value(module)
        except ValueError:  # its name in sys.modules is not its own
            continue
        registered.append(module)
    try:
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _own_modules() -> list[ModuleType]:
    """Loaded modules that are neither installed nor part of Python or of this package."""
    paths = sysconfig.get_paths()
    installed = {os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or name.split(".")[0] in ("bezoar", "__main__"):
            continue
        path = os.path.realpath(file)
        if not any(path.startswith(folder + os.sep) for folder in installed):
            found.append(module)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def check_address(text: str) -> str:
    """An address as the user gave it.

    Raises:
        SettingError: It is none.
    """
    if text and text not in ("auto", "local") and ":" not in text:
        raise SettingError(f"{text!r} is no address of a Ray cluster", "Give local, auto, or HOST:PORT")
    return text
