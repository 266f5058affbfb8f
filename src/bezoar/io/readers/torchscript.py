"""TorchScript archives: compiled code, opened only where the user allows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bezoar.core.errors import ModelError, UnsafeError
from bezoar.io.containers import Source, check_zip, replace_when_done, sha256
from bezoar.io.extras import one_line
from bezoar.io.readers import _state
from bezoar.io.readers._base import Loaded, Options, as_float32, check_target, file_name


@dataclass(frozen=True)
class _Reader:
    """A file of ``torch.jit.save``."""

    def matches(self, source: Source) -> bool:
        names = source.zip_names
        return any("/code/" in name for name in names) and any(name.endswith("constants.pkl") for name in names)

    def read(self, source: Source, options: Options) -> Loaded:
        code = [name for name in check_zip(source) if "/code/" in name and name.endswith(".py")]
        if not options.allow_code:
            raise UnsafeError(
                f"{source.path} is a TorchScript archive with {len(code)} files of code ({_state.listing(code)})",
                "Ask for its state dict or a safetensors file; --allow-code runs whatever the file brings",
            )
        network = _open(source.path)
        state = network.state_dict()
        _state.check_finite(state, source.path.name)
        return Loaded(
            network=as_float32(network),
            format="torchscript",
            arch=str(getattr(network, "original_name", type(network).__name__)),
            origin=_Origin(source.path, sha256(source.path)),
        )


@dataclass(frozen=True)
class _Origin:
    """The same archive with other weights."""

    path: Path
    sha256: str

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        target = folder / file_name(self.path, name)
        check_target(self.path, self.sha256, target)
        fresh = _open(self.path)
        state = fresh.state_dict()
        with torch.no_grad():
            for key, value in _state.changed(network, {key: key for key in state}).items():
                state[key].copy_(value)
        with replace_when_done(target) as part:
            torch.jit.save(fresh, str(part))
        return target


def _open(path: Path) -> Any:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ModelError(f"{path}: torch cannot read it ({one_line(error)})", "Get another copy") from None


READER = _Reader()
