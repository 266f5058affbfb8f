import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bezoar.core.errors import MissingExtra, ModelError
from bezoar.io.containers import open_source
from bezoar.io.readers.onnx import READER, OnnxClassifier
from tests.io.onnx_models import (
    NETS,
    Grouped,
    Plain,
    PreActivation,
    Residual,
    Transformer,
    close,
    export,
    graph,
    linear,
    load,
    made,
    run,
    saved,
    weight,
)

onnx = pytest.importorskip("onnx", reason="reading ONNX needs bezoar[onnx]", exc_type=Exception)
from onnx import helper, numpy_helper  # noqa: E402

ROWS = [(kind, opset, False) for kind in NETS for opset in (13, 17, 18, 20) if (kind, opset) != (Transformer, 13)]
ROWS += [
    (Residual, 18, True),
    (PreActivation, 20, True),
    (Plain, 18, True),
    (Transformer, 18, True),
    (Transformer, 20, True),
]
ROWS += [(Grouped, 18, True), (Grouped, 21, True)]


@pytest.mark.parametrize(("kind", "opset", "dynamo"), ROWS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_exports_convert_learn_and_write_back(kind: type[nn.Module], opset: int, dynamo: bool, tmp_path: Path) -> None:
    net = made(kind)
    path = export(net, tmp_path / "net.onnx", opset, dynamo)
    loaded, module = load(path)
    assert loaded.format == "onnx"
    assert (loaded.channels, loaded.size) == (3, (kind.size, kind.size))
    assert not module.training
    softmax = kind is Grouped
    finish = torch.nn.Softmax(1) if softmax else torch.nn.Identity()
    assert any("softmax" in w for w in loaded.warnings) == softmax

    x = torch.rand(5, 3, kind.size, kind.size, requires_grad=True)
    logits = module(x)
    assert close(finish(logits), net(x).detach())
    (gradient,) = torch.autograd.grad(finish(logits)[:, 0].sum(), x)
    (expected,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    assert close(gradient, expected, 1e-3)

    trainable = sum(p.numel() for p in loaded.network.parameters() if p.requires_grad)
    assert trainable >= 0.95 * sum(p.numel() for p in net.parameters() if p.ndim > 1)
    before = copy.deepcopy(loaded.network.state_dict())
    learned = copy.deepcopy(loaded.network)
    with torch.no_grad():
        for i, tensor in enumerate(p for p in learned.parameters() if p.requires_grad):
            tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
    cleaned = loaded.wrap(learned) if loaded.wrap else learned
    written = loaded.origin.write(learned, tmp_path / "out")
    assert written == tmp_path / "out" / "net.onnx"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["net.onnx"]
    result = finish(cleaned(x)).detach()
    assert close(result, run(written, x.detach()))
    assert not close(result, finish(logits).detach(), 1e-3)
    again, second = load(written)
    assert close(finish(second(x)).detach(), result)
    assert list(again.network.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in loaded.network.state_dict().items())


@pytest.mark.parametrize(("kind", "dynamo"), [(Plain, False), (Plain, True), (Transformer, False), (Transformer, True)])
@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_batch_size_is_honoured(kind: type[nn.Module], dynamo: bool, batch: int, tmp_path: Path) -> None:
    net = made(kind)
    loaded, module = load(export(net, tmp_path / "net.onnx", 18, dynamo, batch))
    for count in (1, 2, 3, 7):
        x = torch.rand(count, 3, kind.size, kind.size)
        assert close(module(x), net(x))
    if isinstance(module, OnnxClassifier):
        assert f"batch size {batch} was fixed" in loaded.warnings[0]
    assert kind is Transformer or not isinstance(module, OnnxClassifier), "a Reshape alone is freed"
    written = loaded.origin.write(loaded.network, tmp_path / "out")
    x = torch.rand(batch, 3, kind.size, kind.size)
    assert close(net(x), run(written, x))


def test_freshly_initialised_net(tmp_path: Path) -> None:
    """Equal tensors are merged by the exporter: each user of one must still be able to change on its own."""
    net = Residual().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
    nn.init.zeros_(net.fc.bias)
    loaded, module = load(export(net, tmp_path / "net.onnx", 13, dynamo=False))
    x = torch.rand(4, 3, 16, 16)
    assert close(module(x), net(x))


def test_scaled_and_transposed_gemm_goes_back(tmp_path: Path) -> None:
    loaded, module = load(saved(linear(), tmp_path / "a.onnx"))
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        for parameter in loaded.network.parameters():
            parameter.add_(0.5)
    written = loaded.origin.write(loaded.network, tmp_path / "out", "b.onnx")
    assert written.name == "b.onnx"
    assert close(module(x), run(written, x))
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(written).graph.initializer}
    assert np.allclose(stored["w"], weight(3, 4) + 0.25, atol=1e-6)  # 2 w + 0.5 = 2 (w + 0.25)
    assert np.allclose(stored["b"], weight(4) + 1, atol=1e-6)
    assert np.array_equal(stored["axes"], [2, 3])


def test_shared_weight_is_split_only_when_its_users_differ(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("Identity", ["w"], ["w2"]),
        helper.make_node("MatMul", ["m", "w"], ["h"], name="a"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="b"),
    ]
    model = graph(nodes, {"axes": np.array([2, 3]), "w": weight(3, 3)}, output=("n", 3))
    loaded, module = load(saved(model, tmp_path / "a.onnx"))
    same = onnx.load(loaded.origin.write(loaded.network, tmp_path / "same"))
    assert [i.name for i in same.graph.initializer] == ["axes", "w"]
    first, second = (p for p in loaded.network.parameters() if p.requires_grad)
    with torch.no_grad():
        second += 1
    x = torch.rand(3, 3, 8, 8)
    written = loaded.origin.write(loaded.network, tmp_path / "split")
    assert close(module(x), run(written, x))
    assert len(onnx.load(written).graph.initializer) == 3


def test_normalisation_in_the_graph_is_not_trained(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["c"]),
        helper.make_node("Div", ["c", "std"], ["n"]),
        helper.make_node("ReduceMean", ["n", "axes"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    weights = {"mean": weight(1, 3, 1, 1), "std": weight(1, 3, 1, 1) ** 2 + 1, "axes": np.array([2, 3])}
    model = graph(nodes, {**weights, "w": weight(3, 4), "b": weight(4)})
    loaded, _ = load(saved(model, tmp_path / "a.onnx"))
    assert loaded.mean == ()
    assert sorted(p.shape for p in loaded.network.parameters() if p.requires_grad) == [(3, 4), (4,)]


def test_channels_last_input(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        helper.make_node("GlobalMaxPool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    path = saved(graph(nodes, {"w": weight(4, 3, 3, 3)}, shape=("n", 6, 7, 3)), tmp_path / "a.onnx")
    loaded, module = load(path)
    assert (loaded.channels, loaded.size) == (3, (6, 7))
    x = torch.rand(2, 3, 6, 7)
    assert close(module(x), run(path, x.permute(0, 2, 3, 1).contiguous()))
    assert loaded.origin.write(loaded.network, tmp_path / "out").exists()


def test_open_size_is_found(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    path = saved(graph(nodes, {"w": weight(3 * 28 * 28, 4)}, shape=("n", "c", "h", "w")), tmp_path / "a.onnx")
    assert load(path)[0].size == (28, 28)
    with pytest.raises(ModelError, match="onnxruntime cannot run"):
        load(path, size=(20, 20))


def test_external_weights(tmp_path: Path) -> None:
    model = linear()
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.onnx"
    onnx.save(model, path, save_as_external_data=True, location="a.data", size_threshold=0)
    assert len((tmp_path / "in" / "a.data").read_bytes()) > 0
    loaded, module = load(path)
    x = torch.rand(2, 3, 8, 8)
    assert close(module(x), run(saved(linear(), tmp_path / "b.onnx"), x))
    written = loaded.origin.write(loaded.network, tmp_path / "out")
    assert close(module(x), run(written, x)), "one file with everything in it"


def test_wrong_conversion_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that computes something else must not get through."""
    from bezoar.io import onnx_ops

    monkeypatch.setitem(onnx_ops._REDUCTIONS, "ReduceMean", lambda x, d, k: x.mean(d, keepdim=k) * 1.01)
    with pytest.raises(ModelError, match="differs from onnxruntime by 0.0"):
        load(saved(linear(), tmp_path / "a.onnx"))


def test_structure_must_stay(tmp_path: Path) -> None:
    loaded, _ = load(saved(linear(), tmp_path / "a.onnx"))
    with pytest.raises(ModelError, match="structure"):
        loaded.origin.write(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), tmp_path / "out")
    changed = copy.deepcopy(loaded.network)
    gemm = next(m for m in changed.modules() if isinstance(m, nn.Linear))
    gemm.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ModelError, match="would differ"):
        loaded.origin.write(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_recognised_by_content(tmp_path: Path) -> None:
    assert READER.matches(open_source(saved(linear(), tmp_path / "model.bin")))
    for content in (b"PK\x03\x04abc", b"\x80\x02}q\x00.", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"):
        (tmp_path / "other").write_bytes(content)
        assert not READER.matches(open_source(tmp_path / "other"))


def test_broken_torchvision_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bezoar.io import onnx_ops

    def broken(module: str, extra: str) -> None:
        raise MissingExtra(f"{module} is installed but cannot be imported", "Run: pip install 'bezoar[onnx]'")

    onnx_ops.register.cache_clear()
    monkeypatch.setattr(onnx_ops, "require", broken)
    with pytest.raises(MissingExtra, match=r"bezoar\[onnx\]"):
        load(saved(linear(), tmp_path / "a.onnx"))
    monkeypatch.undo()
    load(saved(linear(), tmp_path / "a.onnx"))


def test_through_the_front_door(tmp_path: Path) -> None:
    """load_model and save_model, with the mean and std that the user gives."""
    models = pytest.importorskip("bezoar.io.models")
    net = made(PreActivation)
    path = export(net, tmp_path / "net.onnx", 18, dynamo=False)
    suspect = models.load_model(path, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    assert (suspect.facts.format, suspect.facts.num_classes, suspect.facts.height) == ("onnx", 5, 8)
    x = torch.rand(3, 3, 8, 8)
    mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    assert close(suspect.module(x), net((x - mean) / 0.2))
    written = models.save_model(suspect, suspect.network, tmp_path / "out")
    assert close(net(x), run(written, x))
