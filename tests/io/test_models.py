"""Models of every format open, and go back in the form in which they came."""

import argparse
import json
import os
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bezoar.core.errors import BezoarError, MissingExtra, ModelError, SettingError, UnsafeError
from bezoar.core.model import Suspect
from bezoar.io import extras
from bezoar.io.models import load_model, save_model
from bezoar.nets.neural_cleanse import MnistNet
from bezoar.nets.registry import find
from tests.io.hostile_models import net, resnet_state

SHARED = Path(os.environ.get("BEZOAR_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def extra(module: str) -> Any:
    try:
        return extras.require(module, "hf")
    except MissingExtra as error:
        pytest.skip(str(error))


def published(name: str) -> Path:
    path = SHARED / "models" / name
    if not path.exists():
        pytest.skip(f"the published model {name} is not on this machine")
    return path


def build(name: str, num_classes: int = 10, channels: int = 3) -> nn.Module:
    found = find(name)
    assert found is not None
    torch.manual_seed(1)
    return found[0](num_classes, channels, found[1][0]).eval()


def changed(suspect: Suspect) -> nn.Module:
    """The suspect's network with every floating tensor moved a little."""
    with torch.no_grad():
        for value in suspect.network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.25)
    return suspect.network


def same(one: Any, other: Any) -> bool:
    """Equality of nested plain values and tensors, types and dtypes included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"net": s}, lambda s: {"a": {"model": s}}, lambda s: (s, 3)])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.backbone."])
def test_nesting_and_prefixes(wrap: Callable[[Any], Any], prefix: str, tmp_path: Path) -> None:
    state = OrderedDict((prefix + key, value) for key, value in resnet_state().items())
    torch.save(wrap(state), tmp_path / "m.pt")
    suspect = load_model(tmp_path / "m.pt", arch="resnet-20")
    for key, value in suspect.network.state_dict().items():
        assert torch.equal(value, state[prefix + key])
    out = save_model(suspect, changed(suspect), tmp_path / "out")
    again = torch.load(out, weights_only=True)
    moved = OrderedDict((k, v + 0.25 if v.is_floating_point() else v) for k, v in state.items())
    assert same(again, wrap(moved))


@pytest.mark.parametrize("new_zip", [True, False])
def test_checkpoint_goes_back_as_it_came(new_zip: bool, tmp_path: Path) -> None:
    network = build("resnet-20", 7).half()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    checkpoint = {
        "epoch": 25,
        "state_dict": OrderedDict((f"module.{key}", value) for key, value in network.state_dict().items()),
        "best": np.float64(84.5),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, tmp_path / "student.pth.tar", _use_new_zipfile_serialization=new_zip)
    suspect = load_model(tmp_path / "student.pth.tar", arch="resnet-20")
    assert suspect.facts.num_classes == 7
    assert {v.dtype for v in suspect.network.state_dict().values()} == {torch.float32, torch.int64}
    out = save_model(suspect, suspect.network, tmp_path / "out")
    assert out == tmp_path / "out" / "student.pth.tar"
    assert zipfile.is_zipfile(out) == new_zip
    again = torch.load(out, weights_only=False)
    assert same(again, checkpoint)
    assert [path.name for path in out.parent.iterdir()] == ["student.pth.tar"]


def test_shared_storage_and_parameters_survive(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(resnet_state())
    state["linear.bias"] = nn.Parameter(state["linear.bias"])
    state["layer1.0.bn2.weight"] = state["layer1.0.bn1.weight"]
    torch.save(state, tmp_path / "m.pt")
    suspect = load_model(tmp_path / "m.pt", arch="resnet-20")
    again = torch.load(save_model(suspect, changed(suspect), tmp_path / "out"), weights_only=True)
    assert isinstance(again["linear.bias"], nn.Parameter)
    assert again["layer1.0.bn2.weight"].data_ptr() == again["layer1.0.bn1.weight"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_go_back_as_they_came(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {f"module.{k}": v.to(dtype) if v.is_floating_point() else v for k, v in resnet_state().items()}
    save_file(state, tmp_path / "m.safetensors", {"format": "pt", "author": "someone"})
    suspect = load_model(tmp_path / "m.safetensors", arch="resnet-20")
    assert suspect.facts.format == "safetensors"
    unchanged = save_model(suspect, suspect.network, tmp_path / "same")
    assert unchanged.read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    out = save_model(suspect, changed(suspect), tmp_path / "out", "clean.safetensors")
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    again = load_file(out)
    for key, value in state.items():
        expected = (value.float() + 0.25).to(dtype) if value.is_floating_point() else value
        assert again[key].dtype == value.dtype and torch.equal(again[key], expected)


def test_files_are_told_by_content(tmp_path: Path) -> None:
    save_file(resnet_state(), tmp_path / "m.bin")
    torch.save(resnet_state(), tmp_path / "n.safetensors")
    assert load_model(tmp_path / "m.bin", arch="resnet-20").facts.format == "safetensors"
    assert load_model(tmp_path / "n.safetensors", arch="resnet-20").facts.format == "state-dict"


@pytest.mark.parametrize(
    ("name", "num_classes", "channels"),
    [("wrn-16-1", 43, 3), ("wrn-10-2", 5, 1), ("preactresnet-18", 3, 3), ("vgg-11", 17, 4), ("nc-mnist", 10, 1)]
    + [("nc-gtsrb", 43, 3), ("small-vgg", 12, 1), ("deepid", 65, 3), ("resnet-32", 2, 3)]
    + [("convnet-16", 6, 1), ("convnet-16-bn", 4, 3)],
)
def test_labels_channels_and_architecture_are_found(name: str, num_classes: int, channels: int, tmp_path: Path) -> None:
    torch.save(build(name, num_classes, channels).state_dict(), tmp_path / "m.pt")
    given, guessed = load_model(tmp_path / "m.pt", arch=name), load_model(tmp_path / "m.pt")
    assert not given.warnings
    assert f"fit {name} alone" in guessed.warnings[0]
    for suspect in (given, guessed):
        assert (suspect.facts.num_classes, suspect.facts.channels) == (num_classes, channels)
        assert suspect.facts.arch == name
        x = torch.rand(3, channels, suspect.facts.height, suspect.facts.width)
        assert torch.equal(suspect.module(x), build(name, num_classes, channels)(x))


def test_size_is_found_in_the_weights(tmp_path: Path) -> None:
    found = find("small-vgg")
    assert found is not None
    torch.save(found[0](10, 3, 64).state_dict(), tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt").facts.height == 64


def test_wrong_architecture_names_the_right_one(tmp_path: Path) -> None:
    torch.save(build("vgg-13-bn").state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="does fit --arch vgg-13-bn"):
        load_model(tmp_path / "m.pt", arch="vgg-16-bn")


def test_several_sets_of_weights(tmp_path: Path) -> None:
    state, other = resnet_state(), {key: value * 0 for key, value in resnet_state().items()}
    torch.save({"ema": other, "state_dict": state}, tmp_path / "m.pt")
    suspect = load_model(tmp_path / "m.pt", arch="resnet-20")
    assert torch.equal(suspect.network.state_dict()["conv1.weight"], state["conv1.weight"])
    assert suspect.warnings == ("the file holds several sets of weights; state_dict was read, not ema",)


def test_bookkeeping_entries_may_lack_or_abound(tmp_path: Path) -> None:
    state = {k: v for k, v in resnet_state().items() if not k.endswith("num_batches_tracked")}
    torch.save({**state, "conv1.total_ops": torch.ones(1)}, tmp_path / "m.pt")
    load_model(tmp_path / "m.pt", arch="resnet-20")


# --- architectures of the user and of libraries -----------------------------------------------------------------------


def test_architecture_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text("from torch import nn\n\nWIDTH = 4\n")
    (tmp_path / "code.py").write_text(
        "import layers\nfrom torch import nn\n\n\n"
        "def net(num_classes, in_channels=3):\n"
        "    import layers\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, layers.WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(4, num_classes))\n"
    )
    state = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)).state_dict()
    torch.save(state, tmp_path / "m.pt")
    suspect = load_model(tmp_path / "m.pt", arch=f"{tmp_path / 'code.py'}:net", size=(9, 11))
    assert (suspect.facts.num_classes, suspect.facts.channels) == (6, 1)
    assert (suspect.facts.height, suspect.facts.width) == (9, 11)


@pytest.mark.parametrize(
    ("code", "function", "message"),
    [
        ("def make_net(): pass", "make_nett", "make_net"),
        ("1 / 0", "net", "division by zero"),
        ("def net(): return 3", "net", "not a torch.nn.Module"),
        ("def net(): raise KeyError('lost')", "net", "lost"),
    ],
)
def test_mistakes_in_the_users_file(code: str, function: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(code)
    torch.save(resnet_state(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m.pt", arch=f"{tmp_path / 'code.py'}:{function}")


@pytest.mark.parametrize("arch", ["timm/hf-hub:someone/net", "timm/local-dir:/tmp", "torchvision/resnet19", "resnt-20"])
def test_unknown_architectures(arch: str, tmp_path: Path) -> None:
    if "/" in arch:
        extra("timm")
    torch.save(resnet_state(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="unknown architecture"):
        load_model(tmp_path / "m.pt", arch=arch)


def test_torchvision_architecture(tmp_path: Path) -> None:
    models = extra("torchvision.models")
    torch.manual_seed(0)
    network = models.squeezenet1_1(num_classes=5).eval()
    torch.save({"model": network.state_dict()}, tmp_path / "m.pt")
    suspect = load_model(tmp_path / "m.pt", arch="torchvision/squeezenet1_1", size=64)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(suspect.module(x), network(x))
    assert "--mean 0.485,0.456,0.406" in suspect.warnings[0]
    normal = load_model(tmp_path / "m.pt", arch="torchvision/squeezenet1_1", mean=(0.5, 0.4, 0.3), std=0.2, size=64)
    scaled = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
    assert torch.allclose(normal.module(x), network(scaled), atol=1e-5)
    assert normal.facts.mean == (0.5, 0.4, 0.3) and normal.facts.std == (0.2, 0.2, 0.2) and not normal.warnings


def test_timm_architecture(tmp_path: Path) -> None:
    timm = extra("timm")
    network = timm.create_model("resnet10t", num_classes=4, in_chans=1)
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    suspect = load_model(tmp_path / "m.safetensors", arch="timm/resnet10t", size=32)
    assert (suspect.facts.num_classes, suspect.facts.channels) == (4, 1)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    transformers = extra("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=4,
    )
    folder = tmp_path / "vit"
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    prepare = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.25], "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    (folder / "README.md").write_text("# A model\n")
    return folder


def test_hugging_face_folder(vit: Path, tmp_path: Path) -> None:
    transformers = extra("transformers")
    network = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    suspect = load_model(vit)
    x = torch.rand(2, 3, 16, 16)
    scaled = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1)
    assert torch.allclose(suspect.module(x), network(scaled).logits, atol=1e-5)
    assert suspect.facts.format == "huggingface" and suspect.facts.num_classes == 4 and suspect.facts.height == 16
    assert suspect.module.training is False and not suspect.warnings

    out = save_model(suspect, changed(suspect), tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in vit.iterdir())
    assert [p.name for p in out.parent.iterdir()] == ["vit"]
    old, new = load_file(vit / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[key] + 0.25, new[key], atol=1e-6) for key in old)
    assert torch.equal(load_model(out).module(x), suspect.module(x))
    assert save_model(suspect, suspect.network, tmp_path / "out") == out, "an earlier result is replaced"
    with pytest.raises(ModelError, match="original"):
        save_model(suspect, suspect.network, tmp_path)


def test_hugging_face_folder_of_several_files(vit: Path, tmp_path: Path) -> None:
    transformers = extra("transformers")
    network = transformers.AutoModelForImageClassification.from_pretrained(vit)
    network.half().save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    suspect = load_model(tmp_path / "shards")
    out = save_model(suspect, suspect.network, tmp_path / "out")
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "shards" / name).read_bytes()
    assert "no preprocessor_config.json" in suspect.warnings[0]


def test_hugging_face_normalisation_of_other_ranges(vit: Path) -> None:
    prepare = {"image_mean": 127.5, "image_std": 127.5, "do_rescale": False}
    (vit / "preprocessor_config.json").write_text(json.dumps(prepare))
    facts = load_model(vit).facts
    assert facts.mean == pytest.approx((0.5,) * 3) and facts.std == pytest.approx((0.5,) * 3)


def test_hugging_face_weights_that_do_not_fit(vit: Path) -> None:
    state = load_file(vit / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, vit / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="missing: classifier.bias"):
        load_model(vit)


def test_hugging_face_config_cannot_ask_for_memory(vit: Path) -> None:
    config = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**config, "hidden_size": 1 << 20, "intermediate_size": 1 << 20}))
    with pytest.raises(ModelError, match="the files hold"):
        load_model(vit)


def test_timm_folder(tmp_path: Path) -> None:
    timm = extra("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=4).eval()
    folder = tmp_path / "net"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 48, 48]}
    config = {"architecture": "resnet10t", "num_classes": 4, "pretrained_cfg": cfg, "model_args": {"act_layer": "relu"}}
    (folder / "config.json").write_text(json.dumps(config))
    suspect = load_model(folder)
    x = torch.rand(2, 3, 48, 48)
    assert torch.allclose(suspect.module(x), network((x - 0.5) / 0.25), atol=1e-5)
    assert suspect.facts.format == "timm" and suspect.facts.height == 48
    out = save_model(suspect, suspect.network, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text()) == config


# --- modules and code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 3}, nn.DataParallel, lambda m: m.half()])
def test_whole_module_of_torch_layers(wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    expected = net().eval()
    value = wrap(net())
    torch.save(value, tmp_path / "m.pkl")
    suspect = load_model(tmp_path / "m.pkl")
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(suspect.module(x), expected(x), atol=1e-3)
    assert suspect.facts.format == "pickled-module" and suspect.facts.num_classes == 3
    out = save_model(suspect, changed(suspect), tmp_path / "out")
    again = load_model(out)
    assert torch.allclose(again.module(x), suspect.module(x), atol=1e-2)
    assert type(torch.load(out, weights_only=False)) is type(value)


def test_whole_module_of_torchvision(tmp_path: Path) -> None:
    models = extra("torchvision.models")
    network = models.resnet18(num_classes=3).eval()
    torch.save(network, tmp_path / "m.pt")
    before = set(torch.serialization.get_safe_globals())
    suspect = load_model(tmp_path / "m.pt", size=32)
    assert set(torch.serialization.get_safe_globals()) == before
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(suspect.module(x), network(x))
    assert suspect.facts.arch == "ResNet"


class TheirNet(nn.Module):
    """Stands for a stranger's own class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def test_whole_module_of_unknown_code(tmp_path: Path) -> None:
    torch.save(TheirNet(), tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match="TheirNet"):
        load_model(tmp_path / "m.pt")
    suspect = load_model(tmp_path / "m.pt", allow_code=True)
    assert suspect.facts.arch == "TheirNet"
    again = load_model(save_model(suspect, changed(suspect), tmp_path / "out"), allow_code=True)
    assert torch.equal(again.module(torch.ones(1, 3, 32, 32)), suspect.module(torch.ones(1, 3, 32, 32)))


def test_torchscript_where_code_is_allowed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net()), str(tmp_path / "m.pt"))
        suspect = load_model(tmp_path / "m.pt", allow_code=True)
        x = torch.rand(2, 3, 32, 32, requires_grad=True)
        assert torch.allclose(suspect.module(x), net().eval()(x), atol=1e-6)
        suspect.module(x).sum().backward()
        assert x.grad is not None
        again = load_model(save_model(suspect, changed(suspect), tmp_path / "out"), allow_code=True)
        assert torch.equal(again.module(x), suspect.module(x))


