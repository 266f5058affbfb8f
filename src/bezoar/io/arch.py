"""Architectures by name: reference nets, ``timm/NAME``, ``torchvision/NAME`` and ``path/file.py:function``."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bezoar.core.errors import BezoarError, ModelError
from bezoar.io.extras import one_line, require
from bezoar.nets import registry

Shape = tuple[int, ...]
Size = tuple[int, int]

#: Input sizes tried where neither the user nor the architecture says one, most common first.
COMMON_SIZES: tuple[Size, ...] = ((32, 32), (28, 28), (64, 64), (224, 224), (48, 48), (96, 96), (128, 128), (299, 299))

MAX_CLASSES = 1_000_000  # bounds what a crafted file can make an architecture allocate
MAX_CHANNELS = 1_024

_WRN = tuple(f"wrn-{depth}-{width}" for depth in (10, 16, 22, 28, 34, 40) for width in (1, 2, 4, 8, 10))
_VGG = tuple(f"vgg-{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "-bn"))
_THIN = tuple(f"resnet-{depth}" for depth in (20, 32, 44, 56, 110))


@dataclass(frozen=True)
class Architecture:
    """A network that can be built.

    Attributes:
        name: As the user wrote it.
        make: Builds it from (num_classes, channels, size); None stands for the architecture's own default.
        size: Natural input size (height, width), where it has one.
        mean, std: Normalisation that is usual for it; not applied, since the weights may have been trained otherwise.
    """

    name: str
    make: Callable[[int | None, int | None, Size | None], nn.Module]
    size: Size | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def build(self, num_classes: int | None, channels: int | None, size: Size | None) -> nn.Module:
        """Build it on the CPU without touching the global random state.

        Raises:
            ModelError: The architecture cannot be built with these numbers.
        """
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network = self.make(num_classes, channels, size)
        except BezoarError:
            raise
        except Exception as error:  # the user's code and other libraries raise anything
            raise ModelError(f"{self.name} cannot be built: {one_line(error)}", "Check --arch and --size") from error
        if not isinstance(network, nn.Module):
            raise ModelError(f"{self.name} gave {type(network).__name__}, not a torch.nn.Module")
        return network

    def shapes(self, num_classes: int | None, channels: int | None, size: Size | None) -> dict[str, Shape]:
        """Shape of each tensor of its state dict, found without memory where the architecture allows it."""
        return _shapes(self, num_classes, channels, size)


@lru_cache(maxsize=512)
def _shapes(
    architecture: Architecture, num_classes: int | None, channels: int | None, size: Size | None
) -> dict[str, Shape]:
    try:
        with torch.device("meta"):
            network = architecture.build(num_classes, channels, size)
    except ModelError:
        network = architecture.build(num_classes, channels, size)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@dataclass(frozen=True)
class Plan:
    """How an architecture is built so that it takes given weights: what was found, and the shapes that follow."""

    num_classes: int | None
    channels: int | None
    size: Size | None
    shapes: dict[str, Shape]


def plan(architecture: Architecture, shapes: Mapping[str, Shape], fixed: Plan) -> Plan:
    """Find number of classes, channels and size from the shapes of the weights.

    The architecture is built with two different numbers of classes: the axis that changes is where the file's own
    number stands. The same for the channels.

    Args:
        architecture: What to build.
        shapes: Those of the weights, under the architecture's names.
        fixed: What the user said; its None fields are found.

    Raises:
        ModelError: The architecture cannot be built.
    """
    first, second = 7, 11  # no network has these by accident in one build and not in the other
    size = fixed.size or architecture.size
    base = architecture.shapes(fixed.num_classes or first, fixed.channels or 3, size)
    classes, channels = fixed.num_classes, fixed.channels
    if classes is None:
        classes = _vote(shapes, base, architecture.shapes(second, channels or 3, size))
    if channels is None:
        channels = _vote(shapes, base, _try_shapes(architecture, fixed.num_classes or first, 1, size) or base)
    if (classes or 0) > MAX_CLASSES or (channels or 0) > MAX_CHANNELS:
        raise ModelError(f"the weights ask for {classes} labels and {channels} channels", "Check --arch")
    final = _try_shapes(architecture, classes, channels, size) or base
    if fixed.size is None and _differ(final, shapes):
        for other in COMMON_SIZES:
            tried = _try_shapes(architecture, classes, channels, other)
            if tried is not None and not _differ(tried, shapes):
                return Plan(classes, channels, other, tried)
    return Plan(classes, channels, size, final)


def _try_shapes(
    architecture: Architecture, num_classes: int | None, channels: int | None, size: Size | None
) -> dict[str, Shape] | None:
    try:
        return architecture.shapes(num_classes, channels, size)
    except ModelError:
        return None


def _vote(shapes: Mapping[str, Shape], one: Mapping[str, Shape], other: Mapping[str, Shape]) -> int | None:
    votes: Counter[int] = Counter()
    for key, shape in shapes.items():
        a, b = one.get(key, ()), other.get(key, ())
        axes = [i for i, (p, q) in enumerate(zip(a, b, strict=False)) if p != q]
        if len(a) == len(b) == len(shape) and len(axes) == 1 and shape[axes[0]] > 0:
            votes[shape[axes[0]]] += 1
    return votes.most_common(1)[0][0] if votes else None


def _differ(one: Mapping[str, Shape], other: Mapping[str, Shape]) -> bool:
    return any(one[key] != other[key] for key in one.keys() & other.keys())


def reference_names() -> list[str]:
    """Names of the reference nets that weights without ``--arch`` are held against."""
    return list(dict.fromkeys((*registry.names(), *_THIN, *_VGG, *_WRN)))


def resolve(name: str) -> Architecture:
    """Find an architecture.

    Args:
        name: A reference net such as ``wrn-16-1``, ``timm/NAME``, ``torchvision/NAME`` or ``path/file.py:function``.

    Raises:
        ModelError: Unknown; the hint names close matches.
        MissingExtra: The library of it is not installed.
    """
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return _from_file(name, Path(path).expanduser(), function)
    library, _, rest = name.partition("/")
    if rest and library in _LIBRARIES:
        return _LIBRARIES[library](rest)
    found = _reference(name)
    if found is None:
        raise _unknown(name, reference_names(), "reference nets; also timm/NAME, torchvision/NAME, file.py:function")
    return found


@cache
def _reference(name: str) -> Architecture | None:
    found = registry.find(name)
    if found is None:
        return None
    make, size = found
    return Architecture(name, lambda k, c, s: make(k or 10, c or 3, (s or size)[0]), size)


def _unknown(name: str, known: list[str], kind: str) -> ModelError:
    close = difflib.get_close_matches(name.lower(), known, 4, 0.5)
    hint = f"Did you mean {', '.join(close)}? " if close else ""
    return ModelError(f"unknown architecture {name!r}", f"{hint}Known: {', '.join(known[:12])}, ... ({kind})")


def _torchvision(name: str) -> Architecture:
    models = require("torchvision.models", "hf")
    if name not in models.list_models(module=models):
        raise _unknown(name, models.list_models(module=models), "classification models of torchvision")
    size = (299, 299) if name == "inception_v3" else (224, 224)
    return Architecture(
        f"torchvision/{name}",
        lambda k, _, __: models.get_model(name, weights=None, **({} if k is None else {"num_classes": k})),
        size,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )


def _timm(name: str) -> Architecture:
    timm = require("timm", "hf")
    if not timm.is_model(name):  # also keeps out hf-hub: and local-dir:, which timm would fetch
        raise _unknown(name, timm.list_models(), "models of timm")
    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model_pretrained(name) else None
    size = tuple(config.input_size[-2:]) if config is not None else (224, 224)

    def make(num_classes: int | None, channels: int | None, _: Size | None) -> nn.Module:
        given = {"num_classes": num_classes, "in_chans": channels}
        network: nn.Module = timm.create_model(
            name, pretrained=False, **{key: value for key, value in given.items() if value is not None}
        )
        return network

    mean, std = (tuple(config.mean), tuple(config.std)) if config is not None else ((), ())
    return Architecture(f"timm/{name}", make, size, mean, std)


_LIBRARIES: dict[str, Callable[[str], Architecture]] = {"timm": _timm, "torchvision": _torchvision}
# Parameter names under which other people's functions take what we know.
_CHANNEL_NAMES = ("channels", "in_channels", "in_chans", "input_channels")
_SIZE_NAMES = ("size", "image_size", "img_size", "input_size")


def _from_file(name: str, path: Path, function: str) -> Architecture:
    module = _import_file(path)
    make = getattr(module, function, None)
    if not callable(make):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        close = difflib.get_close_matches(function, known, 3) or known[:8]
        raise ModelError(f"{path} has no function {function!r}", f"It has: {', '.join(close) or 'no functions'}")
    accepted = _parameters(make)

    def build(num_classes: int | None, channels: int | None, size: Size | None) -> nn.Module:
        given: dict[str, Any] = {}
        for names, value in ((("num_classes",), num_classes), (_CHANNEL_NAMES, channels), (_SIZE_NAMES, size)):
            used = next((n for n in names if n in accepted), None)
            if used is not None and value is not None:
                given[used] = value[0] if isinstance(value, tuple) else value
        with _on_path(path.resolve().parent):
            network: nn.Module = make(**given)
        return network

    return Architecture(name, build)


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _import_file(path: Path) -> ModuleType:
    """Import the user's own file; its folder is on the path meanwhile, as it is for ``python file.py``."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "Give --arch path/file.py:function")
    name = f"_bezoar_arch_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that classes in it can be pickled and dataclasses work
    with _on_path(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ModelError(f"{path} fails on import: {one_line(error)}", "Run it with python to see why") from error
    return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
