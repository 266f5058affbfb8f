"""Which classes a whole pickled module may be made of, and what must hold once it is open.

Layers of torch, torchvision and timm only. They are made without their constructor (the scan refuses a call of one),
so a hostile file cannot choose what a constructor does; and what could run at the first forward pass, such as a hook
or an attribute in the place of a method, is refused afterwards.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsafeError

_PACKAGES = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.")
_PARALLEL = "torch.nn.parallel.data_parallel.DataParallel"

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]


def plain_globals() -> list[SafeGlobal]:
    """Harmless values that torch's own list lacks: argparse.Namespace, and numpy's scalars and arrays.

    The scan has made sure by then that an array holds numbers, not objects.
    """
    array: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = "?bBhHiIlLqQefdFD"
    return [
        argparse.Namespace,
        np.dtype,
        np.ndarray,
        (array, "numpy.core.multiarray._reconstruct"),
        (array, "numpy._core.multiarray._reconstruct"),
        *{type(np.dtype(kind)) for kind in kinds},
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def module_class(path: str) -> type[nn.Module] | None:
    """The layer of torch, torchvision or timm behind a dotted name, or None for anything else."""
    module, _, name = path.rpartition(".")
    if path != _PARALLEL and not f"{module}.".startswith(_PACKAGES):
        return None
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(module), name, None)
    except Exception:  # not installed, or its import fails: the class cannot be had, so it is not allowed
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def split(names: Iterable[str]) -> tuple[dict[str, type[nn.Module]], list[str]]:
    """Divide dotted names into classes of layers and the rest."""
    classes: dict[str, type[nn.Module]] = {}
    rest = []
    for name in sorted(names):
        found = module_class(name)
        if found is None:
            rest.append(name)
        else:
            classes[name] = found
    return classes, rest


def check_tree(root: nn.Module, where: str) -> None:
    """Refuse an opened module whose forward pass would do more than its classes do.

    Raises:
        UnsafeError: A hook, an attribute in the place of a method, or a child that is not a layer.
    """
    waiting, seen = [root], {id(root)}
    while waiting:
        module = waiting.pop()
        reason = _reason(module)
        if reason:
            raise UnsafeError(
                f"{where}: a layer ({type(module).__name__}) {reason}",
                "Ask for the state dict, or open it with --allow-code if you trust its author",
            )
        children = [child for child in vars(module)["_modules"].values() if child is not None and id(child) not in seen]
        seen.update(map(id, children))
        waiting.extend(children)


def _reason(module: nn.Module) -> str:
    state = vars(module)
    if not all(isinstance(key, str) for key in state):
        return "has attributes without a name"
    for key, value in state.items():
        if "_hooks" in key and value:
            return f"carries {key.strip('_').replace('_', ' ')}"
        if key == "_compiled_call_impl" and value is not None:
            return "replaces its own call"
        if callable(getattr(type(module), key, None)):
            return f"replaces its own {key}()"
    kinds: tuple[tuple[str, type], ...] = (("_modules", nn.Module), ("_parameters", nn.Parameter), ("_buffers", Tensor))
    for key, kind in kinds:
        items = state.get(key)
        if not isinstance(items, dict):
            return f"has no {key[1:]}"
        if not all(isinstance(k, str) and (v is None or isinstance(v, kind)) for k, v in items.items()):
            return f"has {key[1:]} that are none"
    return ""


def plain_dict(value: Any) -> bool:
    """Whether a mapping has no attributes of its own but torch's ``_metadata``."""
    return type(value) in (dict, OrderedDict) and set(getattr(value, "__dict__", ())) <= {"_metadata"}


@contextmanager
def safe_globals(extra: Mapping[str, type]) -> Iterator[None]:
    """While it is open, torch's loader accepts these classes too; afterwards its list is as it was."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([*plain_globals(), *((found, name) for name, found in extra.items())])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
