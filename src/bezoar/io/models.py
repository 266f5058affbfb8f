"""Reading models of any format, and writing cleaned weights back in the form that was read."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bezoar.core.errors import BezoarError, ModelError, SettingError
from bezoar.core.model import Logits, Normalized, Suspect
from bezoar.core.results import ModelFacts
from bezoar.io import readers
from bezoar.io.arch import COMMON_SIZES, MAX_CHANNELS, Size
from bezoar.io.containers import Source, explain_unknown, open_source, replace_when_done, sha256
from bezoar.io.extras import one_line, printable
from bezoar.io.readers import _folder
from bezoar.io.readers._base import Loaded, Options, Reader


def load_model(
    source: str | Path | nn.Module,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    size: int | Size | None = None,
    channels: int | None = None,
    allow_code: bool = False,
) -> Suspect:
    """Open a model without running code that came with it.

    Args:
        source: A file, a folder, or a module. A module is neither copied nor moved, but switched to eval mode.
        arch: Architecture of a bare state dict: a reference net, ``timm/NAME``, ``torchvision/NAME`` or
            ``path/file.py:function``.
        num_classes: Number of labels, found in the weights by default.
        mean, std: Normalisation, one value per channel or one for all; the model's own configuration by default.
        size: Height and width of the input, in pixels.
        channels: Colour channels of the input.
        allow_code: Also open formats that bring code, and run it.

    Returns:
        The model, in eval mode; from a file also float32 and on the CPU.

    Raises:
        ModelError: The file is damaged, hostile or does not fit the architecture.
        UnsafeError: Opening it would run code that came with it.
        MissingExtra: An optional library is missing or broken.
        SettingError: A setting is out of range.
    """
    options = _options(arch, num_classes, mean, std, size, channels, allow_code)
    try:
        if isinstance(source, nn.Module):
            return _assemble(_from_python(source), options, type(source).__name__, _hash_state(source))
        opened = open_source(Path(source).expanduser())
        loaded = _pick(opened).read(opened, options)
        return _assemble(loaded, options, str(source), hash_source(opened))
    except BezoarError as error:
        raise type(error)(printable(error.message), printable(error.hint)) from error.__cause__


def save_model(suspect: Suspect, network: nn.Module, folder: Path, name: str | None = None) -> Path:
    """Write changed weights in the format, container, nesting, keys and dtypes that were read.

    Args:
        suspect: What :func:`load_model` gave.
        network: The changed ``suspect.network``.
        folder: Where to write; made if missing.
        name: Name of the file or folder; that of the original by default.

    Returns:
        The file or folder that was written; it appears under its name only when it is complete.

    Raises:
        ModelError: The original changed or is gone, the network has another structure, or the disk refuses.
    """
    if suspect.origin is None:
        raise ModelError("this model cannot be written back", "Load it with load_model")
    try:
        return suspect.origin.write(network, Path(folder), name)
    except OSError as error:
        raise ModelError(f"cannot write to {folder}: {one_line(error)}", "Choose another folder") from None


@cache
def all_readers() -> tuple[Reader, ...]:
    """One reader per module in ``bezoar.io.readers``."""
    names = sorted(found.name for found in pkgutil.iter_modules(readers.__path__) if not found.name.startswith("_"))
    return tuple(importlib.import_module(f"{readers.__name__}.{name}").READER for name in names)


def _pick(source: Source) -> Reader:
    for reader in all_readers():
        if reader.matches(source):
            return reader
    raise explain_unknown(source)


def _options(
    arch: str | None,
    num_classes: int | None,
    mean: Sequence[float] | float | None,
    std: Sequence[float] | float | None,
    size: int | Size | None,
    channels: int | None,
    allow_code: bool,
) -> Options:
    square = (size, size) if isinstance(size, int) else size
    for name, value, least in (("num_classes", num_classes, 2), ("channels", channels, 1)):
        if value is not None and value < least:
            raise SettingError(f"{name} must be at least {least}, got {value}")
    if square is not None and (len(square) != 2 or not all(1 <= side <= 4096 for side in square)):
        raise SettingError(f"size must be between 1 and 4096 pixels, got {size}")
    if (mean is None) != (std is None):
        raise SettingError("mean and std belong together, one of them is missing", "Give both --mean and --std")
    return Options(
        arch=arch,
        num_classes=num_classes,
        mean=_values(mean),
        std=_values(std),
        size=square,
        channels=channels,
        allow_code=allow_code,
    )


def _values(given: Sequence[float] | float | None) -> tuple[float, ...] | None:
    if given is None:
        return None
    return (float(given),) if isinstance(given, int | float) else tuple(float(value) for value in given)


def _from_python(module: nn.Module) -> Loaded:
    return Loaded(
        network=module.eval(), format="module", arch=type(module).__name__, origin=_ModuleOrigin(), wrap=Logits
    )


class _ModuleOrigin:
    """A module given in Python has no file to go back to: its state dict is written as safetensors."""

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        target = folder / (name or f"{type(network).__name__}.safetensors")
        # clone: safetensors refuses tensors that share memory
        state = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
        with replace_when_done(target) as part:
            save_file(state, part)
        return target


def _assemble(loaded: Loaded, options: Options, path: str, digest: str) -> Suspect:
    """Put the normalisation in front, find input size and number of labels with a dry run, and state the facts."""
    body = loaded.wrap(loaded.network) if loaded.wrap is not None else loaded.network
    channels = options.channels or loaded.channels or _input_channels(loaded.network) or 3
    mean, std = (loaded.mean, loaded.std) if options.mean is None else (options.mean, options.std or ())
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    if mean and len(mean) != channels:
        raise SettingError(f"mean has {len(mean)} values, the model takes {channels} channels", "Give one per channel")
    module = Normalized(body, mean, std) if mean else body
    module.training = False
    sizes = _sizes(options, loaded)
    size, labels = _dry_run(module, channels, sizes, loaded.arch)
    if options.num_classes is not None and options.num_classes != labels:
        raise ModelError(f"the model has {labels} labels, not {options.num_classes}", "Leave --num-classes out")
    facts = ModelFacts(
        path=path,
        format=loaded.format,
        sha256=digest,
        arch=printable(loaded.arch),
        parameters=sum(parameter.numel() for parameter in loaded.network.parameters()),
        num_classes=labels,
        channels=channels,
        height=size[0],
        width=size[1],
        mean=mean,
        std=std,
    )
    return Suspect(module, loaded.network, facts, loaded.origin, tuple(map(printable, loaded.warnings)))


def _sizes(options: Options, loaded: Loaded) -> list[Size]:
    if options.size is not None:
        return [options.size]
    return list(dict.fromkeys((*([loaded.size] if loaded.size else []), *COMMON_SIZES)))


def _dry_run(module: nn.Module, channels: int, sizes: Iterable[Size], arch: str) -> tuple[Size, int]:
    """Find the first size that works, and the number of outputs."""
    anchor = next(module.parameters(), torch.empty(0))
    reasons = []
    for height, width in sizes:
        x = torch.full((2, channels, height, width), 0.5, device=anchor.device, dtype=anchor.dtype)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = module(x)
        except Exception as error:  # a stranger's module raises anything
            reasons.append(f"{height}x{width}: {one_line(error, 120)}")
            continue
        return (height, width), _labels(out, arch)
    raise ModelError(
        f"{arch} fails on inputs of {channels} channels ({reasons[0]})",
        "Give --size and --channels as the model was trained with",
    )


def _labels(out: object, arch: str) -> int:
    if not isinstance(out, Tensor):
        raise ModelError(f"{arch} gives {type(out).__name__}, not logits", "Wrap it so that it gives one tensor")
    if out.ndim != 2 or out.shape[0] != 2 or out.shape[1] < 2:
        raise ModelError(
            f"{arch} gives shape {tuple(out.shape)} for 2 images; (2, labels) with at least 2 labels is needed",
            "Only image classifiers can be scanned",
        )
    if not bool(torch.isfinite(out).all()):
        raise ModelError(f"{arch} gives NaN or Inf for a grey image", "Check the weights and --mean/--std")
    return int(out.shape[1])


def _input_channels(network: nn.Module) -> int | None:
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))
    first = next(convolutions, None)
    channels = getattr(first, "in_channels", None)
    return channels if isinstance(channels, int) and 0 < channels <= MAX_CHANNELS else None


def _hash_state(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_source(source: Source) -> str:
    """SHA-256 of a model file; of a folder that of its weights and configuration."""
    if not source.is_folder:
        return sha256(source.path)
    digest = hashlib.sha256()
    for path in (*_folder.weight_files(source.path), source.path / "config.json"):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()
