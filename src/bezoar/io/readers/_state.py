"""From named tensors to a network: prefixes, architecture, and one error for everything that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bezoar.core.errors import ModelError
from bezoar.io import arch
from bezoar.io.arch import Architecture, Plan, Shape
from bezoar.io.readers._base import Options, as_float32

_WRAPPERS = ("module", "_orig_mod")  # DataParallel and torch.compile
# Entries that training tools add or leave out and that the outputs do not depend on.
_BOOKKEEPING = ("num_batches_tracked", "total_ops", "total_params")
_SHOWN = 4


@dataclass(frozen=True)
class Built:
    """A network that holds the weights.

    Attributes:
        network: float32, CPU, eval mode.
        architecture: What it was built from.
        plan: Number of classes, channels and size that were found.
        names: Key in the file to key in the network.
        warnings: What the user should know.
    """

    network: nn.Module
    architecture: Architecture
    plan: Plan
    names: dict[str, str]
    warnings: tuple[str, ...]


def build(state: Mapping[str, Tensor], options: Options, where: str) -> Built:
    """Build the architecture and fill it with the weights.

    Args:
        state: The file's tensors by their keys in the file.
        options: Architecture, classes, channels and size, as far as the user said them.
        where: The file, for messages.

    Raises:
        ModelError: No architecture, keys or shapes that do not fit, or values that are not finite.
        MissingExtra: The library of the architecture is not installed.
    """
    if options.arch is None:
        architecture = _choose(_shapes(state), options, where)
        note = f"no --arch was given; keys and shapes fit {architecture.name} alone, so it was used"
        built = build_as(architecture, state, options, where)
        return replace(built, warnings=(note, *built.warnings))
    return build_as(arch.resolve(options.arch), state, options, where)


def build_as(architecture: Architecture, state: Mapping[str, Tensor], options: Options, where: str) -> Built:
    """:func:`build` with the architecture already found.

    Raises:
        ModelError: Keys or shapes that do not fit, or values that are not finite.
    """
    check_tensors(state, where)
    shapes = _shapes(state)
    names, found = _fit(architecture, shapes, options)
    problems = _problems(shapes, names, found, architecture.name)
    if problems:
        raise ModelError(f"{where} does not fit {architecture.name}: {problems}", _advice(shapes, options))
    check_finite(state, where)
    network = as_float32(architecture.build(found.num_classes, found.channels, found.size))
    targets = network.state_dict()
    with torch.no_grad():
        for key, name in names.items():
            if name in targets:
                targets[name].copy_(state[key])
    warnings: tuple[str, ...] = ()
    if architecture.mean and options.mean is None:
        warnings = (
            f"no normalisation was applied; {architecture.name} is usually trained with "
            f"--mean {_comma(architecture.mean)} --std {_comma(architecture.std)}",
        )
    return Built(network, architecture, found, names, warnings)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _comma(values: Iterable[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def check_tensors(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that plain layers cannot take.

    Raises:
        ModelError: Sparse, quantised, complex or meta tensors.
    """
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type == "meta":
            kind = "quantised" if value.is_quantized else f"{value.layout}, {value.dtype}, on {value.device}"
            raise ModelError(f"{where}: {key} is not a plain tensor ({kind})", "Export the float weights")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ModelError: NaN or Inf; names the first few tensors.
    """
    bad = []
    for key, value in state.items():
        # float8 knows no isfinite
        number = value.float() if value.is_floating_point() and value.element_size() == 1 else value
        if number.is_floating_point() and not bool(torch.isfinite(number).all()):
            bad.append(key)
    if bad:
        raise ModelError(
            f"{where}: NaN or Inf in {listing(bad)}", "The training diverged or the file is damaged: get another copy"
        )


def listing(names: Sequence[str], shown: int = _SHOWN) -> str:
    """The first few names, and how many there are."""
    cut = [name if len(name) <= 80 else f"{name[:77]}..." for name in names[:shown]]
    more = f", ... ({len(names)} in all)" if len(names) > shown else ""
    return ", ".join(cut) + more


def changed(network: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's tensors under the keys of the file that it was read from.

    Raises:
        ModelError: The network lost a tensor.
    """
    state = network.state_dict()
    missing = [name for name in names.values() if name not in state and not name.endswith(_BOOKKEEPING)]
    if missing:
        raise ModelError(f"the changed network lacks {listing(missing)}", "Write back a network of the same structure")
    return {key: state[name] for key, name in names.items() if name in state}


