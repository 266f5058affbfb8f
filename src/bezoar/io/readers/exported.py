"""Programs of ``torch.export`` (.pt2): their loader unpickles without limits, so they count as code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bezoar.core.errors import ModelError, UnsafeError
from bezoar.io.containers import Source, check_zip, replace_when_done, sha256
from bezoar.io.extras import one_line
from bezoar.io.readers import _state
from bezoar.io.readers._base import Loaded, Options, check_target, file_name

_SIGNS = ("/archive_format", "serialized_exported_program.json")


class _ExportedNetwork(nn.Module):
    """An exported program as a module; its mode was fixed when it was exported, so ``train`` changes nothing."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.graph = program.module()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - an exported graph raises here
        self.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.graph(x)
        return logits


@dataclass(frozen=True)
class _Reader:
    """A file of ``torch.export.save``."""

    def matches(self, source: Source) -> bool:
        return any(name.endswith(_SIGNS) for name in source.zip_names)

    def read(self, source: Source, options: Options) -> Loaded:
        entries = check_zip(source)
        if not options.allow_code:
            raise UnsafeError(
                f"{source.path} is a torch.export program with {len(entries)} entries, and its loader can run code",
                "Ask for its state dict or a safetensors file; --allow-code runs whatever the file brings",
            )
        program = _open(source.path)
        _state.check_finite(program.state_dict, source.path.name)
        wrong = [key for key, value in program.state_dict.items() if value.dtype in (torch.float16, torch.bfloat16)]
        if wrong:
            raise ModelError(f"{source.path} computes in half precision ({_state.listing(wrong)})", "Export in float32")
        return Loaded(
            network=_ExportedNetwork(program).eval(),
            format="torch-export",
            arch="ExportedProgram",
            origin=_Origin(source.path, sha256(source.path)),
        )


@dataclass(frozen=True)
class _Origin:
    """The same program with other weights."""

    path: Path
    sha256: str

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        target = folder / file_name(self.path, name)
        check_target(self.path, self.sha256, target)
        program = _open(self.path)
        names = {key: f"graph.{key}" for key in program.state_dict}
        with torch.no_grad():
            for key, value in _state.changed(network, names).items():
                program.state_dict[key].copy_(value)
        with replace_when_done(target) as part, part.open("wb") as file:
            torch.export.save(program, file)
        return target


def _open(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.export.load(file)
    except Exception as error:
        raise ModelError(f"{path}: torch cannot read it ({one_line(error)})", "Get another copy") from None


READER = _Reader()
