"""Small nets and graphs for the tests of ONNX, and the usual steps with them."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.io.containers import open_source
from bezoar.io.readers._base import Loaded, Options
from bezoar.io.readers.onnx import READER

for name in ("onnx", "onnx2torch", "onnxruntime"):
    pytest.importorskip(name, reason="reading ONNX needs bezoar[onnx]", exc_type=Exception)

import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


class Residual(nn.Module):
    """Convolutions, BatchNorm before and after, a skip, average pooling."""

    size = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.bn1 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.skip, self.fc = nn.Conv2d(6, 8, 1, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.relu(x))
        x = F.max_pool2d(F.relu(self.bn0(x)), 2) if self.size == 0 else F.relu(self.bn0(x))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn1(self.conv(x)) + self.skip(x)), 1).flatten(1))


class PreActivation(nn.Module):
    """BatchNorm that cannot be folded into a convolution."""

    size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(F.relu(self.conv(x))).mean((2, 3)))


class Plain(nn.Module):
    """No normalisation; padding, pooling, a large linear layer."""

    size = 12

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 8, 3), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.pad(F.elu(self.a(x)), (1, 1, 1, 1), mode="reflect"), 2)
        return self.fc(F.max_pool2d(F.leaky_relu(self.b(x)), 2, ceil_mode=True).flatten(1))


class Transformer(nn.Module):
    """Depthwise convolution, GELU, LayerNorm, attention, a class token."""

    size = 8

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.patches = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 16, 4, 4)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 5, 16))
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down, self.head = (
            nn.LayerNorm(16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(F.gelu(self.depthwise(x))).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)
        return self.head((x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))[:, 0])


class Grouped(nn.Module):
    """GroupNorm, InstanceNorm, resizing, hard activations, a softmax at the end."""

    size = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 5)
        self.instance = nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        x = F.interpolate(self.instance(x), scale_factor=2.0, mode="bilinear") + F.interpolate(x, scale_factor=2.0)
        return torch.softmax(self.fc(x.amax((2, 3))), 1)


NETS = (Residual, PreActivation, Plain, Transformer, Grouped)


def made(kind: type[nn.Module]) -> nn.Module:
    """Random weights everywhere: exporters merge equal tensors, such as the zeros of fresh biases."""
    generator = torch.Generator().manual_seed(1)
    net = kind()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    for key, buffer in net.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5 if "var" in key else -1, 2, generator=generator)
    return net.eval()


def export(net: nn.Module, path: Path, opset: int, dynamo: bool, batch: int | None = None) -> Path:
    """Export; any batch size unless one is given."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    x = torch.rand(batch or 2, 3, type(net).size, type(net).size)
    options = {"dynamic_axes": {"x": {0: "n"}}} if batch is None else {}
    if dynamo:
        pytest.importorskip("onnxscript", reason="the newer exporter needs onnxscript")
        options = (
            {"dynamic_shapes": ({0: torch.export.Dim("n")},), "verbose": False} if batch is None else {"verbose": False}
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), str(path), dynamo=dynamo, opset_version=opset, input_names=["x"], **options)
    return path


def load(path: Path, **options) -> tuple[Loaded, nn.Module]:
    loaded = READER.read(open_source(path), Options(**options))
    return loaded, loaded.wrap(loaded.network) if loaded.wrap else loaded.network


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def close(a: Tensor, b: Tensor | np.ndarray, tolerance: float = 1e-4) -> bool:
    a, b = a.detach(), torch.as_tensor(b).detach()
    return a.shape == b.shape and float((a - b).abs().max() / b.abs().max()) < tolerance


def graph(nodes, weights, shape=("n", 3, 8, 8), opset=18, output=("n", 4), kind=TensorProto.FLOAT, **extra):
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    made = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **extra)


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear(**extra):
    """Mean over the picture, then a linear layer."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "w", "b"], ["y"], alpha=2.0, beta=0.5),
    ]
    return graph(nodes, {"axes": np.array([2, 3]), "w": weight(3, 4), "b": weight(4)}, **extra)


def saved(model, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
