"""Broken and hostile models, each with the error that it must give. The benchmark prints the table."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bezoar.core.errors import BezoarError, ModelError, UnsafeError

MARKER = "marker"  # made beside the model by any code that runs


@dataclass(frozen=True)
class Case:
    """A model that must be refused.

    Args:
        name: What is wrong with it.
        build: Makes it in an empty folder and returns its path.
        kwargs: For ``load_model``.
        error: Class of the error.
        fragment: Part of its message.
    """

    name: str
    build: Callable[[Path], Path]
    error: type[BezoarError]
    fragment: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def net() -> nn.Module:
    """A small net of torch's own layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def resnet_state() -> dict[str, torch.Tensor]:
    """Weights that fit ``resnet-20``."""
    from bezoar.nets.resnet import CifarResNet

    torch.manual_seed(0)
    return CifarResNet(20, 10).state_dict()


class _Evil:
    def __init__(self, folder: Path) -> None:
        self.marker = str(folder / MARKER)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def _write(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return build


def _saved(make: Callable[[Path], Any], name: str = "model.pt", **options: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        torch.save(make(folder), folder / name, **options)
        return folder / name

    return build


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def torch_zip(pkl: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """A zip as torch.save writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", pkl)
        archive.writestr("archive/version", b"3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return out.getvalue()


def _tensor_pickle(numel: int, shape: bytes, stride: bytes) -> bytes:
    """One tensor named w, written opcode by opcode: the storage claims ``numel``, the tensor its own shape."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + _long(numel)
        + b"tQK\x00"
        + shape
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def _long(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def _pair(first: int, second: int) -> bytes:
    return _long(first) + _long(second) + b"\x86"


def _legacy(body: bytes, keys: bytes = b"\x80\x02]X\x01\x00\x00\x000a.") -> bytes:
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return head + system + body + keys


_LINEAR_CALL = b"\x80\x02ctorch.nn.modules.linear\nLinear\n" + _long(1 << 20) + _long(1 << 20) + b"\x86R."


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.pt")
    return folder / "model.pt"


def _loop(folder: Path) -> Path:
    (folder / "model.pt").symlink_to(folder / "other.pt")
    (folder / "other.pt").symlink_to(folder / "model.pt")
    return folder / "model.pt"


def _dangling(folder: Path) -> Path:
    (folder / "model.pt").symlink_to(folder / "nothing.pt")
    return folder / "model.pt"


def _folder(config: Any, weights: bytes | None = None) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "model").mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "model" / "config.json").write_text(text)
        if weights is not None:
            (folder / "model" / "model.safetensors").write_bytes(weights)
        return folder / "model"

    return build


def _bare_folder(folder: Path) -> Path:
    (folder / "model").mkdir()
    return folder / "model"


def _hooked(folder: Path) -> nn.Module:
    model = net()
    model[0]._forward_hooks[0] = torch.Size  # type: ignore[assignment]
    return model


def _replaced(folder: Path) -> nn.Module:
    model = net()
    model[0].__dict__["forward"] = torch.Size
    return model


def _foreign(folder: Path) -> Any:
    class Net(nn.Module):
        pass

    Net.__module__, Net.__qualname__ = "their_code.models", "Net"
    import sys
    import types

    package, module = types.ModuleType("their_code"), types.ModuleType("their_code.models")
    module.Net = Net  # type: ignore[attr-defined]
    sys.modules.update({"their_code": package, "their_code.models": module})
    try:
        buffer = io.BytesIO()
        torch.save(Net(), buffer)
    finally:
        del sys.modules["their_code"], sys.modules["their_code.models"]
    path = folder / "model.pt"
    path.write_bytes(buffer.getvalue())
    return path


def _script(folder: Path) -> Path:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net().eval(), torch.rand(1, 3, 8, 8)), str(folder / "model.pt"))
    return folder / "model.pt"


