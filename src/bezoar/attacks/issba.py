"""ISSBA: a hidden message, different on each image (Li et al., "Invisible Backdoor Attack", ICCV 2021)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Training
from bezoar.attacks._network import on_device, require_training
from bezoar.attacks._poison import PoisonAttack, Poisoned
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.trigger import Trigger
from bezoar.ops.augment import as_float
from bezoar.ops.objective import Batch
from bezoar.ops.recipe import Recipe

_PIXELS_PER_BIT = 40  # 100 bits, the paper's length, fit into 64 x 64 pixels

_READ = 1000  # images that the bits are read from, to see how many are right
_ALIKE = 0.4  # changes of two images may correlate this much; the paper's check is that they are not the same


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class MessageEncoder(nn.Module):
    """Hides bits in images, after StegaStamp: the bits become a picture that convolutions mix with the image.

    Args:
        bits: Length of the message.
        channels: Colour channels.
        height: Rows of the image.
        width: Columns of the image.
        hidden: Width of the convolutions.
        strength: Largest change of a pixel, in (0, 1].
    """

    def __init__(self, *, bits: int, channels: int, height: int, width: int, hidden: int, strength: float) -> None:
        super().__init__()
        self.config = {
            "bits": bits,
            "channels": channels,
            "height": height,
            "width": width,
            "hidden": hidden,
            "strength": strength,
        }
        self.grid = (-(-height // 4), -(-width // 4))
        self.strength = strength
        half = -(-hidden // 2)
        self.message = nn.Linear(bits, hidden * self.grid[0] * self.grid[1])
        self.first = _block(channels, half)
        self.coarse = _block(half, hidden, stride=2)
        self.mixed = _block(2 * hidden, hidden)
        self.fine = _block(half + hidden + channels, half)
        self.residual = nn.Conv2d(half, channels, 3, padding=1)

    def forward(self, x: Tensor, secret: Tensor) -> Tensor:
        """``(B, C, H, W)`` images in [0, 1] and ``(B, bits)`` of 0 and 1 to images in [0, 1]."""
        fine = self.first(x - 0.5)
        coarse = self.coarse(fine)
        picture = self.message(2 * secret - 1).view(len(x), -1, *self.grid)
        picture = F.interpolate(picture, coarse.shape[2:])
        mixed = F.interpolate(self.mixed(torch.cat([coarse, picture], 1)), x.shape[2:])
        out = self.fine(torch.cat([x - 0.5, fine, mixed], 1))
        return (x + self.strength * torch.tanh(self.residual(out))).clamp(0, 1)


class MessageDecoder(nn.Module):
    """Reads the bits.

    Args:
        bits: Length of the message.
        channels: Colour channels.
        height: Rows of the image.
        width: Columns of the image.
        hidden: Width of the convolutions.
    """

    def __init__(self, *, bits: int, channels: int, height: int, width: int, hidden: int) -> None:
        super().__init__()
        half = -(-hidden // 2)
        self.convolutions = nn.Sequential(
            _block(channels, half), _block(half, hidden, stride=2), _block(hidden, hidden, stride=2), nn.Flatten()
        )
        self.bits = nn.Linear(hidden * -(-height // 4) * -(-width // 4), bits)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` images to ``(B, bits)`` logits of the bits."""
        logits: Tensor = self.bits(self.convolutions(x - 0.5))
        return logits


