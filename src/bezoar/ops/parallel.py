"""Training on several devices: torch's DistributedDataParallel, one process for each device.

All processes walk through the same batches with the same random draws, and each computes the gradient of its share.
Only what is inside the network differs from one device: BatchNorm sees a share, dropout draws for a share.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from bezoar.core.errors import BezoarError, SettingError
from bezoar.ops.recipe import Recipe

Progress = Callable[[int, int, float], None]
Told = SimpleQueue[tuple[int, int, float] | BezoarError]


@dataclass(frozen=True)
class Worker:
    """One of ``world`` processes that train the same network."""

    rank: int = 0
    world: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network whose gradients are the mean over all workers."""
        return model if self.world == 1 else nn.parallel.DistributedDataParallel(model)

    def whole_shares(self, index: Tensor) -> Tensor:
        """The batch without a rest that cannot be shared equally: fewer examples than workers, of the last batch."""
        return index[: len(index) // self.world * self.world]

    def share(self, x: Tensor) -> Tensor:
        """This worker's part of a batch."""
        return x.chunk(self.world)[self.rank] if self.world > 1 else x

    def mean(self, loss: Tensor) -> float:
        """Mean over all workers."""
        if self.world > 1:
            dist.all_reduce(loss)
        return loss.item() / self.world


ALONE = Worker()


def fit_parallel(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    devices: int,
    *,
    seed: int,
    progress: Progress | None,
    checkpoint: Path | None,
) -> list[float]:
    """Like :func:`bezoar.ops.fit.fit`, on GPUs 0 to ``devices - 1`` or, for a network on the CPU, in as many processes.

    The network must be made of importable classes. A script that calls this needs the usual
    ``if __name__ == "__main__"``, since each process imports it anew.

    Raises:
        SettingError: The batch cannot be shared equally, or there are not so many GPUs.
    """
    device = next(model.parameters()).device
    if devices < 1 or recipe.batch % devices or recipe.batch == devices:
        raise SettingError(f"a batch of {recipe.batch} cannot be shared by {devices} devices", "Choose a multiple")
    if device.type == "cuda" and torch.cuda.device_count() < devices:
        raise SettingError(f"{devices} devices are asked for, {torch.cuda.device_count()} are there", "Ask for fewer")
    with tempfile.TemporaryDirectory() as folder:
        # A file rather than shared memory, which is small in containers.
        torch.save({"model": model.cpu(), "x": x.cpu(), "y": y.cpu()}, Path(folder) / "task.pt")
        model.to(device)
        train = partial(_train, folder=Path(folder), kind=device.type, recipe=recipe, seed=seed, checkpoint=checkpoint)
        _launch(train, devices, progress)
        result = torch.load(Path(folder) / "result.pt", weights_only=True, map_location="cpu")
    model.load_state_dict(result["model"])
    model.eval()
    losses: list[float] = result["losses"]
    return losses


def _launch(train: Callable[..., None], devices: int, progress: Progress | None) -> None:
    told: Told = get_context("spawn").SimpleQueue()
    processes: Any = spawn(_call, (train, devices, told), nprocs=devices, join=False)  # type: ignore[no-untyped-call]
    try:
        over = False
        while not over:
            over = processes.join(timeout=0.1)
            while not told.empty():
                message = told.get()
                if isinstance(message, BezoarError):
                    raise message
                if progress is not None:
                    progress(*message)
    finally:  # progress may raise to stop the training
        for process in processes.processes:
            process.terminate()
            process.join()


def _call(rank: int, train: Callable[..., None], world: int, told: Told) -> None:
    try:
        train(rank=rank, world=world, told=told)
    except BezoarError as error:
        told.put(error)


def _train(
    *,
    rank: int,
    world: int,
    told: Told,
    folder: Path,
    kind: str,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None,
) -> None:
    from bezoar.ops.fit import fit  # it imports this module

    # Our own file of a moment ago, in a folder that only this user can write.
    task = torch.load(folder / "task.pt", weights_only=False, mmap=True)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=(folder / "meeting").as_uri(), rank=rank, world_size=world)
    try:
        losses = fit(
            task["model"].to(device),
            task["x"],
            task["y"],
            recipe,
            seed=seed,
            progress=(lambda *step: told.put(step)) if rank == 0 else None,
            checkpoint=checkpoint,
            worker=Worker(rank, world),
        )
        if rank == 0:
            torch.save({"losses": losses, "model": task["model"].state_dict()}, folder / "result.pt")
    finally:
        dist.destroy_process_group()
