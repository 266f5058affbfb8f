"""Contrastive learning: two views of an image belong together, and images that are known to be of one label do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.ops.augment import flip
from bezoar.ops.head import find_head

_GREY = (0.299, 0.587, 0.114)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float, together: Tensor | None = None) -> Tensor:
    """Mean over all views of minus the log probability of the views that belong to it, softmax over all others.

    Args:
        first, second: ``(B, D)`` unit vectors of two views of the same B images.
        temperature: Of the softmax, above 0.
        together: ``(B, B)`` bool, which images belong together; each belongs to itself. None is no other: the loss of
            SimCLR; with the pairs of one label it is that of supervised contrastive learning.
    """
    z = torch.cat([first, second])
    count = len(first)
    itself = torch.eye(2 * count, dtype=torch.bool, device=z.device)
    likely = (z @ z.T / temperature).masked_fill(itself, float("-inf")).log_softmax(1)
    alone = torch.eye(count, dtype=torch.bool, device=z.device)
    pairs = alone if together is None else together.to(z.device) | alone
    positive = pairs.repeat(2, 2) & ~itself
    return -(likely.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()


def one_label(y: Tensor, trusted: Tensor) -> Tensor:
    """``(B, B)`` bool: pairs of one label ``(B,)``, both of whom are trusted ``(B,)`` to have the right one."""
    return (y[:, None] == y) & trusted[:, None] & trusted


def view(x: Tensor, generator: torch.Generator, *, least: float = 0.2, mirrored: bool = False) -> Tensor:
    """A random view of each image: a part of it in full size, other light and colours.

    As SimCLR does, but for the shift of the hue: a box of ``least`` to all of the area and an aspect of 3/4 to 4/3;
    with a chance of 80 % brightness, contrast and saturation times 0.6 to 1.4; and with 20 % no colours.

    Args:
        x: ``(B, C, H, W)`` floats in [0, 1].
        generator: A CPU generator.
        least: Smallest share of the area, in (0, 1].
        mirrored: Whether half of them are mirrored.
    """
    x = part_of(x, generator, least)
    if mirrored:
        x = flip(x, generator)
    draws = torch.rand(5, len(x), 1, 1, 1, generator=generator).to(x.device, x.dtype)
    wanted = draws[0] < 0.8
    light, contrast, colour = (torch.where(wanted, 0.6 + 0.8 * draw, torch.ones_like(draw)) for draw in draws[1:4])
    x = (x * light).clamp(0, 1)
    middle = _grey(x).mean((2, 3), keepdim=True)
    x = (middle + contrast * (x - middle)).clamp(0, 1)
    if x.shape[1] == 3:
        colour = torch.where(draws[4] < 0.2, torch.zeros_like(colour), colour)
        x = (_grey(x) + colour * (x - _grey(x))).clamp(0, 1)
    return x


def part_of(x: Tensor, generator: torch.Generator, least: float) -> Tensor:
    """A random box of each ``(B, C, H, W)`` image in full size, see :func:`view`."""
    area, aspect, down, right = torch.rand(4, len(x), generator=generator)
    area = least + (1 - least) * area
    stretch = ((2 * aspect - 1) * torch.tensor(4 / 3).log()).exp()
    tall, wide = (area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1)
    zero = torch.zeros_like(tall)
    rows = [
        torch.stack([wide, zero, (2 * right - 1) * (1 - wide)], 1),
        torch.stack([zero, tall, (2 * down - 1) * (1 - tall)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(x.device, x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor(_GREY, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)).sum(1, keepdim=True)


class Embedding(nn.Module):
    """What goes into the last layer of a network, through two linear layers on to unit vectors.

    Args:
        model: The network; it is trained in place, but for its last layer.
        x: ``(1, C, H, W)`` an image, on the device of the model.
        width: Of the unit vectors.

    Raises:
        UnsupportedModel: There is no last layer that sees one row for each image.
    """

    def __init__(self, model: nn.Module, x: Tensor, width: int = 128) -> None:
        super().__init__()
        self.model = model
        self._head = (find_head(model, x),)  # in a tuple, so that it is no module of this one again
        with torch.no_grad():
            inner = head_input(model, self.head, x).shape[1]
        self.projector = nn.Sequential(nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width)).to(x.device)

    @property
    def head(self) -> nn.Module:
        """The last layer of the network."""
        return self._head[0]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` unit vectors of ``(B, C, H, W)`` images."""
        return F.normalize(self.projector(head_input(self.model, self.head, x)), dim=1)


def head_input(model: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """``(B, D)`` what goes into the last layer, with its gradient; the mean over the places of a map.

    Raises:
        UnsupportedModel: The last layer did not run, or not once for each image.
    """
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, given: caught.append(given[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if not caught or len(caught[-1]) != len(x):
        raise UnsupportedModel(f"the last layer of {type(model).__name__} does not see one row for each image")
    given = caught[-1]
    if given.ndim == 4:
        given = given.mean((2, 3))
    elif given.ndim == 3:
        given = given.mean(1)
    return given.flatten(1)