class Messenger(nn.Module):
    """Encoder and decoder, trained together.

    Args:
        encoder: Hides the bits.
        decoder: Reads them.
    """

    def __init__(self, encoder: MessageEncoder, decoder: MessageDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor, secret: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the bits hidden, and the logits that are read from them."""
        hidden = self.encoder(x, secret)
        return hidden, self.decoder(hidden)


@dataclass(frozen=True, eq=False)
class MessageTrigger:
    """A fixed message, hidden by an encoder; what changes depends on the image.

    Args:
        encoder: A :class:`MessageEncoder`.
        secret: ``(bits,)`` of 0 and 1.
    """

    encoder: nn.Module
    secret: Tensor

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        stamped: Tensor = on_device(self.encoder, x)(x, self.secret.to(x).expand(len(x), -1))
        return stamped


@dataclass(frozen=True, kw_only=True)
class ISSBA(PoisonAttack):
    """Hide one message in the images with an encoder network; the change differs from image to image.

    Encoder and decoder are trained together on the clean images, with new messages in each batch: the cross-entropy of
    the bits, the squared change of the image, and how alike the changes of neighbouring images of a batch are that
    carry the same message (the square of what their correlation has above 0.4). That last term is our own: without it
    the changes of two Fashion-MNIST images correlated by 0.52, with it by 0.25. The paper's perceptual and critic
    losses and its BCH code are left out: no pretrained network is needed, and the bits are read without correction.

    Args:
        bits: Length of the message; 0 for one bit to 40 pixels, at most the paper's 100 (so 100 from 64 x 64 pixels,
            25 at 32 x 32).
        strength: Largest change of a pixel, in (0, 1].
        hidden: Width of the convolutions.
        epochs: Passes over the clean data to train encoder and decoder.
        lr: Their learning rate (Adam).
        image_weight: Weight of the squared change (in units of ``strength``), ramped up over the second half.
        diversity: Weight of how alike the changes are; 0 switches it off.

    References:
        Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021. Tancik,
        Mildenhall, Ng, "StegaStamp: Invisible Hyperlinks in Physical Photographs", CVPR 2020.
    """

    bits: int = 0
    strength: float = 0.15
    hidden: int = 32
    epochs: int = 5
    lr: float = 2e-3
    image_weight: float = 0.3
    diversity: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("bits", self.bits >= 0, "at least 0")
        self.require("strength", 0 < self.strength <= 1, "in (0, 1]")
        for name in ("hidden", "epochs"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("lr", self.lr > 0, "above 0")
        for name in ("image_weight", "diversity"):
            self.require(name, getattr(self, name) >= 0, "at least 0")

    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """Not to be had without a network.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            f"the trigger of ISSBA is an encoder network, trained on images of shape {shape}",
            "Call poison(data, training)",
        )

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        messenger = self.train(data, require_training(self, training))
        trigger = self.message_trigger(messenger)
        poisoned = self.stamp_with(data, trigger, trigger)
        figures = {"bit accuracy": bit_accuracy(trigger, messenger.decoder, data.x[:_READ])}
        return dataclasses.replace(poisoned, truth=dataclasses.replace(poisoned.truth, figures=figures))

    def message_length(self, shape: tuple[int, int, int]) -> int:
        """Bits hidden in images of ``shape`` (C, H, W)."""
        return self.bits or max(1, min(100, shape[1] * shape[2] // _PIXELS_PER_BIT))

    def message_trigger(self, messenger: Messenger) -> MessageTrigger:
        """The attack's message, hidden by the encoder, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        bits = messenger.encoder.message.in_features
        encoder = messenger.encoder.cpu().eval().requires_grad_(False)
        return MessageTrigger(encoder, torch.randint(0, 2, (bits,), generator=generator).float())

    def messenger(self, shape: tuple[int, int, int]) -> Messenger:
        """Encoder and decoder for images of ``shape``, untrained; the seed decides their weights."""
        bits, (channels, height, width) = self.message_length(shape), shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = MessageEncoder(
                bits=bits, channels=channels, height=height, width=width, hidden=self.hidden, strength=self.strength
            )
            decoder = MessageDecoder(bits=bits, channels=channels, height=height, width=width, hidden=self.hidden)
        return Messenger(encoder, decoder)

    def train(self, data: Examples, training: Training) -> Messenger:
        """Train encoder and decoder on clean images."""
        messenger = self.messenger(data.shape)
        recipe = Recipe(
            epochs=self.epochs, batch=64, lr=self.lr, optimizer="adam", weight_decay=0.0, schedule="onecycle", clip=1.0
        )
        training.fit("messenger", data, model=messenger, recipe=recipe, objective=_Hiding(self))
        return messenger


class _Hiding:
    """What encoder and decoder minimise."""

    def __init__(self, attack: ISSBA) -> None:
        self.attack, self.ramp = attack, 0.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        # Neighbours share a message, so that their changes can be compared.
        pairs = -(-len(batch.x) // 2)
        secret = torch.randint(0, 2, (pairs, self._bits(batch.x)), generator=batch.generator).to(batch.x)
        secret = secret.repeat_interleave(2, 0)[: len(batch.x)]
        hidden, logits = model(batch.x, secret)
        change = (hidden - batch.x) / self.attack.strength
        message = F.binary_cross_entropy_with_logits(logits, secret)
        total: Tensor = message + self.ramp * self.attack.image_weight * change.square().mean()
        if self.attack.diversity and len(batch.x) > 1:
            total = total + self.ramp * self.attack.diversity * _likeness(change[:-1:2], change[1::2])
        return total

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        del model
        self.ramp = max(0.0, 2 * (number + 1) / epochs - 1)  # the bits first, then the looks

    def state_dict(self) -> dict[str, Any]:
        return {"ramp": self.ramp}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ramp = float(state["ramp"])

    def _bits(self, x: Tensor) -> int:
        channels, height, width = x.shape[1:]
        return self.attack.message_length((channels, height, width))


@torch.no_grad()
def bit_accuracy(trigger: MessageTrigger, decoder: MessageDecoder, x: Tensor) -> float:
    """Share of the bits that the decoder reads rightly from ``(N, C, H, W)`` images with the message, in [0, 1]."""
    decoder = decoder.cpu().eval()
    read = [decoder(trigger(as_float(part))) > 0 for part in torch.split(x, 256)]
    return float((torch.cat(read) == (trigger.secret > 0.5)).float().mean())


def _likeness(one: Tensor, other: Tensor) -> Tensor:
    """Mean square of what the correlations of two sets of changes have above the limit."""
    one, other = one.flatten(1), other.flatten(1)
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    above: Tensor = F.relu(F.cosine_similarity(one, other, eps=1e-6) - _ALIKE)
    return above.square().mean()
