"""Units that a layer reads: the last features of a net, or the channels of its last convolution, ready to be shut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.surgery import frozen
from bezoar.ops.channels import WEIGHTED, in_order

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Units:
    """Units, and the layer that reads them after activation and pooling; one that is shut gives it nothing.

    Attributes:
        reader: A linear layer, or a convolution without groups.
        member: ``(F,)`` number of the unit that each input of the reader belongs to.
        count: Number of units.
    """

    reader: nn.Module
    member: Tensor
    count: int

    @property
    def axis(self) -> int:
        """Axis of the inputs in what the reader is given."""
        return -1 if isinstance(self.reader, nn.Linear) else 1

    @torch.no_grad()
    def activations(self, model: nn.Module, x: Tensor, batch: int = 256) -> Tensor:
        """``(count,)`` means over images, positions and the inputs of each unit, as float64 on the CPU.

        Args:
            model: Run in eval mode and left as it was.
            x: ``(N, C, H, W)`` images.
            batch: Images at once.
        """
        device = next(model.parameters()).device
        total = torch.zeros(len(self.member), dtype=torch.float64)
        with frozen(model):
            for part in torch.split(x, batch):
                given = self._given(model, part.to(device)).movedim(self.axis, -1).float()
                total += (given.flatten(1, -2).mean(1) if given.ndim > 2 else given).sum(0).cpu().double()
        summed = torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.member, total)
        return summed / torch.bincount(self.member, minlength=self.count).clamp(min=1) / len(x)

    def _given(self, model: nn.Module, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self.reader.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
        try:
            model(x)
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def shut(self, closed: Tensor) -> Iterator[None]:
        """Run the model without some of the units, of which no gradient reaches the reader either.

        Args:
            closed: Numbers of the units.
        """
        stays = self._stays(closed)

        def silence(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Any, ...]:
            shape = [1] * given[0].ndim
            shape[self.axis] = len(stays)
            return given[0] * stays.view(shape).to(given[0]), *given[1:]

        handle = self.reader.register_forward_pre_hook(silence)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def fold(self, closed: Tensor) -> None:
        """Set the weights with which the reader reads these units to 0."""
        weight = self.reader.weight
        assert isinstance(weight, Tensor)
        stays = self._stays(closed).to(weight.device)
        weight.masked_fill_(~stays.view(1, -1, *[1] * (weight.ndim - 2)), 0.0)

    def _stays(self, closed: Tensor) -> Tensor:
        return ~torch.isin(self.member, closed.cpu())


def last_features(model: nn.Module, x: Tensor) -> Units:
    """The second-to-last layer: the inputs of the layer that gives the logits, each a unit.

    Args:
        model: Any model.
        x: ``(1, C, H, W)`` an image.

    Raises:
        UnsupportedModel: No layer gives the logits, or it is a convolution with groups.
    """
    ran = in_order(model, x, WEIGHTED)
    if not ran or not _reads_all(ran[-1][1]):
        raise UnsupportedModel(
            f"{type(model).__name__} has no linear layer or plain convolution that gives the logits",
            "Use a method that tunes weights, such as finetune",
        )
    reader = ran[-1][1]
    width = _width(reader)
    return Units(reader, torch.arange(width), width)


def last_channels(model: nn.Module, x: Tensor, batch: int = 64) -> Units:
    """The channels of the last convolution, as the next layer reads them after activation and pooling.

    Which inputs of that layer belong to which channel is found by marking each channel in turn and looking where the
    mark arrives, so that any order of flattening will do. Where marks mix on the way, as attention makes them, or in a
    net without convolutions, this is :func:`last_features`.

    Args:
        model: Any model.
        x: ``(1, C, H, W)`` an image.
        batch: Channels marked at once.

    Raises:
        UnsupportedModel: As for :func:`last_features`.
    """
    features = last_features(model, x)
    ran = [module for _, module, _ in in_order(model, x, WEIGHTED)]
    at = max((place for place, module in enumerate(ran[:-1]) if isinstance(module, _CONVOLUTIONS)), default=None)
    if at is None:
        return features
    readers = [module for module in ran[at + 1 :] if _reads_all(module)]
    for reader, marked in _marks(model, x, ran[at], readers, batch).items():
        if bool(marked.any()):
            # An input that several channels reach, or none, belongs to no single one.
            alone = bool((marked.sum(0) == 1).all())
            return Units(reader, marked.int().argmax(0), len(marked)) if alone else features
    return features


def _marks(
    model: nn.Module, x: Tensor, source: nn.Module, readers: list[nn.Module], batch: int
) -> dict[nn.Module, Tensor]:
    """``(channels, F)`` whether a NaN in a channel of ``source`` arrives at an input of each reader that runs."""
    weight = source.weight
    assert isinstance(weight, Tensor)
    arrived: dict[nn.Module, list[Tensor]] = {reader: [] for reader in readers}
    channels = torch.arange(len(weight))

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs = given[0].movedim(-1 if isinstance(module, nn.Linear) else 1, -1)
        arrived[module].append(inputs.isnan().flatten(1, -2).any(1).cpu() if inputs.ndim > 2 else inputs.isnan().cpu())

    handles = [reader.register_forward_pre_hook(look) for reader in readers]
    try:
        with frozen(model), torch.no_grad():
            for part in torch.split(channels, batch):

                def mark(_module: nn.Module, _given: Any, out: Tensor, part: Tensor = part) -> Tensor:
                    out = out.clone()
                    out[torch.arange(len(part)), part] = float("nan")
                    return out

                handle = source.register_forward_hook(mark)
                try:
                    model(x[:1].expand(len(part), *x.shape[1:]))
                finally:
                    handle.remove()
    finally:
        for handle in handles:
            handle.remove()
    whole = {reader: torch.cat(parts) for reader, parts in arrived.items() if parts}
    return {reader: marked for reader, marked in whole.items() if len(marked) == len(channels)}


def _reads_all(module: nn.Module) -> bool:
    own = isinstance(module._parameters.get("weight"), nn.Parameter)  # not computed by a parametrisation
    return own and (isinstance(module, nn.Linear) or getattr(module, "groups", 0) == 1)


def _width(reader: nn.Module) -> int:
    weight = reader.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]
