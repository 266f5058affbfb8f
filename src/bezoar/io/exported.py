"""Modules written as ONNX and as ``torch.export`` programs, and checked against PyTorch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import BezoarError, ModelError
from bezoar.core.results import write_atomic
from bezoar.io.extras import one_line, require

_TOLERANCE = 1e-4  # relative to the largest answer
_EMBED = 1 << 30  # bytes of weights that go into the ONNX file itself: protobuf cannot hold 2 GB


def export_program(module: nn.Module, x: Tensor) -> Any:
    """A ``torch.export`` program that takes any number of images.

    Args:
        module: In eval mode, on the CPU.
        x: ``(B, C, H, W)`` at least two images.

    Raises:
        ModelError: It cannot be exported.
    """
    with _quiet(), explained("the model cannot be exported with torch.export"), torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_program(program: Any, module: nn.Module, x: Tensor, path: Path) -> float:
    """Write a program as ``.pt2``; give how far its answers are from those of the module at most.

    Opening such a file runs ``torch.load`` without restriction, so open only your own.

    Raises:
        ModelError: The answers differ.
    """
    with torch.no_grad():
        found = _difference(program.module()(x), module(x), path)
    with _quiet(), explained("the program cannot be written"), tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "program.pt2"
        torch.export.save(program, kept)
        write_atomic(path, kept.read_bytes())
    return found


def write_onnx(program: Any, module: nn.Module, x: Tensor, path: Path, names: Sequence[str]) -> float:
    """Write a program as ONNX; give how far the answers of ONNX Runtime are from those of the module at most.

    Args:
        program: See :func:`export_program`.
        module, x: What it is checked with.
        path: Where to.
        names: Names of the outputs; the input is ``image``.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is missing.
        ModelError: It cannot be exported, or the answers differ.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        require(library, "onnx")
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    if size > _EMBED:
        raise ModelError(f"the model has {size >> 20} MiB of weights", "Export it with torch.export instead: --program")
    with _quiet(), explained("the model cannot be exported as ONNX"), tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "model.onnx"
        torch.onnx.export(
            program, (), kept, dynamo=True, external_data=False, input_names=["image"], output_names=list(names),
            verbose=False,
        )  # fmt: skip
        content = kept.read_bytes()
    with torch.no_grad():
        found = _difference(run_onnx(content, x), module(x), path)
    write_atomic(path, content)
    return found


def run_onnx(model: bytes | Path, x: Tensor) -> tuple[Tensor, ...]:
    """All outputs of a model in ONNX Runtime, which the one input ``x`` goes into."""
    return OnnxSession(model)(x)


class OnnxSession:
    """A model in ONNX Runtime, with one thread unless told otherwise.

    Args:
        model: The file, or what is in it.
        threads: CPU threads.
    """

    def __init__(self, model: bytes | Path, threads: int = 1) -> None:
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 3
        content = model if isinstance(model, bytes) else str(model)
        with explained("ONNX Runtime cannot open the model"):
            self.session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """All outputs."""
        name = self.session.get_inputs()[0].name
        with explained("ONNX Runtime cannot run the model"):
            return tuple(torch.as_tensor(out) for out in self.session.run(None, {name: x.cpu().numpy()}))


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor], path: Path) -> float:
    """Largest difference of the outputs that are no flags; flags hang on a threshold."""
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if w.is_floating_point()]
    most = max(float((f.double() - w.double()).abs().max()) for f, w in pairs)
    scale = max(1.0, max(float(w.abs().max()) for _, w in pairs))
    if not most <= _TOLERANCE * scale:
        raise ModelError(f"{path.name} answers differently from PyTorch, by up to {most:.2g}", "It was not written")
    return most


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises into a ModelError of one line."""
    try:
        yield
    except BezoarError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {one_line(error)}", "It stays usable from Python, with bezoar.load_guard") from None


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
