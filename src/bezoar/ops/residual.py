"""Shortcuts of residual networks, found by watching one forward pass: where a sum joins a deep branch and a short one.

Nothing depends on names. Every operation on tensors passes a function mode, which notes how many weighted operations
lie behind each tensor and which tensors it was made of. A sum of two tensors of one shape is a join where one operand
has more weights behind it than the other one; that other one came by the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from bezoar.core.surgery import frozen

_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
#: Operations with a weight of their own, or between two computed tensors, as attention has them.
_WEIGHTED = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__),
    *(torch.bmm, Tensor.bmm, torch.einsum, nn.functional.scaled_dot_product_attention),
    nn.functional.multi_head_attention_forward,
}


@dataclass(frozen=True)
class Shortcut:
    """One shortcut.

    Attributes:
        place: Which sum of two tensors of one shape it is, in the order in which they run.
        operand: Which operand of the sum came by the shortcut: 0 or 1.
        block: Name of the innermost module inside of which the sum runs; "" is the model itself.
        layer: Name of the layer that gives the shortcut's tensor and nothing else, where it has weights to scale (the
            projection of a ResNet); None where the shortcut is the identity or has no weights.
    """

    place: int
    operand: int
    block: str
    layer: str | None


@dataclass(frozen=True)
class _Past:
    """What is known of a tensor: its number, how many weights lie behind it, and its ancestors' numbers as bits."""

    number: int
    depth: int
    ancestors: int


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.past: Any = WeakIdKeyDictionary()
        self.maker: Any = WeakIdKeyDictionary()  # the layer that gave a tensor
        self.uses: dict[int, int] = {}  # of each tensor, by number
        self.calls: dict[nn.Module, int] = {}
        self.inside: list[nn.Module] = []
        self.numbers = self.sums = 0
        self.joins: list[tuple[Shortcut, int]] = []  # with the number of the shortcut's tensor
        self._note(x, 0, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in _tensors((args, kwargs or {})) if t in self.past]
        past = [self.past[t] for t in given]
        if func in _SUMS and is_sum(args):
            self._sum(args)
            self.sums += 1
        out = func(*args, **(kwargs or {}))
        if past:
            for one in past:
                self.uses[one.number] = self.uses.get(one.number, 0) + 1
            depth = max(one.depth for one in past) + (func in _WEIGHTED)
            ancestors = 0
            for one in past:
                ancestors |= one.ancestors | (1 << one.number)
            for made in _tensors(out):
                self._note(made, depth, ancestors)
        return out

    def _note(self, tensor: Tensor, depth: int, ancestors: int) -> None:
        self.past[tensor] = _Past(self.numbers, depth, ancestors)
        self.maker.pop(tensor, None)  # where it was changed in place
        self.numbers += 1

    def _sum(self, args: Sequence[Any]) -> None:
        if not all(one in self.past for one in args[:2]):
            return
        pasts = [self.past[one] for one in args[:2]]
        if pasts[0].depth == pasts[1].depth:
            return
        operand = 0 if pasts[0].depth < pasts[1].depth else 1
        short, deep = pasts[operand], pasts[1 - operand]
        layer = self.maker.get(args[operand])
        if layer is None or deep.ancestors >> short.number & 1 or self.calls[layer] > 1:
            name = None  # the branch starts from it, or nothing to scale
        else:
            name = self.names[layer]
        block = self.names[self.inside[-1]] if self.inside else ""
        self.joins.append((Shortcut(self.sums, operand, block, name), short.number))

    def enter(self, module: nn.Module, _given: Any) -> None:
        """A module starts."""
        self.inside.append(module)

    def leave(self, module: nn.Module, _given: Any, out: Any) -> None:
        """A module is over."""
        self.inside.pop()
        self.calls[module] = self.calls.get(module, 0) + 1
        weighted = any(True for _ in module.parameters(recurse=False)) and not any(True for _ in module.children())
        if isinstance(out, Tensor) and weighted and out in self.past:
            self.maker[out] = module

    def found(self) -> list[Shortcut]:
        """The shortcuts; a layer whose output goes elsewhere too is not theirs alone."""
        return [
            one if self.uses.get(number, 0) == 1 else Shortcut(one.place, one.operand, one.block, None)
            for one, number in self.joins
        ]


@torch.no_grad()
def find_shortcuts(model: nn.Module, x: Tensor) -> list[Shortcut]:
    """The shortcuts of a model, in the order in which they run; none where it has none or hides them (TorchScript).

    Args:
        model: Left as it was.
        x: ``(B, C, H, W)`` images.
    """
    watch = _Watch(model, x)
    handles = []
    try:
        with frozen(model):
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(watch.enter))
                handles.append(module.register_forward_hook(watch.leave))
            with watch:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found()


@contextmanager
def scaled(factors: dict[Shortcut, float]) -> Iterator[None]:
    """Run models inside with these shortcuts multiplied by these factors; each forward pass counts anew.

    Only one forward pass may run inside.
    """
    with _Scale({s.place: (s.operand, f) for s, f in factors.items()}):
        yield


class _Scale(TorchFunctionMode):
    def __init__(self, factors: dict[int, tuple[int, float]]) -> None:
        super().__init__()
        self.factors, self.sums = factors, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SUMS and is_sum(args):
            operand, factor = self.factors.get(self.sums, (0, 1.0))
            self.sums += 1
            if factor != 1.0:
                return self._scaled_sum(func, args, operand, factor)
        return func(*args, **(kwargs or {}))

    def _scaled_sum(self, func: Callable[..., Any], args: Sequence[Any], operand: int, factor: float) -> Tensor:
        in_place = func in (Tensor.add_, Tensor.__iadd__)
        pair = [args[0], args[1]]
        # Where there is nothing left of the shortcut, not a number times zero must not stay.
        pair[operand] = pair[operand] * factor if factor else torch.zeros_like(pair[operand])
        out: Tensor = torch.add(pair[0], pair[1])
        return args[0].copy_(out) if in_place else out


def is_sum(args: Sequence[Any]) -> bool:
    """Whether these are the operands of a sum of two tensors of one shape, batch and features at least."""
    return (
        len(args) >= 2
        and all(isinstance(one, Tensor) for one in args[:2])
        and args[0].shape == args[1].shape
        and args[0].ndim >= 3
    )


def _tensors(what: Any) -> Iterator[Tensor]:
    if isinstance(what, Tensor):
        yield what
    elif isinstance(what, list | tuple):
        for one in what:
            yield from _tensors(one)
    elif isinstance(what, dict):
        for one in what.values():
            yield from _tensors(one)
