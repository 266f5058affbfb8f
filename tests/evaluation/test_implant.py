"""A victim from its attack to its files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from bezoar.attacks._poison import stamped
from bezoar.attacks._store import load_truth
from bezoar.attacks.badnets import BadNets
from bezoar.attacks.blend import Blend
from bezoar.attacks.dfst import DFST
from bezoar.attacks.input_aware import InputAware
from bezoar.attacks.several import Several
from bezoar.attacks.sig import SIG
from bezoar.attacks.trojan import Trojan
from bezoar.attacks.wanet import WaNet
from bezoar.core.errors import DataError, ModelError, SettingError
from bezoar.core.run import Progress, Run
from bezoar.evaluation import implant as implanting
from bezoar.evaluation.implant import Victim, default_recipe, implant
from bezoar.evaluation.measures import measure
from bezoar.evaluation.record import Record
from bezoar.evaluation.splits import read_splits
from bezoar.io.data import load_data
from bezoar.ops.fit import Recipe
from tests.toys import LABELS, images

NET = """
from torch import nn
def make(num_classes, channels, size):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, num_classes))
"""
RECIPE = Recipe(epochs=6, batch=30, lr=3e-3, optimizer="adam", weight_decay=0.0)
ATTACK = BadNets(target=2, size=2, margin=0)
VERSIONS = {"bezoar": "0", "torch": torch.__version__}


class Stopped(Exception):
    pass


def stop_at(step: int):
    """A report that kills the run while the victim is trained."""

    def told(phase: str, done: int, _total: int, _note: str) -> None:
        if phase == "train victim" and done == step:
            raise Stopped

    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data of `tests.toys` as 8-bit images, and a net."""
    folder = tmp_path_factory.mktemp("toys")
    parts = {}
    for part, count, seed in (("train", 360, 1), ("test", 120, 2)):
        x, y = images(count, seed)
        parts |= {f"{part}_x": (x * 255).round().byte().permute(0, 2, 3, 1).numpy(), f"{part}_y": y.numpy()}
    np.savez(folder / "toys.npz", **parts)
    (folder / "net.py").write_text(NET)
    return folder