def test_exported_program_where_code_is_allowed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch", min=1, max=512)},)
        program = torch.export.export(net().eval(), (torch.rand(2, 3, 32, 32),), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "m.pt2")
        with pytest.raises(UnsafeError, match="torch.export"):
            load_model(tmp_path / "m.pt2")
        suspect = load_model(tmp_path / "m.pt2", allow_code=True)
        x = torch.rand(3, 3, 32, 32)
        assert torch.allclose(suspect.module(x), net().eval()(x), atol=1e-6)
        again = load_model(save_model(suspect, changed(suspect), tmp_path / "out"), allow_code=True)
        assert torch.equal(again.module(x), suspect.module(x))


# --- modules given in Python ------------------------------------------------------------------------------------------


def test_module_in_python(tmp_path: Path) -> None:
    network = net()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    suspect = load_model(network, mean=0.5, std=0.25)
    assert suspect.network is network and suspect.facts.format == "module"
    assert (suspect.facts.num_classes, suspect.facts.channels, suspect.facts.height) == (3, 3, 32)
    assert suspect.facts.mean == (0.5, 0.5, 0.5)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert suspect.facts.sha256 == load_model(net()).facts.sha256
    out = save_model(suspect, network, tmp_path)
    assert torch.equal(load_file(out)["0.weight"], before["0.weight"])


