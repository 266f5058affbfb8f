"""Weights in a safetensors file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bezoar.core.errors import ModelError
from bezoar.io.containers import (
    Source,
    looks_like_safetensors,
    open_source,
    replace_when_done,
    safetensors_header,
    sha256,
)
from bezoar.io.extras import one_line
from bezoar.io.readers import _state
from bezoar.io.readers._base import Loaded, Options, check_target, file_name


@dataclass(frozen=True)
class _Reader:
    """A state dict as safetensors, with the architecture given by the user."""

    def matches(self, source: Source) -> bool:
        return looks_like_safetensors(source)

    def read(self, source: Source, options: Options) -> Loaded:
        state = read_tensors(source)
        if not state:
            raise ModelError(f"{source.path} holds no tensors", "Get another copy")
        built = _state.build(state, options, source.path.name)
        return Loaded(
            network=built.network,
            format="safetensors",
            arch=built.architecture.name,
            origin=_Origin(source.path, sha256(source.path), built.names),
            size=built.plan.size,
            channels=built.plan.channels,
            warnings=built.warnings,
        )


@dataclass(frozen=True)
class _Origin:
    """The same header, keys, dtypes and metadata with other values.

    Attributes:
        path: The file that was read.
        sha256: Its hash then.
        names: Key in the file to key in the network.
    """

    path: Path
    sha256: str
    names: dict[str, str]

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        target = folder / file_name(self.path, name)
        check_target(self.path, self.sha256, target)
        rewrite(self.path, target, _state.changed(network, self.names))
        return target


def read_tensors(source: Source) -> dict[str, Tensor]:
    """Check the header, then read all tensors to the CPU.

    Raises:
        ModelError: The file is damaged.
    """
    names = safetensors_header(source)
    try:
        with safe_open(source.path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{source.path}: damaged safetensors file ({one_line(error)})", "Download it again") from None


def rewrite(path: Path, target: Path, values: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file and put other values in the same places, in the same dtypes.

    Raises:
        ModelError: A value has another shape than the tensor it replaces.
    """
    ranges = safetensors_header(open_source(path))
    with safe_open(path, framework="pt", device="cpu") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in values}
    with replace_when_done(target) as part:
        shutil.copyfile(path, part)
        with part.open("r+b") as out:
            for name, value in values.items():
                place = ranges[name]
                if tuple(value.shape) != place.shape:
                    raise ModelError(f"{name} changed its shape from {place.shape} to {tuple(value.shape)}")
                flat = value.detach().cpu().to(dtypes[name]).contiguous().view(-1)
                out.seek(place.start)
                out.write(flat.view(torch.uint8).numpy().tobytes())


READER = _Reader()
