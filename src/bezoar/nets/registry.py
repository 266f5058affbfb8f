"""Reference architectures by name, such as ``wrn-16-1`` or ``preactresnet-18``."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from bezoar.nets.convnet import ConvNet
from bezoar.nets.deepid import DeepID
from bezoar.nets.neural_cleanse import GtsrbNet, MnistNet
from bezoar.nets.resnet import CifarResNet, PreActResNet, ResNet
from bezoar.nets.vgg import VGG, SmallVGG
from bezoar.nets.wide_resnet import WideResNet

# Pattern of the name, example, builder from (numbers in the name, num_classes, channels, size), size of its input.
_Build = Callable[[list[int], int, int, int], nn.Module]
_NETS: tuple[tuple[str, str, _Build, tuple[int, int]], ...] = (
    (r"wrn-(\d+)-(\d+)", "wrn-16-1", lambda n, k, c, _: WideResNet(n[0], n[1], k, c), (32, 32)),
    (r"preactresnet-18", "preactresnet-18", lambda _, k, c, __: PreActResNet(k, c), (32, 32)),
    (r"resnet-18", "resnet-18", lambda _, k, c, __: ResNet(k, c), (32, 32)),
    (r"resnet-(20|32|44|56|110)", "resnet-20", lambda n, k, c, _: CifarResNet(n[0], k, c), (32, 32)),
    (r"vgg-(11|13|16|19)-bn", "vgg-16-bn", lambda n, k, c, _: VGG(n[0], k, c, True), (32, 32)),
    (r"vgg-(11|13|16|19)", "vgg-16", lambda n, k, c, _: VGG(n[0], k, c, False), (32, 32)),
    (r"small-vgg", "small-vgg", lambda _, k, c, s: SmallVGG(k, c, s), (32, 32)),
    (r"convnet-(\d+)-bn", "convnet-16-bn", lambda n, k, c, _: ConvNet(n[0], k, c, norm=True), (32, 32)),
    (r"convnet-(\d+)", "convnet-16", lambda n, k, c, _: ConvNet(n[0], k, c), (32, 32)),
    (r"nc-mnist", "nc-mnist", lambda _, k, c, s: MnistNet(k, c, s), (28, 28)),
    (r"nc-gtsrb", "nc-gtsrb", lambda _, k, c, s: GtsrbNet(k, c, s), (32, 32)),
    (r"deepid", "deepid", lambda _, k, c, __: DeepID(k, c), (55, 47)),
)


def names() -> list[str]:
    """One example of each family, for help texts."""
    return [example for _, example, _, _ in _NETS]


def find(name: str) -> tuple[Callable[[int, int, int], nn.Module], tuple[int, int]] | None:
    """Find an architecture.

    Args:
        name: Such as ``wrn-16-1``; case and the dash before a number do not matter.

    Returns:
        A function of (num_classes, channels, size) that builds it and its natural input size (height, width), or None.
    """
    wanted = re.sub(r"(?<=[a-z])(?=\d)", "-", name.lower().replace("_", "-"))
    for pattern, _, build, size in _NETS:
        found = re.fullmatch(pattern, wanted)
        if found:
            numbers = [int(g) for g in found.groups()]
            return (lambda k, c, s, b=build, n=numbers: b(n, k, c, s)), size
    return None


def takes_any_size(name: str) -> bool:
    """Whether the weights of a reference net are the same for every size of image, so that they do not tell it."""
    found = find(name)
    if found is None:
        return False
    build, (height, _) = found
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in build(2, 3, size).state_dict().items()} for size in (height, 2 * height)]
    return shapes[0] == shapes[1]
