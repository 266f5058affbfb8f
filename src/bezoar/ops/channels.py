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

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
#: Layers that multiply by a weight of their own, with the output channels first.
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Site:
    """A layer whose channels can be gated.

    Attributes:
        name: Dotted name in the model.
        module: A normalisation with gain and shift, or a convolution or linear layer.
        channels: Number of channels.
        norm: Whether it is a normalisation.
    """

    name: str
    module: nn.Module
    channels: int
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
    ran = in_order(model, x, _NORMS + WEIGHTED)
    norms = [(name, module) for name, module, _ in ran if isinstance(module, _NORMS)]
    plain = [(name, module) for name, module, _ in ran if isinstance(module, WEIGHTED)][:-1]
    sites = [_site(*one) for one in norms if _own_weight(one[1])] or [
        _site(*one) for one in plain if _own_weight(one[1])
    ]
    if not sites:
        raise UnsupportedModel(
            f"{type(model).__name__} has no channels to gate: no normalisation, and no hidden layer",
            "Use a method that tunes weights, such as finetune",
        )
    return sites


def in_order(model: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module, Tensor]]:
    """Names, layers of some kinds and what they give, in the order in which they first run, in eval mode.

    Args:
        model: Left as it was.
        x: ``(B, C, H, W)`` images.
        kinds: Types of layers.
    """
    names = {module: name for name, module in model.named_modules()}
    order: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, _given: Any, out: Tensor) -> None:
        order.setdefault(module, out)

    handles = [module.register_forward_hook(note) for module in names if isinstance(module, kinds)]
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
    return [(names[module], module, out) for module, out in order.items()]


def _own_weight(module: nn.Module) -> bool:
    # A weight that a parametrisation computes, such as weight normalisation, cannot be scaled in place.
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _site(name: str, module: nn.Module) -> Site:
    weight, last = module.weight, isinstance(module, nn.LayerNorm | nn.RMSNorm)
    assert isinstance(weight, Tensor)
    # LayerNorm may span several axes; a gate then belongs to the last one.
    return Site(name, module, weight.shape[-1 if last else 0], norm=isinstance(module, _NORMS))


class Gates:
    """A factor on the gain of each channel, and one on its shift; 1 changes nothing.

    On a normalisation with gain g and shift b the output becomes ``gain g n(x) + shift b``. On a convolution or linear
    layer in a net without normalisation the whole output, bias included, is multiplied by the gain, as a channel that
    is switched off would otherwise still give its bias; its bias alone is multiplied by the shift as well.

    The layers run with scaled weights, so that what a gated layer gives is what it gives after :meth:`fold`, whatever
    else it does inside, such as an activation; and factors of 1 change not a bit.

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
        """Run the model with these factors, the gates' own by default; they may change in place meanwhile."""
        gain, shift = self.gain if gain is None else gain, self.shift if shift is None else shift
        hooks: list[Any] = []
        try:
            for site in self.sites:
                before = partial(_put, site, gain[site.name], shift[site.name])
                hooks.append(site.module.register_forward_pre_hook(before))
                hooks.append(site.module.register_forward_hook(partial(_take_back, site), always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for site in self.sites:
                _take_back(site)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the weights by the factors, so that the model alone does what it did with them."""
        for site in self.sites:
            for name, value in _scaled(site, self.gain[site.name], self.shift[site.name]).items():
                getattr(site.module, name).copy_(value)

    @property
    def count(self) -> int:
        """Channels in all."""
        return sum(site.channels for site in self.sites)


def _scaled(site: Site, gain: Tensor, shift: Tensor) -> dict[str, Tensor]:
    weight, bias = site.module.weight, getattr(site.module, "bias", None)
    assert isinstance(weight, Tensor)
    gain = gain.to(weight)
    scaled = {"weight": weight * (gain if site.norm else gain.view(-1, *[1] * (weight.ndim - 1)))}
    if isinstance(bias, Tensor):
        shift = shift.to(bias)
        scaled["bias"] = bias * (shift if site.norm else shift * gain)
    return scaled


def _put(site: Site, gain: Tensor, shift: Tensor, _module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    # An entry of the instance hides the parameter of the same name without touching it.
    site.module.__dict__.update(_scaled(site, gain, shift))
    if isinstance(site.module, nn.GroupNorm) and not given[0].requires_grad:
        # On the CPU torch crashes in the backward pass where a channels-last input needs no gradient.
        return given[0].contiguous(), *given[1:]
    return None


def _take_back(site: Site, *_given: Any) -> None:
    for name in ("weight", "bias"):
        site.module.__dict__.pop(name, None)
