"""How far the channels that amplify most stand out of their layers, and which labels they drive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.ops.augment import as_float
from bezoar.ops.lipschitz import lipschitz, pairs


@dataclass(frozen=True)
class Channel:
    """A channel that stands out.

    Attributes:
        layer: The module whose output holds it, the BatchNorm where there is one.
        number: Its number in the layer.
        index: Standard deviations of its bound above the mean of the layer.
    """

    layer: nn.Module
    number: int
    index: float


@dataclass(frozen=True, kw_only=True)
class ChannelLipschitz(Scorer):
    """Evidence of CLP: channels whose Lipschitz bound stands out in their layer, and the labels they lift.

    A trigger is a small change with a large effect, so some channel must amplify it. CLP prunes every channel whose
    bound lies more than u standard deviations above the mean of its layer; here that index is the score. Which label a
    channel drives is ours: its output is raised everywhere by some of its own standard deviations, and the label whose
    log-probability gains most over some clean images, on average, is the one that it drives.

    The score of a label is the index of the foremost channel that drives it, 0 where there is none; the model's is the
    largest index. Of n channels none can stand more than ``(n - 1) / sqrt(n)`` above the mean, so narrow layers say
    little. A second or two.

    Args:
        channels: Foremost channels, over all layers, whose labels are looked for, at least 1.
        images: Clean images that they are looked for with, at least 1.
        raised: Standard deviations of its output that a channel is raised by, above 0.
        u: An index above this makes the model suspect, above 0: what CLP prunes at (3 for CIFAR-10).

    References:
        Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022.
    """

    channels: int = 64
    images: int = 64
    raised: float = 5.0
    u: float = 3.0

    def __post_init__(self) -> None:
        for name in ("channels", "images"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("raised", "u"):
            self.require(name, getattr(self, name) > 0, "above 0")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        rows = torch.randperm(len(clean.x), generator=run.generator("channel lipschitz"))[: self.images]
        x = as_float(clean.x[rows]).to(run.device)
        found = standing_out(model, x[:1], self.channels)
        labels = dict.fromkeys(range(clean.num_classes), 0.0)
        with torch.no_grad():
            before = logits(model, x).float().log_softmax(1)
            for done, channel in enumerate(found):
                run.check()
                gain = (self._raise(model, channel, x).float().log_softmax(1) - before).mean(0)
                label = int(gain.argmax())
                labels[label] = max(labels[label], channel.index)
                run.progress.step(run.seed, done + 1, len(found), f"label {label}, index {channel.index:.1f}")
        largest = found[0].index
        return Scores(
            labels=labels,
            model=largest,
            meaning="standard deviations of the foremost channel that drives a label above the mean of its layer",
            suspect=largest > self.u,
        )

    def _raise(self, model: nn.Module, channel: Channel, x: Tensor) -> Tensor:
        """Logits while the channel's output is raised."""

        def lift(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
            axis = -1 if isinstance(channel.layer, nn.Linear) else 1
            own = out.select(axis, channel.number)
            shift = torch.zeros(out.shape[axis], dtype=out.dtype, device=out.device)
            shift[channel.number] = self.raised * own.float().std(correction=0).to(out.dtype)
            shape = [1] * out.ndim
            shape[axis] = -1
            return out + shift.view(shape)

        handle = channel.layer.register_forward_hook(lift)
        try:
            return logits(model, x)
        finally:
            handle.remove()


def standing_out(model: nn.Module, x: Tensor, count: int) -> list[Channel]:
    """The channels with the largest indices over all layers, the foremost first.

    Args:
        model: Any model.
        x: ``(1, C, H, W)`` an image.
        count: Most channels.

    Raises:
        UnsupportedModel: There is no hidden layer.
    """
    found = []
    for layer, norm in pairs(model, x):
        bounds = lipschitz(layer, norm)
        spread = float(bounds.std()) if len(bounds) > 1 else 0.0
        if spread > 1e-9 * float(bounds.mean()):
            indices = ((bounds - bounds.mean()) / spread).tolist()
            found += [Channel(norm or layer, number, index) for number, index in enumerate(indices)]
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no hidden layer whose channels differ",
            "Use a scorer that looks at answers, such as mm-bd",
        )
    return sorted(found, key=lambda channel: -channel.index)[:count]
