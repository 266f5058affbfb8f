"""Model folders: their configuration, checked before a library builds anything from it, and writing them back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bezoar.core.errors import ModelError, UnsafeError
from bezoar.io.containers import TensorRange, open_source, safetensors_header, sha256
from bezoar.io.extras import one_line
from bezoar.io.readers._base import file_name
from bezoar.io.readers.safetensors import read_tensors, rewrite

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_CONFIG = 16 << 20
_MAX_NUMBER = 100_000_000
_MAX_DEPTH = 1_000  # layers, blocks, stages: each is a module that is built before anything can be compared
_COPIED = (".json", ".txt", ".md", ".yaml", ".yml", "")

# Keys that make the libraries fetch or run something.
_CODE_KEYS = ("auto_map", "custom_pipelines", "custom_pipeline", "trust_remote_code", "kernel_config")
_FETCHING_KEYS = ("use_pretrained_backbone", "pretrained", "checkpoint_path", "cache_dir", "hf_hub_id")
# Keys whose value is a name that the libraries would look up on a hub if it had a slash or a colon in it.
_NAME_KEYS = ("architecture", "backbone", "model_name", "attn_implementation", "_attn_implementation")


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON configuration and refuse what would run code, fetch something or build without bound.

    Raises:
        ModelError: Not JSON, too large, or with absurd numbers.
        UnsafeError: It names code to run or things to fetch.
    """
    source = open_source(path)
    if source.size > _MAX_CONFIG:
        raise ModelError(f"{path} takes {source.size} bytes, at most {_MAX_CONFIG} are read", "Check the file")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({one_line(error)})", "Download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object", "Download it again")
    for key, value in _entries(config):
        _check_entry(path, key, value)
    return config


def peek(folder: Path) -> dict[str, Any]:
    """``config.json`` without any check, for choosing the reader; empty where there is none. Never raises."""
    path = folder / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG:
            return {}
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        # What timm says about where the weights once came from: never followed, since nothing is built from it here.
        if key == "pretrained_cfg":
            continue
        if isinstance(value, dict):
            yield from _entries(value)
        for item in value if isinstance(value, list) else [value]:
            yield key, item


def _check_entry(path: Path, key: str, value: Any) -> None:
    if key in _CODE_KEYS and value:
        raise UnsafeError(
            f"{path}: {key} names code to run ({one_line(ValueError(value), 80)})",
            "Models with custom code are refused",
        )
    if key in _FETCHING_KEYS and value:
        raise UnsafeError(f"{path}: {key} would fetch another model", "Remove it if the weights are in the folder")
    if key == "quantization_config" and value:
        raise ModelError(f"{path}: the model is quantised", "Give the float weights")
    if key in _NAME_KEYS and isinstance(value, str) and set(value) & set("/:\\"):
        raise UnsafeError(
            f"{path}: {key} {value[:60]!r} would be looked up on a hub", "Models with custom code are refused"
        )
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise ModelError(f"{path}: {key} is {value:.3g}, which no model needs", "The file is damaged or hostile")
    if isinstance(value, int) and value > _MAX_DEPTH and any(p in key for p in ("depth", "layers", "blocks", "stages")):
        raise ModelError(f"{path}: {key} is {value}, at most {_MAX_DEPTH} are built", "The file is damaged or hostile")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, one or several shards.

    Raises:
        ModelError: There are none, or the index is damaged.
    """
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
        has = f" (it has {', '.join(others[:3])})" if others else ""
        raise ModelError(
            f"{folder} has no {WEIGHTS}{has}", "Only safetensors are read from folders: convert the weights"
        )
    index = read_config(folder / INDEX).get("weight_map")
    names = sorted(set(index.values())) if isinstance(index, dict) and _all_text(index.values()) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"{folder / INDEX} is damaged", "Download it again")
    return tuple(folder / name for name in names)


def _all_text(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def headers(files: tuple[Path, ...]) -> dict[str, TensorRange]:
    """Checked headers of all shards together.

    Raises:
        ModelError: A file is missing or damaged.
    """
    return {key: place for path in files for key, place in safetensors_header(open_source(path)).items()}


def tensors(files: tuple[Path, ...]) -> dict[str, Tensor]:
    """All tensors of all shards.

    Raises:
        ModelError: A file is missing or damaged.
    """
    return {key: value for path in files for key, value in read_tensors(open_source(path)).items()}


@dataclass(frozen=True)
class FolderOrigin:
    """The same folder with other weights.

    Attributes:
        path: The folder that was read.
        hashes: SHA-256 of each weight file then.
        names: Key in the files to key in the network, where the library that built it did not rename them.
    """

    path: Path
    hashes: dict[str, str]
    names: dict[str, str]

    def values(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's tensors under the keys of the files."""
        state = network.state_dict()
        return {key: state[name] for key, name in self.names.items() if name in state}

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        target = folder / file_name(self.path.resolve(), name)
        if target.exists() and (not target.is_dir() or target.samefile(self.path)):
            raise ModelError(f"{target} is the original model or a file", "Write to another folder")
        files = weight_files(self.path)
        if {path.name: sha256(path) for path in files} != self.hashes:
            raise ModelError(f"{self.path} changed since it was read", "Read it again before writing it back")
        values = self.values(network)
        lost = [key for key, place in headers(files).items() if key not in values and "F" in place.dtype]
        if lost:
            raise ModelError(f"the changed network lacks {', '.join(lost[:4])}", "Write back the same structure")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.") as part:
            made = Path(part) / "model"
            made.mkdir()
            for path in self.path.iterdir():
                if path.is_file() and path.suffix in _COPIED and path.stat().st_size <= _MAX_CONFIG:
                    shutil.copyfile(path, made / path.name)
            for path in files:
                keys = safetensors_header(open_source(path)).keys()
                rewrite(path, made / path.name, {key: values[key] for key in keys if key in values})
            _move(made, target)
        return target


def _move(made: Path, target: Path) -> None:
    """Into place in one step; over an earlier result, file by file, the weights last."""
    if not target.exists():
        os.rename(made, target)
        return
    for path in sorted(made.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        os.replace(path, target / path.name)


def pair(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a configuration as tuples; empty where they are absent.

    Raises:
        ModelError: They are no positive numbers of equal count.
    """
    if mean is None or std is None:
        return (), ()
    both = tuple(tuple(v) if isinstance(v, list) else (v,) for v in (mean, std))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for values in both for v in values)
    if not numbers or len(both[0]) != len(both[1]) or not both[0] or min(both[1]) <= 0:
        raise ModelError(f"the configuration has mean {mean} and std {std}", "Correct it or give --mean and --std")
    return tuple(float(v) for v in both[0]), tuple(float(v) for v in both[1])