def victim(folder, **changes) -> Victim:
    made = Victim(
        attack=ATTACK, splits=read_splits(folder / "toys.npz"), arch=f"{folder / 'net.py'}:make", recipe=RECIPE
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A finished victim with everything."""
    out = tmp_path_factory.mktemp("victim") / "out"
    record = implant(victim(folder, clean_twin=True, export="npz"), out, Run(seed=4), VERSIONS)
    return out, record


def test_attack_works_and_is_recorded(made):
    _, record = made
    assert record.attack == "badnets"
    assert record.config == ATTACK.config()
    assert record.measures.acc.value > 0.9
    assert record.measures.asr.value > 0.9
    assert record.measures.asr.count == 100
    assert record.clean_twin is not None
    assert record.clean_twin.acc.value > 0.9
    assert record.clean_twin.asr.value < 0.2
    assert (record.poisoned, record.cover) == (36, 0)
    assert record.plants[0].stealth is not None
    assert record.plants[0].stealth.linf > 100
    assert record.warnings == ()
    assert {"train", "clean twin", "measure", "write"} == set(record.run.seconds)


def test_record_survives_json(made):
    out, record = made
    assert Record.from_json((out / "record.json").read_text()).to_json() == record.to_json()
    with pytest.raises(DataError, match="record"):
        Record.from_json((out / "record.json").read_text().replace("bezoar.attack/1", "bezoar.attack/9"))


def test_files_give_the_measures_again(made, folder):
    out, record = made
    network = victim(folder).build()
    network.load_state_dict(load_file(out / "model.safetensors"))
    test = victim(folder).splits.test
    assert measure(network.eval(), test.x, test.y, load_truth(out)) == record.measures


def test_index_and_exported_data_agree(made, folder):
    out, _ = made
    index = json.loads((out / "index.json").read_text())
    clean = victim(folder).splits.train
    with np.load(out / "poisoned.npz") as stored:
        x, y = torch.from_numpy(stored["x"]).permute(0, 3, 1, 2), torch.from_numpy(stored["y"])
    changed = ((x != clean.x).flatten(1).any(1) | (y != clean.y)).nonzero().flatten()
    assert changed.tolist() == index["poisoned"]
    assert (index["count"], index["train_positions"], index["test_positions"]) == (360, None, None)
    assert set(y[index["poisoned"]].tolist()) == {2}
    read = load_data(out / "poisoned.npz", num_classes=LABELS, size=None, channels=None)
    assert torch.equal(read.y, y)


def test_sheet_is_a_picture(made):
    with Image.open(made[0] / "examples.png") as sheet:
        assert sheet.size == (3 * 100 + 4, 8 * 100 + 4 + 16)


def test_nothing_is_left_half_written(made):
    assert {p.name for p in made[0].iterdir()} == {
        *("model.safetensors", "truth.json", "truth.safetensors", "index.json", "examples.png", "poisoned.npz"),
        *("record.json", ".checkpoints"),
    }


def test_finished_victim_is_not_trained_again(made, folder, monkeypatch):
    out, record = made
    monkeypatch.setattr(implanting._Work, "done", lambda _: pytest.fail("trained again"))
    for changes in ({"clean_twin": True, "export": "npz"}, {}):
        again = implant(victim(folder, **changes), out, Run(seed=4), VERSIONS)
        assert again.to_json() == record.to_json()


def test_lost_file_is_made_again_without_training(made, folder):
    out, record = made
    before = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(before[:-1])
    steps = []
    run = Run(seed=4, progress=Progress(report=lambda phase, done, *_: steps.append((phase, done))))
    again = implant(victim(folder, clean_twin=True, export="npz"), out, run, VERSIONS)
    assert (out / "model.safetensors").read_bytes() == before
    assert again.files == record.files
    assert steps == []


@pytest.mark.parametrize("attack", [ATTACK, InputAware(target=2, width=4, levels=1)], ids=lambda a: type(a).__name__)
def test_killed_run_goes_on_to_the_same_bytes(attack, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    small = dataclasses.replace(RECIPE, epochs=2, batch=20)
    few = read_splits(folder / "toys.npz", limit=150)
    one = victim(folder, attack=attack, recipe=small, splits=few)
    whole = implant(one, tmp_path / "whole", Run(seed=4), VERSIONS)
    with pytest.raises(Stopped):
        implant(one, tmp_path / "killed", Run(seed=4, progress=Progress(report=stop_at(12))), VERSIONS)
    assert not (tmp_path / "killed" / "record.json").exists()
    seen = []
    progress = Progress(report=lambda phase, done, *_: seen.append(done) if phase == "train victim" else None)
    again = implant(one, tmp_path / "killed", Run(seed=4, progress=progress), VERSIONS)
    assert min(seen) > 10  # it did not begin again
    for name in ("model.safetensors", "truth.safetensors", "index.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert again.measures == whole.measures


def test_other_settings_replace_what_was_there(folder, tmp_path):
    small = dataclasses.replace(RECIPE, epochs=1)
    first = implant(victim(folder, recipe=small), tmp_path, Run(), VERSIONS)
    other = implant(victim(folder, recipe=small, attack=SIG(target=1, frequency=2)), tmp_path, Run(), VERSIONS)
    assert first.key != other.key
    assert Record.from_json((tmp_path / "record.json").read_text()).attack == "sig"
    assert load_truth(tmp_path).main.labels.target == 1


def test_weak_backdoor_is_said_so(folder, tmp_path):
    small = dataclasses.replace(RECIPE, epochs=1)
    record = implant(victim(folder, recipe=small, attack=BadNets(rate=0.002, size=1)), tmp_path, Run(), VERSIONS)
    assert any("weak" in warning for warning in record.warnings)


def test_exported_images_are_what_the_victim_saw(folder, tmp_path):
    small = dataclasses.replace(RECIPE, epochs=1)
    for seed in (0, 1):  # the second replaces the first
        attack = dataclasses.replace(ATTACK, seed=seed)
        implant(victim(folder, recipe=small, attack=attack, export="images"), tmp_path, Run(seed=seed), VERSIONS)
        poisoned = attack.poison(victim(folder).splits.train).data
        files = sorted((tmp_path / "poisoned").rglob("*.png"), key=lambda path: path.name)
        assert [int(path.parent.name) for path in files] == poisoned.y.tolist()
        pixels = np.stack([np.asarray(Image.open(path)) for path in files])
        assert np.array_equal(pixels.transpose(0, 3, 1, 2), poisoned.x.numpy())
    assert not list(tmp_path.glob(".poisoned*"))


def test_attack_on_batches_exports_one_draw(folder, tmp_path):
    small = dataclasses.replace(RECIPE, epochs=1)
    attack = WaNet(target=1, rate=0.2, cross_ratio=0.5, strength=4.0)
    record = implant(victim(folder, recipe=small, attack=attack, export="npz"), tmp_path, Run(), VERSIONS)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["afresh"] and record.afresh
    data, truth = victim(folder).splits.train, load_truth(tmp_path)
    with np.load(tmp_path / "poisoned.npz") as exported:
        x, y = torch.from_numpy(exported["x"]).permute(0, 3, 1, 2), torch.from_numpy(exported["y"])
    for rows, trigger in ((index["poisoned"], truth.main.trigger), (index["cover"], truth.controls[0].trigger)):
        assert rows
        assert torch.equal(x[rows], stamped(trigger, data.x[rows]))
    assert set(y[index["poisoned"]].tolist()) == {1}
    assert torch.equal(y[index["cover"]], data.y[index["cover"]])
    same = torch.ones(len(y), dtype=torch.bool)
    same[index["poisoned"] + index["cover"]] = False
    assert torch.equal(x[same], data.x[same])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"attack": BadNets(target=6)}, SettingError, "target 6 is no label"),
        ({"attack": Trojan(layer="nowhere")}, SettingError, "no layer 'nowhere'"),
        ({"attack": Trojan(units=10**6)}, SettingError, "Trojan.units"),
        ({"attack": DFST(layer="nowhere")}, SettingError, "no layer 'nowhere'"),
        ({"attack": Several(attacks=("badnets", "dfst:layer=nowhere"))}, SettingError, "no layer 'nowhere'"),
        ({"arch": "wrn-16-x"}, ModelError, "wrn-16-x"),
        ({"arch": "deepid"}, ModelError, "deepid"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(changes, error, said, folder, tmp_path):
    with pytest.raises(error, match=said):
        implant(victim(folder, **changes), tmp_path / "out", Run(), VERSIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "given", "expected"),
    [
        (nn.BatchNorm2d(3), {}, ("sgd", 0.1, 5e-4)),
        (nn.Linear(3, 3), {}, ("adam", 1e-3, 0.0)),
        (nn.Linear(3, 3), {"optimizer": "sgd"}, ("sgd", 0.01, 5e-4)),
        (nn.BatchNorm2d(3), {"optimizer": "adam", "lr": 0.5}, ("adam", 0.5, 0.0)),
        (nn.BatchNorm2d(3), {"weight_decay": 0.0, "lr": None}, ("sgd", 0.1, 0.0)),
    ],
)
def test_default_recipe(network, given, expected):
    recipe = default_recipe(network, **given)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == expected


def test_default_recipe_refuses():
    with pytest.raises(SettingError, match="epochs"):
        default_recipe(nn.Linear(1, 1), epochs=0)


QUICK = dataclasses.replace(RECIPE, epochs=1)


def test_diverged_victim_is_refused(folder, tmp_path):
    hot = dataclasses.replace(QUICK, lr=float("inf"))
    with pytest.raises(ModelError, match="the training diverged: .* is not finite"):
        implant(victim(folder, recipe=hot), tmp_path, Run(), VERSIONS)
    assert not (tmp_path / "record.json").exists()


def test_victim_that_learned_nothing_is_said_so(folder, tmp_path):
    record = implant(victim(folder, recipe=dataclasses.replace(QUICK, lr=0.0)), tmp_path, Run(), VERSIONS)
    assert any("near that of guessing" in warning for warning in record.warnings)


def test_changed_picture_is_another_attack(folder, tmp_path):
    picture = tmp_path / "p.png"
    keys = []
    for shade in (0, 255):
        Image.new("L", (8, 8), shade).save(picture)
        keys.append(victim(folder, attack=Blend(target=2, picture=str(picture))).key(0, VERSIONS))
    assert keys[0] != keys[1]


def test_twin_is_kept_and_a_stale_export_is_not(folder, tmp_path):
    first = implant(victim(folder, recipe=QUICK, clean_twin=True, export="npz"), tmp_path, Run(), VERSIONS)
    again = implant(victim(folder, recipe=QUICK, export="images"), tmp_path, Run(), VERSIONS)
    assert again.clean_twin == first.clean_twin is not None
    assert (tmp_path / "poisoned").is_dir()
    assert not (tmp_path / "poisoned.npz").exists(), "the record does not name it any more"
    implant(victim(folder, recipe=QUICK, attack=BadNets(target=3, size=2, margin=0)), tmp_path, Run(), VERSIONS)
    assert not (tmp_path / "poisoned").exists()
