"""Which models a sweep is about: folders, lists, and queries to a hub that is not asked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bezoar.core.errors import ModelError, SettingError
from bezoar.io.hub_models import HubModel, search
from bezoar.io.listing import find_models, hash_data
from tests.io.hostile_models import _fifo

HF = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}


@pytest.fixture
def zoo(tmp_path):
    """Three model files, one model folder, and what is none."""
    for name in ("b.pth", "deep/er/a.safetensors", "c.onnx", "notes.txt", "data.npz", ".hidden.pt", ".git/x.pt"):
        path = tmp_path / "zoo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    folder = tmp_path / "zoo" / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF))
    (folder / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "zoo" / "deep" / "triggers.safetensors").write_bytes(b"of a scan")
    return tmp_path / "zoo"


def names(source: object, top: Path) -> list[str]:
    return [os.path.relpath(entry.path, top) for entry in find_models(source)]


def test_a_folder_is_searched(zoo):
    assert sorted(names(zoo, zoo)) == ["b.pth", "c.onnx", "deep/er/a.safetensors", "hf"]
    assert names(str(zoo), zoo) == names(zoo, zoo)


def test_one_model_is_a_list_of_one(zoo):
    assert names(zoo / "hf", zoo) == ["hf"]
    assert names(zoo / "b.pth", zoo) == ["b.pth"]
    assert names([zoo / "b.pth", str(zoo / "c.onnx")], zoo) == ["b.pth", "c.onnx"]


def test_links_to_folders_are_not_followed(zoo):
    (zoo / "deep" / "round").symlink_to(zoo, target_is_directory=True)
    (zoo / "linked.pt").symlink_to(zoo / "b.pth")  # files of a cache are links
    assert sorted(names(zoo, zoo)) == ["b.pth", "c.onnx", "deep/er/a.safetensors", "hf", "linked.pt"]


def test_nothing_there_is_told(tmp_path):
    with pytest.raises(ModelError, match="no model in"):
        find_models(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        find_models(tmp_path / "nowhere")


def test_text_list(zoo):
    (zoo / "list.txt").write_text("# the zoo\nb.pth\n\n  deep/er/a.safetensors\n")
    assert names(zoo / "list.txt", zoo) == ["b.pth", "deep/er/a.safetensors"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_list_with_settings(zoo, kind):
    (zoo / "net.py").write_text("")
    rows = [{"model": "b.pth", "arch": "net.py:make", "num_classes": "7"}, {"model": "c.onnx", "data": "data.npz"}]
    texts = {
        "csv": "model,arch,num_classes,data\nb.pth,net.py:make,7,\nc.onnx,,,data.npz\n",
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
    }
    (zoo / f"list.{kind}").write_text(texts[kind])
    first, second = find_models(zoo / f"list.{kind}")
    assert first.settings == {"arch": f"{zoo / 'net.py'}:make", "num_classes": "7"}
    assert second.settings == {"data": str(zoo / "data.npz")}
    assert (first.name, first.path) == ("b.pth", str(zoo / "b.pth"))


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("a.csv", "path\nx.pt\n", "names no model"),
        ("a.jsonl", '{"model": "x.pt"', "cannot read"),
        ("a.jsonl", "[1]\n", "names no model"),
        ("a.jsonl", '{"model": "x.pt", "arch": {"a": 1}}', "no text or number"),
        ("a.json", "[" * 100_000, "cannot read"),
        ("a.txt", "", "no model in"),
    ],
)
def test_broken_lists(tmp_path, name, text, fragment):
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=fragment):
        find_models(tmp_path / name)


def test_a_fingerprint_is_of_the_contents(zoo):
    before = {entry.name: entry.fingerprint()[0] for entry in find_models(zoo)}
    assert len(set(before.values())) == 4
    (zoo / "hf" / "preprocessor_config.json").write_text("{}")
    (zoo / "c.onnx.data").write_bytes(b"weights outside")
    (zoo / "b.pth").write_bytes(b"other")
    after = {entry.name: entry.fingerprint()[0] for entry in find_models(zoo)}
    assert {Path(name).name for name in before if before[name] != after[name]} == {"hf", "c.onnx", "b.pth"}
    os.rename(zoo / "b.pth", zoo / "moved.pth")
    assert find_models(zoo / "moved.pth")[0].fingerprint()[0] == after[str(zoo / "b.pth")]


def test_what_cannot_be_read_has_a_fingerprint_of_its_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found = [_fifo(tmp_path / name) for name in ("a", "b")]
    (one, weights), (other, _) = (entry.fingerprint() for entry in find_models(found))
    assert one.startswith("unreadable")
    assert weights == ""
    assert one != other


def test_data_hash(tmp_path):
    for place in ("a/0", "a/1"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.png").write_bytes(b"x")
    before = hash_data(str(tmp_path / "a"))
    assert before == hash_data(str(tmp_path / "a"))
    (tmp_path / "a/1/x.png").rename(tmp_path / "a/1/y.png")
    assert hash_data(str(tmp_path / "a")) != before
    assert hash_data("fashion-mnist") == "named:fashion-mnist"


class Hub:
    """What of huggingface_hub is used, without a network."""

    asked: dict[str, object]

    def HfApi(self) -> Hub:  # noqa: N802
        return self

    def list_models(self, **asked: object) -> list[SimpleNamespace]:
        self.asked = asked
        return [SimpleNamespace(id=f"ann/vit-{n}", sha=str(n) * 40) for n in range(3)]

    def model_info(self, repo: str) -> SimpleNamespace:
        if repo == "ann/gone":
            raise OSError("404 not found")
        return SimpleNamespace(id=repo, sha="f" * 40)

    def snapshot_download(self, *, repo_id: str, revision: str, allow_patterns: list[str], local_dir: str) -> None:
        assert not any(pattern.endswith((".bin", ".py", ".pkl")) for pattern in allow_patterns)
        (Path(local_dir)).mkdir(parents=True)
        (Path(local_dir) / "config.json").write_text(json.dumps(HF))
        if repo_id != "ann/pickle":
            (Path(local_dir) / "model.safetensors").write_bytes(revision.encode())


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_hub_query(hub):
    found = find_models("hf:vit?author=ann&limit=3")
    assert [entry.name for entry in found] == [f"hf:ann/vit-{n}@{str(n) * 12}" for n in range(3)]
    assert [entry.fingerprint() for entry in found] == [(str(n) * 40, "") for n in range(3)]
    assert hub.asked | {"expand": 0} == {
        "search": "vit",
        "author": "ann",
        "filter": "image-classification",
        "sort": "downloads",
        "limit": 3,
        "expand": 0,
    }


def test_one_model_of_the_hub(hub, tmp_path):
    assert search("hf:ann/one") == [HubModel("ann/one", "f" * 40)]
    (tmp_path / "list.txt").write_text("hf:ann/one\nhf:vit\n")
    with pytest.raises(SettingError, match="stands for 3 models"):
        find_models(tmp_path / "list.txt")


def test_hub_model_is_fetched_without_pickles(hub, tmp_path):
    folder = HubModel("ann/one", "f" * 40).fetch(tmp_path / "model")
    assert (folder / "model.safetensors").read_bytes() == b"f" * 40
    with pytest.raises(ModelError, match="no safetensors"):
        HubModel("ann/pickle", "f" * 40).fetch(tmp_path / "other")


@pytest.mark.parametrize(
    ("query", "error", "fragment"),
    [
        ("hf:vit?colour=red", SettingError, "unknown part 'colour'"),
        ("hf:vit?limit=0", SettingError, "no number above 0"),
        ("hf:ann/gone", ModelError, "404 not found"),
    ],
)
def test_bad_queries(hub, query, error, fragment):
    with pytest.raises(error, match=fragment):
        find_models(query)
