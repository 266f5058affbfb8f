"""Folders of Hugging Face transformers: image classifiers as safetensors, never with code of their own."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import ModelError
from bezoar.io.arch import Size
from bezoar.io.containers import Source, sha256
from bezoar.io.extras import one_line, require
from bezoar.io.readers import _folder, _state
from bezoar.io.readers._base import Loaded, Options, as_float32

_PREPROCESSOR = "preprocessor_config.json"
_ADAPTER = "adapter_config.json"


class _Logits(nn.Module):
    """A transformers model that gives its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


@dataclass(frozen=True)
class _Reader:
    """A folder with ``config.json`` and ``model.safetensors``."""

    def matches(self, source: Source) -> bool:
        return source.is_folder and bool({"model_type", "architectures"} & _folder.peek(source.path).keys())

    def read(self, source: Source, options: Options) -> Loaded:
        folder = source.path
        config = _folder.read_config(folder / "config.json")
        if (folder / _ADAPTER).exists():  # transformers would go and load the model that it adapts
            raise ModelError(f"{folder} holds an adapter ({_ADAPTER}), not a whole model", "Merge it into its model")
        files = _folder.weight_files(folder)
        places = _folder.headers(files)
        network = _load(folder, sum(math.prod(place.shape) for place in places.values()))
        _state.check_finite(network.state_dict(), folder.name)
        prepare = _folder.read_config(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).exists() else None
        mean, std = _normalisation(prepare)
        return Loaded(
            network=as_float32(network),
            format="huggingface",
            arch=type(network).__name__,
            origin=_Origin(folder, {p.name: sha256(p) for p in files}, {key: key for key in places}),
            wrap=_Logits,
            mean=mean,
            std=std,
            size=_size(config.get("image_size")) or _prepared_size(prepare or {}),
            channels=config["num_channels"] if type(config.get("num_channels")) is int else None,
            warnings=_notes(prepare, options),
        )


@dataclass(frozen=True)
class _Origin(_folder.FolderOrigin):
    """A folder whose keys transformers may have renamed on the way in, and renames back on the way out."""

    def values(self, network: nn.Module) -> dict[str, Tensor]:
        plain = super().values(network)
        if plain.keys() == self.names.keys():
            return plain
        with tempfile.TemporaryDirectory() as part, _quiet_and_offline():
            network.save_pretrained(part)  # type: ignore[operator]
            return _folder.tensors(_folder.weight_files(Path(part)))


def _load(folder: Path, held: int) -> nn.Module:
    transformers = require("transformers", "hf")
    auto = transformers.AutoModelForImageClassification
    with _quiet_and_offline():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                empty = auto.from_config(config, trust_remote_code=False, attn_implementation="eager")
            asked = sum(value.numel() for value in empty.state_dict().values())
            if asked > 2 * held + 1_000_000:
                raise ModelError(
                    f"config.json describes {asked} weights, the files hold {held}", "They do not belong together"
                )
            with torch.random.fork_rng(devices=[]):
                network, info = auto.from_pretrained(
                    folder,
                    config=config,
                    trust_remote_code=False,
                    local_files_only=True,
                    use_safetensors=True,
                    attn_implementation="eager",
                    output_loading_info=True,
                )
        except ModelError:
            raise
        except Exception as error:
            reason = one_line(error)
            raise ModelError(
                f"{folder}: transformers cannot build it ({reason})", "Only image classifiers are read"
            ) from None
    _complete(folder, info)
    return network  # type: ignore[no-any-return]


def _complete(folder: Path, info: dict[str, Any]) -> None:
    kinds = (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("wrong shape", "mismatched_keys"))
    parts = [f"{what}: {_state.listing(sorted(map(str, info[key])))}" for what, key in kinds if info.get(key)]
    if parts:
        raise ModelError(f"{folder}: weights and config.json differ; {'; '.join(parts)}", "Get both from one place")


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No progress bars, no load reports, and no request whatever a configuration asks for."""
    logging = require("transformers.utils.logging", "hf")
    constants: Any = require("huggingface_hub.constants", "hf")
    before = logging.get_verbosity(), constants.HF_HUB_OFFLINE, logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before[0])
        constants.HF_HUB_OFFLINE = before[1]
        if before[2]:
            logging.enable_progress_bar()


def _normalisation(prepare: dict[str, Any] | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for inputs in [0, 1], from a preprocessor that may take 0 to 255 and scale by its own factor."""
    if prepare is None:
        return (), ()
    factor = prepare.get("rescale_factor", 1 / 255) if prepare.get("do_rescale", True) else 1.0
    if not isinstance(factor, int | float) or factor <= 0:
        raise ModelError(f"{_PREPROCESSOR} has rescale_factor {factor}", "Correct it or give --mean and --std")
    scale = 255 * factor
    if not prepare.get("do_normalize", True):
        return ((), ()) if abs(scale - 1) < 1e-6 else ((0.0,), (1 / scale,))
    mean, std = _folder.pair(prepare.get("image_mean"), prepare.get("image_std"))
    if abs(scale - 1) < 1e-6:
        return mean, std
    return tuple(v / scale for v in mean), tuple(v / scale for v in std)


def _size(value: Any) -> Size | None:
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    return (sides[0], sides[1]) if all(type(n) is int and 0 < n <= 4096 for n in sides) else None


def _prepared_size(prepare: dict[str, Any]) -> Size | None:
    for key in ("crop_size", "size"):
        size = prepare.get(key)
        if isinstance(size, dict):
            size = [size["height"], size["width"]] if {"height", "width"} <= size.keys() else size.get("shortest_edge")
        if _size(size) is not None:
            return _size(size)
    return None


def _notes(prepare: dict[str, Any] | None, options: Options) -> tuple[str, ...]:
    notes = []
    if prepare is None and options.mean is None:
        notes.append(f"the folder has no {_PREPROCESSOR}; give --mean and --std if the model was trained with them")
    if options.arch:
        notes.append("--arch was ignored: the folder names its architecture")
    return tuple(notes)


READER = _Reader()