def match_names(keys: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Rename the keys of a file to those of a network.

    Tried are the keys as they are, without ``module.`` and ``_orig_mod.`` anywhere, and without the prefixes that all
    of them share; the renaming with most hits wins, the smallest change among equals.
    """
    wanted, plain = set(wanted), {key: key for key in keys}
    tries = [plain]
    bare = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in plain}
    for start in (plain, bare):
        current = start
        tries.append(current)
        while (stripped := _without_prefix(current)) is not None:
            current = stripped
            tries.append(current)
    tries = [names for names in tries if len(set(names.values())) == len(names)]
    return max(tries, key=lambda names: len(wanted.intersection(names.values())))


def _without_prefix(names: Mapping[str, str]) -> dict[str, str] | None:
    first = next(iter(names.values()), "").partition(".")[0] + "."
    if not all(name.startswith(first) and len(name) > len(first) for name in names.values()) or not names:
        return None
    return {key: name.removeprefix(first) for key, name in names.items()}


def _fit(architecture: Architecture, shapes: Mapping[str, Shape], options: Options) -> tuple[dict[str, str], Plan]:
    fixed = Plan(options.num_classes, options.channels, options.size, {})
    # Any numbers will do for the names of the layers; a user's function may insist on getting some.
    wanted = architecture.shapes(options.num_classes or 10, options.channels or 3, options.size)
    names = match_names(shapes, wanted)
    found = arch.plan(architecture, {names[key]: shape for key, shape in shapes.items()}, fixed)
    return names, found


def _problems(shapes: Mapping[str, Shape], names: Mapping[str, str], found: Plan, name: str) -> str:
    given = {names[key]: shape for key, shape in shapes.items()}
    missing = [key for key in found.shapes if key not in given and not key.endswith(_BOOKKEEPING)]
    unexpected = [key for key in given if key not in found.shapes and not key.endswith(_BOOKKEEPING)]
    wrong = [
        f"{key} ({_times(shape)} in the file, {_times(found.shapes[key])} in {name})"
        for key, shape in given.items()
        if key in found.shapes and shape != found.shapes[key]
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    return "; ".join(f"{what}: {listing(keys)}" for what, keys in parts if keys)


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "one number"


def _advice(shapes: Mapping[str, Shape], options: Options) -> str:
    fitting = [] if options.arch is None else _candidates(shapes, options, skip=options.arch)
    if fitting:
        return f"It does fit --arch {' or '.join(fitting)}"
    free = Options(arch=options.arch)
    if options.arch is not None and (options.num_classes, options.channels, options.size) != (None, None, None):
        names, other = _fit(arch.resolve(options.arch), shapes, free)
        if not _problems(shapes, names, other, options.arch):
            said = [f"--num-classes {other.num_classes}", f"--channels {other.channels}"]
            return f"The weights themselves say {' '.join(said)}: leave the option out"
    return "Check --arch, --num-classes, --channels and --size against the code the model was trained with"


def _choose(shapes: Mapping[str, Shape], options: Options, where: str) -> Architecture:
    """The one reference net that takes all the weights; an error that helps where there is none or more than one."""
    fitting = _candidates(shapes, options)
    if len(fitting) == 1:
        return arch.resolve(fitting[0])
    if fitting:
        raise ModelError(f"{where} fits more than one architecture", f"Give --arch {' or '.join(fitting)}")
    layers = [f"{key} {_times(shape)}" for key, shape in shapes.items()]
    raise ModelError(
        f"{where} holds weights but not the architecture, and no reference net fits. It has {listing(layers, 8)}",
        "Give --arch: a reference net, timm/NAME, torchvision/NAME or path/file.py:function",
    )


def _candidates(shapes: Mapping[str, Shape], options: Options, skip: str = "") -> list[str]:
    fitting = []
    for name in arch.reference_names():
        if name == skip:
            continue
        architecture = arch.resolve(name)
        try:
            if _far_off(architecture, shapes, options):
                continue
            names, found = _fit(architecture, shapes, options)
        except ModelError:
            continue
        if not _problems(shapes, names, found, name):
            fitting.append(name)
    return fitting


def _far_off(architecture: Architecture, shapes: Mapping[str, Shape], options: Options) -> bool:
    """Whether one build is enough to see that the weights are of another net: spares most of the work."""
    wanted = architecture.shapes(options.num_classes, options.channels, options.size)
    names = match_names(shapes, wanted)
    strange = sum(names[key] not in wanted for key in shapes)
    # The labels, the channels and the size change few tensors; another width changes them all.
    differ = sum(wanted.get(names[key], shape) != shape for key, shape in shapes.items())
    return strange > _SHOWN or differ > 2 * _SHOWN
