"""Stimulation of inner neurons, and triggers that stimulate them, for ABS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.ops.channels import Site, in_order

#: Share of a negative activation that counts, so that a neuron that is off has a gradient.
_LEAK = 0.1
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Layer:
    """A layer whose neurons are stimulated.

    Attributes:
        site: The layer; a neuron is one of its channels, at all positions.
        axis: Axis of the channels in its output.
        top: Largest activation of any of its neurons on the clean images.
        spread: Standard deviation of its output on the clean images.
    """

    site: Site
    axis: int
    top: float
    spread: float


@dataclass(frozen=True)
class Neuron:
    """A candidate: a neuron that lifts one label.

    Attributes:
        layer: Where it is.
        channel: Its number.
        label: The label that it lifts most.
        gap: By how many logits more than the next label, on the image where that is least.
    """

    layer: Layer
    channel: int
    label: int
    gap: float


def layers_of(model: nn.Module, x: Tensor, sites: list[Site]) -> list[Layer]:
    """Layers with the range of their activations on ``(B, C, H, W)`` images."""
    outs = {module: out for _, module, out in in_order(model, x, tuple({type(s.module) for s in sites}))}
    found = []
    for site in sites:
        out = outs[site.module].float()
        axis = out.ndim - 1 if isinstance(site.module, _CHANNELS_LAST) else 1
        if out.shape[axis] == site.channels:
            found.append(Layer(site, axis, float(out.max()), float(out.std())))
    return found


@torch.no_grad()
def stimulated(model: nn.Module, x: Tensor, layer: Layer, channels: Tensor, values: Tensor) -> Tensor:
    """``(c, v, B, K)`` logits of images with a neuron held at a value.

    Args:
        model: Eval mode.
        x: ``(B, C, H, W)`` images, on the device.
        layer: Where the neurons are.
        channels: ``(c,)`` their numbers.
        values: ``(v,)`` values.
    """
    each = len(values) * len(x)
    held = values.repeat_interleave(len(x)).repeat(len(channels))
    numbers = channels.repeat_interleave(each)

    def hold(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
        moved = out.clone().movedim(layer.axis, 1)
        rows = torch.arange(len(numbers), device=out.device)
        shape = [len(numbers)] + [1] * (moved.ndim - 2)
        moved[rows, numbers.to(out.device)] = held.to(out).view(shape).expand_as(moved[rows, 0])
        return moved.movedim(1, layer.axis)

    handle = layer.site.module.register_forward_hook(hold)
    try:
        out = logits(model, x.repeat(len(channels) * len(values), 1, 1, 1))
    finally:
        handle.remove()
    return out.float().view(len(channels), len(values), len(x), -1)


def lifts(out: Tensor, natural: Tensor, y: Tensor) -> Tensor:
    """``(c, K)`` how many logits a neuron lifts each label, on the image of another label where that is least.

    Args:
        out: ``(c, v, B, K)`` logits with the neuron held at each of its values.
        natural: ``(B, K)`` logits of the images as they are.
        y: ``(B,)`` labels.
    """
    most = (out - natural).amax(1)
    own = F.one_hot(y, natural.shape[1]).bool()
    return most.masked_fill(own, torch.inf).amin(1)


def leaders(lifted: Tensor) -> tuple[Tensor, Tensor]:
    """``(c,)`` label that each neuron lifts most, and by how much more than the next one, of ``(c, K)`` lifts."""
    first = lifted.nan_to_num(posinf=-1e9).topk(2, dim=1)
    return first.indices[:, 0], first.values[:, 0] - first.values[:, 1]


class Activations:
    """What the layers of some neurons give, caught on the way."""

    def __init__(self, neurons: list[Neuron]) -> None:
        self.layers = {neuron.layer.site.module: neuron.layer for neuron in neurons}
        self.out: dict[nn.Module, Tensor] = {}

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them inside."""

        def note(module: nn.Module, _given: Any, out: Tensor) -> None:
            self.out.setdefault(module, out)

        handles = [module.register_forward_hook(note) for module in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[nn.Module, Tensor]:
        """``(B, channels)`` largest activation over the positions by layer, in its standard deviations; forgets them.

        A mean would favour a faint change of the whole image, which no bound on the size of a trigger turns small.
        """
        found = {}
        for module, layer in self.layers.items():
            moved = F.leaky_relu(self.out[module].float(), _LEAK).movedim(layer.axis, 1)
            found[module] = (moved.flatten(2).amax(2) if moved.ndim > 2 else moved) / max(layer.spread, 1e-6)
        self.out = {}
        return found


def stimulation_loss(
    seen: dict[nn.Module, Tensor], natural: dict[nn.Module, Tensor], neurons: list[Neuron], images: int, others: float
) -> Tensor:
    """``(T,)`` losses: the change of the other neurons of a layer, weighted, less the activation of the neuron.

    Args:
        seen: ``(T B, channels)`` activations by layer, of the images stamped for each neuron in turn.
        natural: ``(B, channels)`` those of the images as they are.
        neurons: The T candidates.
        images: B.
        others: Weight of the other neurons.
    """
    losses = []
    for row, neuron in enumerate(neurons):
        module = neuron.layer.site.module
        own = seen[module][row * images : (row + 1) * images]
        change = (own - natural[module]).abs().mean(0)
        rest = (change.sum() - change[neuron.channel]) / max(1, len(change) - 1)
        losses.append(others * rest - own[:, neuron.channel].mean())
    return torch.stack(losses)


def told(run: Run, done: int, total: int, phase: str) -> None:
    """Progress, and the budget."""
    run.check()
    run.progress.step(run.seed, done, total, phase)