def test_module_in_python_of_fixed_size() -> None:
    mnist = build("nc-mnist", 10, 1)
    facts = load_model(mnist).facts
    assert (facts.channels, facts.height, facts.width) == (1, 28, 28)


@pytest.mark.parametrize("module", [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), nn.LSTM(3, 3)])
def test_modules_that_classify_no_images(module: nn.Module) -> None:
    with pytest.raises(ModelError):
        load_model(module)


@pytest.mark.parametrize(
    "settings",
    [{"mean": 0.5}, {"mean": (0.5, 0.5), "std": (1, 1)}, {"mean": 0.5, "std": 0.0}, {"size": 0}, {"num_classes": 1}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        load_model(net(), **settings)


# --- writing ----------------------------------------------------------------------------------------------------------


def _saved(folder: Path) -> Suspect:
    torch.save(resnet_state(), folder / "m.pt")
    return load_model(folder / "m.pt", arch="resnet-20")


def test_original_is_never_overwritten(tmp_path: Path) -> None:
    suspect = _saved(tmp_path)
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(ModelError, match="is the original"):
        save_model(suspect, suspect.network, tmp_path)
    assert (tmp_path / "m.pt").read_bytes() == before


def test_original_that_changed(tmp_path: Path) -> None:
    suspect = _saved(tmp_path)
    torch.save({}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="changed or disappeared"):
        save_model(suspect, suspect.network, tmp_path / "out")


def test_another_structure_is_not_written(tmp_path: Path) -> None:
    suspect = _saved(tmp_path)
    for other in (net(), build("resnet-20", 7)):
        with pytest.raises(ModelError, match="lacks|changed its shape"):
            save_model(suspect, other, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suspect = _saved(tmp_path)

    def full(value: Any, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match="No space left"):
        save_model(suspect, suspect.network, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# --- optional libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "different builds"),
        ("raise OSError('libfoo.so')", "pip install --force-reinstall 'bezoar[hf]'"),
        ("import not_there_at_all", "pip install 'bezoar[hf]'"),
    ],
)
def test_missing_or_broken_library(code: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra) as caught:
        extras.require("broken_library", "hf")
    assert hint in caught.value.hint


# --- published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arch", "num_classes", "size"),
    [
        ("nad/student.pth.tar", "wrn-16-1", 10, (32, 32)),
        ("nad/teacher.pth.tar", "wrn-16-1", 10, (32, 32)),
        ("nad/erased.pth.tar", "wrn-16-1", 10, (32, 32)),
        ("resnet_cifar/resnet20-12fca82f.th", "resnet-20", 10, (32, 32)),
        ("resnet_cifar/resnet44-014dd654.th", "resnet-44", 10, (32, 32)),
        ("ibau/cifar10-badnets-target8.pth", "small-vgg", 10, (32, 32)),
        ("ibau/cifar10-trojan-wm-target2.pth", "small-vgg", 10, (32, 32)),
        ("ibau/gtsrb-badnets-target8.pth", "small-vgg", 43, (32, 32)),
        ("ibau/gtsrb-l0-inv-target0.pth", "small-vgg", 43, (32, 32)),
        ("csaw/deepid-1283.safetensors", "deepid", 1283, (55, 47)),
    ],
)
def test_published_models(name: str, arch: str, num_classes: int, size: tuple[int, int], tmp_path: Path) -> None:
    path = published(name)
    suspect = load_model(path)
    assert suspect.facts.arch == arch and suspect.facts.num_classes == num_classes
    assert (suspect.facts.height, suspect.facts.width) == size
    out = save_model(suspect, suspect.network, tmp_path)
    assert out.name == path.name
    if path.suffix == ".safetensors":
        assert out.read_bytes() == path.read_bytes()
        return
    assert zipfile.is_zipfile(out) == zipfile.is_zipfile(path)
    assert same(
        torch.load(out, weights_only=True, map_location="cpu"), torch.load(path, weights_only=True, map_location="cpu")
    )


def test_published_whole_module_is_refused(tmp_path: Path) -> None:
    path = published("unsafe/whole-module.pkl")
    with pytest.raises(UnsafeError, match="model.DefaultModel"):
        load_model(path)
    with pytest.raises(BezoarError, match="needs the module 'model'"):
        load_model(path, allow_code=True)


def test_checkpoint_with_numpy_arrays_opens_and_goes_back(tmp_path):
    """As benchmark suites write them: weights beside arrays of indices."""
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in MnistNet().state_dict().items()}
    index = np.arange(6).reshape(2, 3)
    torch.save({"model": state, "poisoned": {"index": index, "share": np.float64(0.1)}}, tmp_path / "model.pt")
    suspect = load_model(tmp_path / "model.pt", arch="nc-mnist")
    written = save_model(suspect, suspect.network, tmp_path / "out")
    read = torch.load(written, weights_only=False)
    assert np.array_equal(read["poisoned"]["index"], index)
    assert all(torch.equal(read["model"][k], v) for k, v in state.items())


@pytest.mark.parametrize("array", [np.array([print], dtype=object), np.array([(1, "a")], dtype="i4,U2")])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    torch.save({"model": MnistNet().state_dict(), "extra": array}, tmp_path / "model.pt")
    with pytest.raises(UnsafeError):
        load_model(tmp_path / "model.pt", arch="nc-mnist")
