"""A killed training goes on as if nothing had happened; no checkpoint is taken for another's, none runs code."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.ops._checkpoint import digest, settings
from bezoar.ops.fit import Batch, Recipe, fit
from tests.toys import images, net

ALL = Recipe(epochs=3, batch=8, lr=0.05, pad=1, flip=True, rotate=10, cutout=3, mixup=0.5, clip=5.0)
OWN = Recipe(epochs=3, batch=8, lr=1e-3, optimizer="adam", pad=1, flip=True, rotate=10, cutout=3, schedule="step")
STEPS = 9  # 24 images


class Kill(Exception):
    pass


class Noise(nn.Module):
    """A network that an objective trains beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.1 * self.layers(x)).clamp(0, 1)


@dataclass
class Clock:
    time: float


class Adversary:
    """Has all that an objective can have: a network, an optimiser, a schedule, counters, draws, phases."""

    def __init__(self, share: float = 0.5) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.noise = Noise()
        self.optimizer = torch.optim.Adam(self.noise.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.share, self.number, self.steps, self.clock = share, -1, 0, Clock(time.monotonic())

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        self.number = number
        if number:
            self.schedule.step()
        next(model.parameters()).requires_grad_(number != 1)
        model[0][1].train(number != 2)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.steps += 1
        view = batch.augment(batch.x)
        rows = torch.rand(len(view), generator=batch.generator) < self.share
        self.optimizer.zero_grad()
        (-F.cross_entropy(model(self.noise(view)), batch.y)).backward()
        self.optimizer.step()
        stamped = torch.where(rows.view(-1, 1, 1, 1), self.noise(view).detach(), view)
        return F.cross_entropy(model(stamped), batch.y) * (1 + 0.1 * self.number)

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in ("noise", "optimizer", "schedule")}
        return parts | {"number": self.number, "steps": self.steps}

    def load_state_dict(self, state) -> None:
        for name in ("noise", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.number, self.steps = state["number"], state["steps"]


def train(path: Path | None, recipe: Recipe, objective=None, kill: int | None = None, **more):
    """Weights, losses and steps told; the global generator stands somewhere else each time."""
    model, told = nn.Sequential(net(seed=0), nn.Dropout(0.2)), []

    def progress(done: int, total: int, loss: float) -> None:
        assert total == STEPS
        told.append(done)
        if done == kill:
            raise Kill

    torch.manual_seed(random.SystemRandom().randrange(2**32))
    x, y = images(24, seed=0)
    settings = {"x": x, "y": y, "seed": 1, "progress": progress, "checkpoint": path, "objective": objective, **more}
    try:
        losses = fit(model, recipe=recipe, **settings)
    except Kill:
        return None
    assert not model.training
    return model.state_dict(), losses, told


def same(first, second) -> bool:
    return first[1] == second[1] and all(torch.equal(first[0][name], second[0][name]) for name in first[0])


CASES = {"plain": (ALL, lambda: None), "objective": (OWN, Adversary)}


@pytest.mark.parametrize("seconds", ["0", "1000"], ids=["each step", "each epoch"])
@pytest.mark.parametrize("case", CASES)
def test_killed_run_ends_with_the_same_weights(case, seconds, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", seconds)
    recipe, make = CASES[case]
    wanted_objective = make()
    wanted = train(None, recipe, wanted_objective)
    for kill in range(1, STEPS + 1):
        path, objective = tmp_path / str(kill) / "net.pt", make()
        assert train(path, recipe, make(), kill) is None
        found = train(path, recipe, objective)
        assert same(found, wanted)
        kept = kill if seconds == "0" else (kill - 1) // 3 * 3
        assert found[2] == list(range(kept + 1, STEPS + 1)), "what was done is not done again"
        if objective is not None:
            assert digest(objective.state_dict()) == digest(wanted_objective.state_dict())
        assert [file.name for file in path.parent.iterdir()] == ["net.pt"]


def test_run_that_is_killed_at_each_step(tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    for kill in range(1, STEPS + 1):
        assert train(tmp_path / "net.pt", OWN, Adversary(), kill) is None
    assert same(train(tmp_path / "net.pt", OWN, Adversary()), train(None, OWN, Adversary()))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.ops.test_fit_checkpoint import ALL, train
train(Path(sys.argv[1]), ALL, progress=lambda done, *_: done == 5 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_run_that_is_killed_by_the_system(tmp_path):
    environment = {**os.environ, "BEZOAR_CHECKPOINT_SECONDS": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "net.pt"], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    found = train(tmp_path / "net.pt", ALL)
    assert found[2] == [6, 7, 8, 9]
    assert same(found, train(None, ALL))


@pytest.mark.parametrize("case", CASES)
def test_finished_checkpoint_is_read_back(case, tmp_path):
    recipe, make = CASES[case]
    first, second = make(), make()
    wanted = train(tmp_path / "net.pt", recipe, first)
    found = train(tmp_path / "net.pt", recipe, second)
    assert same(found, wanted) and found[2] == []
    if first is not None:
        assert digest(first.state_dict()) == digest(second.state_dict())


OTHERS = {
    "recipe": lambda x, y: {"recipe": Recipe(epochs=3, batch=8, lr=0.05)},
    "seed": lambda x, y: {"seed": 2},
    "images": lambda x, y: {"x": torch.cat([x[:-1], x[-1:] + 1e-6])},
    "labels": lambda x, y: {"y": y.roll(1)},
    "stamp": lambda x, y: {"stamp": lambda images, _: images},
    "objective": lambda x, y: {"objective": Adversary(share=0.25)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kill", [4, None], ids=["unfinished", "finished"])
def test_checkpoint_of_another_training_is_refused(name, kill, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    path, own = tmp_path / "net.pt", {"recipe": OWN, "objective": Adversary(), "seed": 1}
    train(path, kill=kill, **own)
    before = path.read_bytes()
    with pytest.raises(SettingError, match=f"net.pt belongs to a training with other {name}. Delete"):
        train(path, **{**own, "objective": Adversary(), **OTHERS[name](*images(24, seed=0))})
    assert path.read_bytes() == before


def test_checkpoint_of_another_network_is_refused(tmp_path):
    x, y = images(24, seed=0)
    for model in (net(seed=1), nn.Sequential(nn.Flatten(), nn.Linear(432, 6))):
        fit(net(seed=0), x, y, Recipe(epochs=1), checkpoint=tmp_path / "net.pt")
        with pytest.raises(SettingError, match="other network or first weights"):
            fit(model, x, y, Recipe(epochs=1), checkpoint=tmp_path / "net.pt")


def small(path: Path | None, kill: int | None = None) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def progress(done: int, *_: object) -> None:
        if done == kill:
            raise Kill

    x = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with contextlib.suppress(Kill):
        fit(model, x, torch.arange(9) % 3, Recipe(epochs=2, batch=3, flip=True), checkpoint=path, progress=progress)
    return list(model.state_dict().values())


@pytest.mark.parametrize("kill", [4, None], ids=["unfinished", "finished"])
def test_damaged_checkpoint_is_as_good_as_none(kill, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    path, wanted, draw = tmp_path / "net.pt", small(None), random.Random(0)
    small(path, kill)
    whole = path.read_bytes()
    broken = [b"", b"PK", whole[: len(whole) // 2], whole[:-1], whole[1:], b"x" * 1000]
    for _ in range(60):
        place = draw.randrange(len(whole))
        broken.append(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
    for content in broken:
        path.write_bytes(content)
        assert all(torch.equal(a, b) for a, b in zip(small(path), wanted, strict=True))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"format": "bezoar.training/1", "state": evil}])
def test_checkpoint_runs_no_code(wrap, tmp_path):
    torch.save(wrap(Evil(tmp_path / "pwned")), tmp_path / "net.pt")
    assert all(torch.equal(a, b) for a, b in zip(small(tmp_path / "net.pt"), small(None), strict=True))
    assert not (tmp_path / "pwned").exists()


def test_other_files_are_no_checkpoints(tmp_path):
    for content in ({}, [1], {"format": "bezoar.training/1"}, {"format": "other", "identity": {}, "state": {}}):
        torch.save(content, tmp_path / "net.pt")
        assert all(torch.equal(a, b) for a, b in zip(small(tmp_path / "net.pt"), small(None), strict=True))


class Stuck(Adversary):
    """Its state cannot be kept after the first epoch."""

    def state_dict(self):
        if self.number:
            raise Kill
        return super().state_dict()


class Opaque(Adversary):
    """Its state needs code to be read."""

    def state_dict(self):
        return {"path": Evil(Path("nowhere"))}


def test_failed_write_leaves_the_last_checkpoint(tmp_path):
    assert train(tmp_path / "net.pt", OWN, Stuck()) is None
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]
    assert torch.load(tmp_path / "net.pt", weights_only=True)["state"]["place"]["done"] == 3


def test_state_that_could_not_be_read_back_is_refused_at_once(tmp_path):
    with pytest.raises(Exception, match="Weights only load failed"):
        train(tmp_path / "net.pt", OWN, Opaque())
    assert list(tmp_path.iterdir()) == []


# Identity


@dataclass(frozen=True)
class Setting:
    value: float
    name: str = "a"


def closing_over(value):
    return lambda: value


def test_digest_tells_settings_apart():
    linear = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    values = [
        *(None, True, 1, 1.0, "1", b"1", [1], (1,), [[1]], [1, 1], {"a": 1}, {"a": 2}, {"b": 1}),
        *(torch.zeros(2), torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), torch.tensor(0.0)),
        *(Setting(1.0), Setting(2.0), Setting(1.0, "b"), Clock(1.0), linear, other),
        *(closing_over(1), closing_over(2), small, torch.ones(2, dtype=torch.bfloat16), torch.empty(0, 3)),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(torch.arange(6).view(2, 3).t()) == digest(torch.arange(6).view(2, 3).t().contiguous())


def test_digest_leaves_out_what_differs_from_run_to_run():
    assert digest(Clock(1.0)) == digest(Clock(2.0))
    assert digest(Path("a")) == digest(Path("b"))
    assert digest(object()) == digest(object())
    itself: list[object] = []
    itself.append(itself)
    assert digest(itself)
    assert digest(settings(Adversary(0.5))) != digest(settings(Adversary(0.4)))