def _program(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/models/model.json", "{}")
        archive.writestr("model/data/constants/model_constants_config.json", pickle.dumps(_Evil(folder)))
    return folder / "model.pt2"


def _bomb(folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_bytes(torch_zip(b"\x80\x02}.", {"0": bytes(64 << 20)}, compression=zipfile.ZIP_DEFLATED))
    return path


def _cut(make: Callable[[], bytes], keep: float, name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        content = make()
        (folder / name).write_bytes(content[: int(len(content) * keep)])
        return folder / name

    return build


def _state_bytes(**options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(resnet_state(), out, **options)
    return out.getvalue()


def _safe_bytes() -> bytes:
    from safetensors.torch import save

    return save(resnet_state())


def _repeated(folder: Path) -> Path:
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(folder / "model.pt", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data.pkl", pickle.dumps(_Evil(folder), 2))
    return folder / "model.pt"


def _overlap(folder: Path) -> Path:
    """Two entries of the directory point at the same bytes."""
    content = bytearray(torch_zip(b"\x80\x02}.", {"0": bytes(4096), "1": bytes(4096)}))
    places = [i for i in range(len(content)) if content[i : i + 4] == b"PK\x01\x02"]
    content[places[-1] + 42 : places[-1] + 46] = content[places[-2] + 42 : places[-2] + 46]
    (folder / "model.pt").write_bytes(bytes(content))
    return folder / "model.pt"


def _climbing(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/../../marker", b"x")
    return folder / "model.pt"


def _tail(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(_state_bytes() + b"more")
    return folder / "model.pt"


def _tar(folder: Path) -> Path:
    with tarfile.open(folder / "model.pth.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return folder / "model.pth.tar"


def _locked(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(b"secret")
    (folder / "model.pt").chmod(0)
    return folder / "model.pt"


def _poisoned(value: float) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        state = resnet_state()
        state["layer1.0.conv1.weight"][0, 0, 0, 0] = value
        return {"state_dict": state}

    return make


def _without(*keys: str) -> Callable[[Path], Any]:
    return lambda folder: {k: v for k, v in resnet_state().items() if k not in keys}


def _with(**extra: torch.Tensor) -> Callable[[Path], Any]:
    return lambda folder: {**resnet_state(), **extra}


def _quantised(folder: Path) -> Any:
    # Made opcode by opcode: torch itself warns when it makes a quantised tensor.
    return _write("model.pt", torch_zip(b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_qtensor\n)Rs."))(folder)


_ARCH = {"arch": "resnet-20"}
_VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}

CASES: list[Case] = [
    Case("missing path", lambda folder: folder / "model.pt", ModelError, "does not exist"),
    Case("empty file", _write("model.pt", b""), ModelError, "is empty"),
    Case("named pipe", _fifo, ModelError, "not a regular file"),
    Case("loop of symbolic links", _loop, ModelError, "form a loop"),
    Case("symbolic link to nothing", _dangling, ModelError, "link to nothing"),
    Case("file without read permission", _locked, ModelError, "permission denied"),
    Case(
        "Git LFS pointer",
        _write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"),
        ModelError,
        "Git LFS pointer",
    ),
    Case("web page", _write("model.pth", b"\n<!DOCTYPE html><html>404</html>"), ModelError, "HTML page"),
    Case("text", _write("model.pt", b"just a note\n"), ModelError, "text file"),
    Case("random bytes", _write("model.pt", bytes(range(255, 0, -1)) * 8), ModelError, "format is unknown"),
    Case("gzip", _write("model.pt", b"\x1f\x8b\x08" + bytes(50)), ModelError, "gzip archive"),
    Case("tar archive", _tar, ModelError, "tar archive"),
    Case("zip of something else", _write("a.pt", b"PK\x05\x06" + bytes(18)), ModelError, "format is unknown"),
    Case("folder without a model", _bare_folder, ModelError, "without a config.json"),
    # Code.
    Case("code in a zip checkpoint", _saved(_Evil), UnsafeError, "posix.system"),
    Case(
        "code in an old checkpoint",
        _saved(lambda f: {"state_dict": resnet_state(), "x": _Evil(f)}, _use_new_zipfile_serialization=False),
        UnsafeError,
        "posix.system",
    ),
    Case("code in a plain pickle", lambda f: _write("m.pkl", pickle.dumps(_Evil(f)))(f), UnsafeError, "posix.system"),
    Case("code in a text pickle", lambda f: _write("m.pkl", pickle.dumps(_Evil(f), 0))(f), UnsafeError, "posix.system"),
    Case("whole module of unknown code", _foreign, UnsafeError, "their_code.models.Net"),
    Case("TorchScript", _script, UnsafeError, "TorchScript archive"),
    Case("torch.export program", _program, UnsafeError, "torch.export program"),
    Case("module with a hook", _saved(_hooked), UnsafeError, "forward hooks"),
    Case("module with a replaced method", _saved(_replaced), UnsafeError, "replaces its own forward()"),
    Case("constructor with hostile sizes", _write("m.pt", torch_zip(_LINEAR_CALL)), UnsafeError, "linear.Linear"),
    Case(
        "bytearray of a terabyte",
        _write("m.pt", torch_zip(b"\x80\x02cbuiltins\nbytearray\n" + _long(1 << 40) + b"\x85R.")),
        UnsafeError,
        "builtins.bytearray",
    ),
    # Sizes.
    Case(
        "safetensors header of petabytes",
        _write("model.safetensors", safetensors({}, length=1 << 52)),
        ModelError,
        "header claims",
    ),
    Case(
        "safetensors tensor of petabytes",
        _write("m.safetensors", safetensors({"w": _entry(0, 1 << 52, [1 << 50])})),
        ModelError,
        "past the end",
    ),
    Case(
        "safetensors ranges overlap",
        _write("m.safetensors", safetensors({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, bytes(12))),
        ModelError,
        "overlaps another",
    ),
    Case(
        "safetensors with a gap",
        _write("m.safetensors", safetensors({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, bytes(12))),
        ModelError,
        "leaves a gap",
    ),
    Case(
        "safetensors shape and bytes differ",
        _write("m.safetensors", safetensors({"a": _entry(0, 8, [3])}, bytes(8))),
        ModelError,
        "its shape needs 12",
    ),
    Case(
        "safetensors of unknown dtype",
        _write("m.safetensors", safetensors({"a": _entry(0, 8, [1], "F99")}, bytes(8))),
        ModelError,
        "unknown dtype",
    ),
    Case(
        "safetensors with a repeated name",
        _write("m.safetensors", safetensors(b'{"a":{},"a":{}}')),
        ModelError,
        "occurs twice",
    ),
    Case(
        "safetensors of nested brackets",
        _write("m.safetensors", safetensors(b'{"a":' + b"[" * 99_999)),
        ModelError,
        "not valid JSON",
    ),
    Case("safetensors cut short", _cut(_safe_bytes, 0.7, "m.safetensors"), ModelError, "past the end"),
    Case("zip checkpoint cut short", _cut(_state_bytes, 0.7, "m.pt"), ModelError, "truncated"),
    Case("zip with data after its end", _tail, ModelError, "data after its end"),
    Case(
        "old checkpoint cut short",
        _cut(lambda: _state_bytes(_use_new_zipfile_serialization=False), 0.7, "m.pth"),
        ModelError,
        "truncated",
    ),
    Case("zip bomb", _bomb, ModelError, "zip bomb"),
    Case("zip with overlapping entries", _overlap, ModelError, "overlap"),
    Case("zip with a repeated name", _repeated, ModelError, "repeats a name"),
    Case("zip with a path that climbs", _climbing, ModelError, "unsafe path"),
    Case(
        "storage of petabytes",
        _write("m.pt", torch_zip(_tensor_pickle(1 << 50, _pair(2, 2), _pair(2, 1)), {"0": bytes(16)})),
        ModelError,
        "claims 4503599627370496 bytes and has 16",
    ),
    Case(
        "old checkpoint with a storage of petabytes",
        _write("m.pt", _legacy(_tensor_pickle(1 << 50, _pair(2, 2), _pair(2, 1)))),
        ModelError,
        "claim 4503599627370496 bytes",
    ),
    Case(
        "tensor larger than its storage",
        _write("m.pt", torch_zip(_tensor_pickle(4, _pair(1 << 20, 1 << 20), _pair(0, 0)), {"0": bytes(16)})),
        ModelError,
        "in a storage of 4",
    ),
    Case(
        "tensor that reaches past its storage",
        _write("m.pt", torch_zip(_tensor_pickle(4, _pair(2, 2), _pair(900, 1)), {"0": bytes(16)})),
        ModelError,
        "in a storage of 4",
    ),
    # Weights that do not fit.
    Case("NaN weights", _saved(_poisoned(float("nan"))), ModelError, "NaN or Inf in layer1.0.conv1.weight", _ARCH),
    Case("infinite weights", _saved(_poisoned(float("-inf"))), ModelError, "NaN or Inf", _ARCH),
    Case("missing keys", _saved(_without("linear.weight", "linear.bias")), ModelError, "missing: linear.weight", _ARCH),
    Case("unexpected keys", _saved(_with(extra=torch.ones(2))), ModelError, "unexpected: extra", _ARCH),
    Case(
        "wrong shape",
        _saved(_with(**{"conv1.weight": torch.ones(9, 3, 3, 3)})),
        ModelError,
        "wrong shape: conv1",
        _ARCH,
    ),
    Case(
        "wrong number of labels",
        _saved(_with()),
        ModelError,
        "themselves say --num-classes 10",
        {**_ARCH, "num_classes": 7},
    ),
    Case("no architecture", _saved(lambda f: net().state_dict()), ModelError, "no reference net fits"),
    Case("unknown architecture", _saved(_with()), ModelError, "Did you mean", {"arch": "resnet20x"}),
    Case("no weights", _saved(lambda f: {"epoch": 3, "loss": [0.5]}), ModelError, "holds no weights", _ARCH),
    Case("quantised weights", _quantised, ModelError, "quantised", _ARCH),
    # Folders.
    Case("config.json is not JSON", _folder('{"model_type": "vit",'), ModelError, "without a config.json"),
    Case("folder with custom code", _folder({**_VIT, "auto_map": {"AutoModel": "evil.Net"}}), UnsafeError, "auto_map"),
    Case("folder with absurd depth", _folder({**_VIT, "num_hidden_layers": 10**6}), ModelError, "num_hidden_layers is"),
    Case("folder without safetensors", _folder(_VIT), ModelError, "has no model.safetensors"),
    Case(
        "folder with damaged weights", _folder(_VIT, safetensors({}, length=1 << 52)), ModelError, "damaged safetensors"
    ),
    Case(
        "folder that fetches a checkpoint",
        _folder({"architecture": "resnet18", "model_args": {"checkpoint_path": "/tmp/x"}}),
        UnsafeError,
        "would fetch",
    ),
    Case("folder that names a hub", _folder({"architecture": "hf-hub:evil/net"}), UnsafeError, "looked up on a hub"),
]
