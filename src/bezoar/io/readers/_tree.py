"""Where the weights stand in what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bezoar.core.errors import ModelError
from bezoar.io.readers._allowlist import plain_dict

Address = tuple[str | int, ...]

#: Usual names, the most telling first.
_NAMES = ("state_dict", "model_state_dict", "model_state", "model", "net", "netC", "network", "weights", "params")
_NOT_WEIGHTS = ("optim", "sched", "scaler")
_MAX_DEPTH = 8
_MAX_VALUES = 1_000_000


@dataclass(frozen=True)
class Found:
    """Weights, or a whole module, and where they stand.

    Attributes:
        address: Keys and indices from the root.
        value: A dict whose tensors are the weights, or a module.
        count: Number of tensors; 1 for a module.
    """

    address: Address
    value: dict[str, Any] | nn.Module
    count: int

    @property
    def name(self) -> str:
        """The address as text."""
        return ".".join(map(str, self.address)) or "the root"


def find(root: Any, where: str) -> tuple[Found, tuple[str, ...]]:
    """Find the weights in a checkpoint.

    Returns:
        The best candidate (usual names first, then the most tensors), and a warning where there are several.

    Raises:
        ModelError: There are none.
    """
    found = sorted(_walk(root, (), set()), key=_rank)
    if not found:
        kind = f"a dict of {', '.join(map(str, list(root)[:6]))}" if isinstance(root, dict) else type(root).__name__
        raise ModelError(f"{where} holds no weights, but {kind[:200]}", "Give a state dict or a checkpoint with one")
    best = found[0]
    others = [other.name for other in found[1:] if other.count * 2 >= best.count]
    if not others:
        return best, ()
    return best, (f"the file holds several sets of weights; {best.name} was read, not {', '.join(others[:4])}",)


def at(root: Any, address: Address) -> Any:
    """The value at an address."""
    for key in address:
        root = root[key]
    return root


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the values."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _rank(found: Found) -> tuple[int, int]:
    last = str(found.address[-1]) if found.address else ""
    return (_NAMES.index(last) if last in _NAMES else len(_NAMES)), -found.count


def _walk(value: Any, address: Address, seen: set[int]) -> Iterator[Found]:
    if id(value) in seen or len(address) > _MAX_DEPTH or len(seen) > _MAX_VALUES:
        return
    if isinstance(value, nn.Module):
        seen.add(id(value))
        yield Found(address, value, 1)  # nothing of it is called before it was checked
    elif isinstance(value, dict) and plain_dict(value):
        seen.add(id(value))
        yield from _walk_dict(value, address, seen)
    elif isinstance(value, list | tuple) and len(value) <= 16:
        seen.add(id(value))
        for index, item in enumerate(value):
            yield from _walk(item, (*address, index), seen)


def _walk_dict(value: dict[Any, Any], address: Address, seen: set[int]) -> Iterator[Found]:
    if not all(isinstance(key, str) for key in value):
        return
    inside = tensors(value)
    if any(tensor.is_floating_point() for tensor in inside.values()):
        yield Found(address, value, len(inside))
    for key, item in value.items():
        if not any(part in key.lower() for part in _NOT_WEIGHTS):
            yield from _walk(item, (*address, key), seen)
