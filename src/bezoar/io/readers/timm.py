"""Folders of timm: ``config.json`` with ``architecture`` and ``pretrained_cfg``, and ``model.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bezoar.core.errors import ModelError, UnsafeError
from bezoar.io.arch import Architecture, Size
from bezoar.io.containers import Source, sha256
from bezoar.io.extras import require
from bezoar.io.readers import _folder, _state
from bezoar.io.readers._base import Loaded, Options

_NOT_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "scriptable", "exportable", "no_jit")


@dataclass(frozen=True)
class _Reader:
    """A model that timm wrote for the hub."""

    def matches(self, source: Source) -> bool:
        if not source.is_folder:
            return False
        config = _folder.peek(source.path)
        return isinstance(config.get("architecture"), str) and "model_type" not in config

    def read(self, source: Source, options: Options) -> Loaded:
        config = _folder.read_config(source.path / "config.json")
        files = _folder.weight_files(source.path)
        cfg = config.get("pretrained_cfg")
        cfg = cfg if isinstance(cfg, dict) else {}
        mean, std = _folder.pair(cfg.get("mean"), cfg.get("std"))
        architecture = _architecture(config, _size(cfg))
        built = _state.build_as(architecture, _folder.tensors(files), options, source.path.name)
        return Loaded(
            network=built.network,
            format="timm",
            arch=architecture.name,
            origin=_folder.FolderOrigin(source.path, {p.name: sha256(p) for p in files}, built.names),
            mean=mean,
            std=std,
            size=options.size or architecture.size,
            channels=built.plan.channels,
            warnings=() if mean else ("the folder names no normalisation; give --mean and --std if there is one",),
        )


def _size(cfg: dict[str, Any]) -> Size | None:
    size = cfg.get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n <= 4096 for n in size):
        return size[1], size[2]
    return None


def _architecture(config: dict[str, Any], size: Size | None) -> Architecture:
    timm = require("timm", "hf")
    name, arguments = config["architecture"], config.get("model_args") or {}
    if not timm.is_model(name):
        raise ModelError(f"this timm ({timm.__version__}) has no architecture {name[:60]!r}", "Update timm")
    if not isinstance(arguments, dict):
        raise ModelError("model_args of config.json is not an object", "Download it again")
    refused = sorted(set(arguments) & set(_NOT_ARGUMENTS))
    if refused:
        raise UnsafeError(
            f"model_args of config.json has {', '.join(refused)}", "Remove it: the weights are in the folder"
        )
    labels = config.get("num_classes")

    def make(num_classes: int | None, channels: int | None, _: Size | None) -> nn.Module:
        given = {**arguments, "num_classes": num_classes or labels, "in_chans": channels}
        network: nn.Module = timm.create_model(
            name, pretrained=False, **{key: value for key, value in given.items() if value is not None}
        )
        return network

    return Architecture(f"timm/{name}", make, size)


READER = _Reader()
