"""Attention maps of Neural Attention Distillation, and where in a network to take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.surgery import frozen
from bezoar.ops.residual import find_shortcuts

_EPSILON = 1e-6


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a layer looks: the sum over channels of ``|F|^power``, divided by its Euclidean norm over all positions.

    Args:
        features: ``(B, C, H, W)`` or tokens ``(B, N, D)``.
        power: Above 0.

    Returns:
        ``(B, H, W)``, or ``(B, N)`` of tokens, in float32.
    """
    strength = features.float().abs().pow(power).sum(1 if features.ndim == 4 else -1)
    norm = strength.flatten(1).norm(dim=1)
    scaled: Tensor = strength / (norm.view(-1, *[1] * (strength.ndim - 1)) + _EPSILON)
    return scaled


def attention_distance(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Mean over images and positions of the squared difference of two attention maps.

    The features of networks of different architecture may differ in size: the larger ones are averaged down first.

    Args:
        student, teacher: ``(B, C, H, W)`` each, or ``(B, N, D)`` each.
        power: See :func:`attention_map`.
    """
    student, teacher = _of_one_size(student, teacher)
    return F.mse_loss(attention_map(student, power), attention_map(teacher, power))


def _of_one_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if one.ndim == 4 and one.shape[2:] != other.shape[2:]:
        size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
        return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)
    if one.ndim == 3 and one.shape[1] != other.shape[1]:
        count = min(one.shape[1], other.shape[1])
        pooled = [F.adaptive_avg_pool1d(t.transpose(1, 2), count).transpose(1, 2) for t in (one, other)]
        return pooled[0], pooled[1]
    return one, other


@dataclass(frozen=True)
class Tap:
    """A place where features are taken.

    Attributes:
        name: Dotted name of the module whose output it is.
        call: Which of its calls in a forward pass, from 0.
        positions: Places of the map: height and width, or the number of tokens.
        last: Whether a picture's channels come last, ``(B, H, W, C)``, as in Swin.
        seen: Number of module outputs before this one, which orders taps.
    """

    name: str
    call: int
    positions: tuple[int, ...]
    last: bool
    seen: int


@torch.no_grad()
def find_taps(model: nn.Module, x: Tensor, most: int = 3) -> list[Tap]:
    """Where to take attention maps, from the input to the output: the deepest ``most`` stages.

    Of a residual network, the outputs of the last block at each resolution, before any norm that follows; of another
    one, the last output of a layer at each resolution at which there are weights. A network that works at one
    resolution throughout, such as a vision transformer, is cut into ``most`` parts.

    Args:
        model: Left as it was.
        x: ``(B, C, H, W)`` at least two images.
        most: At least 1.

    Raises:
        UnsupportedModel: There are no feature maps to be seen.
    """
    taps, weighted = _outputs(model, x)
    blocks = {s.block for s in find_shortcuts(model, x)} - {""}
    found = _stages([tap for tap in taps if tap.name in blocks], most)
    if not found:
        places = {tap.positions for tap in taps if tap.name in weighted}
        children = {name for name, module in model.named_modules() if not any(True for _ in module.children())}
        found = _stages([t for t in taps if t.name in children and t.positions in places], most)
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no feature maps: no layer gives (B, C, H, W) or tokens (B, N, D)",
            "Use a purifier that looks at the logits alone, such as finetune",
        )
    return found[-most:]


def _stages(taps: list[Tap], most: int) -> list[Tap]:
    last: dict[tuple[int, ...], Tap] = {}
    for tap in taps:
        last[tap.positions] = tap
    if len(last) != 1:
        return sorted(last.values(), key=lambda tap: tap.seen)
    parts = min(most, len(taps))
    return [taps[(part + 1) * len(taps) // parts - 1] for part in range(parts)]


def _outputs(model: nn.Module, x: Tensor) -> tuple[list[Tap], set[str]]:
    """All feature maps in the order in which they are done, and the names of the layers with a convolution or such."""
    taps: list[Tap] = []
    calls: dict[str, int] = {}
    weighted: set[str] = set()

    def note(name: str, module: nn.Module, out: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        if not isinstance(out, Tensor) or out.ndim not in (3, 4) or len(out) != len(x) or not out.is_floating_point():
            return
        last = out.ndim == 4 and _channels_last(module, out)
        positions = tuple(out.shape[1:-1] if last or out.ndim == 3 else out.shape[2:])
        if torch.Size(positions).numel() > 1:  # the map of a single place is 1, whatever it holds
            taps.append(Tap(name, call, positions, last, len(taps)))
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                weighted.add(name)

    with frozen(model), _listening(model, note):
        model(x)
    return taps, weighted


def _channels_last(module: nn.Module, out: Tensor) -> bool:
    """A linear layer, or a norm inside that spans just the last axis, tells that it holds the channels."""
    norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm)]
    spans = any(tuple(m.normalized_shape) == tuple(out.shape[-1:]) for m in norms)
    return isinstance(module, nn.Linear) or (spans and out.shape[-1] != out.shape[1])


@contextmanager
def _listening(model: nn.Module, note: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                handle = module.register_forward_hook(lambda m, _given, out, n=name: note(n, m, out))
                stack.callback(handle.remove)
        yield


def features_at(model: nn.Module, taps: list[Tap], x: Tensor) -> tuple[Any, list[Tensor]]:
    """What the model gives, and the features at the taps, channels before positions in pictures, with gradients.

    Args:
        model: Any network that has the modules of the taps.
        taps: See :func:`find_taps`.
        x: ``(B, C, H, W)``.
    """
    wanted = {(tap.name, tap.call): number for number, tap in enumerate(taps)}
    last = [tap.last for tap in taps]
    found: dict[int, Tensor] = {}
    calls: dict[str, int] = {}
    with ExitStack() as stack:

        def keep(name: str, out: Tensor) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            if (name, call) in wanted:
                # A copy: an activation that comes after may work in place.
                number = wanted[name, call]
                found[number] = out.permute(0, 3, 1, 2).clone() if last[number] else out.clone()

        for name in {tap.name for tap in taps}:
            handle = model.get_submodule(name).register_forward_hook(lambda _m, _given, out, n=name: keep(n, out))
            stack.callback(handle.remove)
        out = model(x)
    return out, [found[number] for number in range(len(taps))]
