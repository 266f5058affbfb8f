"""Gates on channels: found by module type, applied by hooks, folded into the weights on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Site:
    """A layer whose channels can be gated.

    Attributes:
        name: Dotted name in the model.
        module: A normalisation with gain and shift, or a convolution or linear layer.
        channels: Number of channels.
        axis: Axis of the channels in the output.
        norm: Whether it is a normalisation.
    """

    name: str
    module: nn.Module
    channels: int
    axis: int
    norm: bool


def find_sites(model: nn.Module, x: Tensor) -> list[Site]:
    """Layers to gate, in the order in which they run.

    All normalisations with a gain; in a model without any, all convolutions and linear layers but the one that gives
    the logits.

    Args:
        model: Any model.
        x: ``(1, C, H, W)`` an image, to see which layers run and in what order.

    Raises:
        UnsupportedModel: There is no such layer.
    """
    ran = _ran(model, x, _NORMS + _WEIGHTED)
    norms = [(n, m) for n, m in ran if isinstance(m, _NORMS) and getattr(m, "weight", None) is not None]
    if norms:
        return [_norm_site(name, module) for name, module in norms]
    plain = [(n, m) for n, m in ran if isinstance(m, _WEIGHTED)][:-1]
    if not plain:
        raise UnsupportedModel(
            f"{type(model).__name__} has no channels to gate: no normalisation, and no hidden layer",
            "Use a method that tunes weights, such as finetune",
        )
    return [Site(name, module, len(module.weight), 1, norm=False) for name, module in plain]


def _ran(model: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    names = {module: name for name, module in model.named_modules()}
    order: dict[nn.Module, None] = {}
    handles = [
        module.register_forward_hook(lambda module, *_: order.setdefault(module))
        for module in names
        if isinstance(module, kinds)
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return [(names[module], module) for module in order]


def _norm_site(name: str, module: nn.Module) -> Site:
    weight = module.weight
    assert isinstance(weight, Tensor)
    # LayerNorm may span several axes; what it has a gain for is then a position, which gates as well.
    last = isinstance(module, nn.LayerNorm)
    return Site(name, module, weight.numel() if not last else weight.shape[-1], -1 if last else 1, norm=True)


class Gates:
    """A factor on the gain of each channel, and one on its shift; 1 changes nothing.

    On a normalisation with gain g and shift b the output becomes ``gain g n(x) + shift b``. On a convolution or linear
    layer without one after it the whole output, bias included, is multiplied by the gain, as a channel that is switched
    off would otherwise still give its bias.

    Args:
        sites: See :func:`find_sites`; the model that they belong to is not changed before :meth:`fold`.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        device = next(sites[0].module.parameters()).device
        self.gain = {s.name: torch.ones(s.channels, device=device) for s in sites}
        self.shift = {s.name: torch.ones(s.channels, device=device) for s in sites}

    @contextmanager
    def applied(self, gain: dict[str, Tensor] | None = None, shift: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Run the model with these factors, the gates' own by default."""
        gain, shift = self.gain if gain is None else gain, self.shift if shift is None else shift
        hooks = [s.module.register_forward_hook(partial(_gated, s, gain[s.name], shift[s.name])) for s in self.sites]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the weights by the factors, so that the model alone does what it did with them."""
        for site in self.sites:
            weight, bias = site.module.weight, getattr(site.module, "bias", None)
            assert isinstance(weight, Tensor)
            gain = self.gain[site.name].to(weight)
            weight.mul_(gain if site.norm else gain.view(-1, *[1] * (weight.ndim - 1)))
            if isinstance(bias, Tensor):
                bias.mul_(self.shift[site.name].to(bias) if site.norm else gain)

    @property
    def count(self) -> int:
        """Channels in all."""
        return sum(site.channels for site in self.sites)


def _gated(site: Site, gain: Tensor, shift: Tensor, _module: nn.Module, _given: Any, out: Tensor) -> Tensor:
    shape = [1] * out.ndim
    shape[site.axis] = site.channels
    gain, shift = gain.view(shape).to(out), shift.view(shape).to(out)
    bias = getattr(site.module, "bias", None)
    if not site.norm or not isinstance(bias, Tensor):
        return out * gain
    bias = (bias if bias.ndim == 1 else bias.mean(tuple(range(bias.ndim - 1)))).view(shape).to(out)
    return (out - bias) * gain + bias * shift
