"""ONNX image classifiers, as torch modules with gradients, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bezoar.core.errors import ModelError
from bezoar.core.results import write_atomic
from bezoar.io.arch import COMMON_SIZES
from bezoar.io.containers import Source
from bezoar.io.onnx_file import Layout, Model, check_sizes, cut, difference, explained, open_model, reference, simplify
from bezoar.io.onnx_weights import Place, convert, free_batch, write_weights
from bezoar.io.readers._base import Loaded, Options, file_name

#: Largest relative difference to onnxruntime that is accepted.
TOLERANCE = 1e-3
# First field of a model is its ir_version; then comes the producer, the domain, the version, the text or the graph.
_SECOND_FIELDS = frozenset(b"\x12\x1a\x22\x28\x32\x3a\x42\x72")


class OnnxReader:
    """Reads ``.onnx`` files."""

    def matches(self, source: Source) -> bool:
        """Whether the file begins as every exporter begins one, or is called ``.onnx``."""
        if source.is_folder:
            return False
        head = source.head
        looks = len(head) > 2 and head[0] == 8 and 1 <= head[1] < 64 and head[2] in _SECOND_FIELDS
        return looks or source.path.suffix.lower() == ".onnx"

    def read(self, source: Source, options: Options) -> Loaded:
        """Read, convert, and compare with onnxruntime.

        Raises:
            ModelError: Damaged, hostile, not supported, or the conversion computes something else than onnxruntime.
            MissingExtra: onnx, onnx2torch or onnxruntime is missing or broken.
        """
        model = open_model(source.path)
        with explained("the ONNX graph is damaged", "Export or fetch the model again"):
            simplify(model)
            layout = Layout.of(model)
            needed = type(model).FromString(model.SerializeToString())
            cut(needed, layout.output)
        check_sizes(needed)
        x, expected = _run(needed, layout, options)
        network, places, batch = _converted(needed, layout, x, expected)
        # Nodes of the cut graph, by name: those of the full one that is written back have other numbers.
        numbers = {node.name: i for i, node in enumerate(model.graph.node)}
        places = [replace(p, node=numbers[needed.graph.node[p.node].name]) for p in places]
        origin = OnnxOrigin(source.path, model, places, layout, batch, x)
        plain = batch is None and not layout.channels_last and expected.ndim == 2
        warnings = ["the file ends in a softmax; its input is taken as logits"] if layout.probabilities else []
        if batch is not None:
            warnings.append(f"the batch size {batch} was fixed at export: images go through in pieces of {batch}")
        return Loaded(
            network=network,
            format="onnx",
            arch=f"ONNX graph of {len(needed.graph.node)} operators",
            origin=origin,
            wrap=None if plain else partial(OnnxClassifier, batch=batch, channels_last=layout.channels_last),
            size=layout.size or _size(x, layout),
            channels=layout.channels,
            warnings=tuple(warnings),
        )


READER = OnnxReader()


def _run(model: Model, layout: Layout, options: Options) -> tuple[Tensor, NDArray[Any]]:
    """Random images, and what onnxruntime makes of them; where the size is open, the first usual one that works."""
    channels = layout.channels or options.channels or 3
    known = layout.size or options.size
    *others, last = [known] if known else COMMON_SIZES
    for size in others:
        x = layout.example((layout.batch or 1) + 2, channels, size)
        try:
            return x, _reference(model, layout, x)
        except ModelError:
            continue
    x = layout.example((layout.batch or 1) + 2, channels, last)
    return x, _reference(model, layout, x)


def _reference(model: Model, layout: Layout, x: Tensor) -> NDArray[Any]:
    return reference(model, _padded(x, layout.batch) if layout.batch else x, layout.batch)[: len(x)]


class OnnxClassifier(nn.Module):
    """Logits for any number of images, from a graph with a fixed batch size, or with another order of axes.

    Args:
        network: The converted graph.
        batch: Its fixed batch size; the last piece is filled up with copies, whose outputs are dropped.
        channels_last: Whether it takes (B, H, W, C).
    """

    def __init__(self, network: nn.Module, batch: int | None = None, channels_last: bool = False) -> None:
        super().__init__()
        self.network, self.batch, self.channels_last = network, batch, channels_last

    def forward(self, x: Tensor) -> Tensor:
        images = x.permute(0, 2, 3, 1) if self.channels_last else x
        if self.batch is None:
            return _flat(self.network(images))
        filled = _padded(images, self.batch)
        pieces = [filled[i : i + self.batch] for i in range(0, len(filled), self.batch)]
        return torch.cat([_flat(self.network(piece)) for piece in pieces])[: len(x)]


@dataclass(frozen=True)
class OnnxOrigin:
    """The graph as it was read, for writing it back with other weights.

    Attributes:
        path: Of the file.
        model: The simplified graph.
        places: Where the network's weights go.
        layout: Input and output.
        batch: Batch size that the network needs, or None.
        x: Images for the comparison.
    """

    path: Path
    model: Model
    places: list[Place]
    layout: Layout
    batch: int | None
    x: Tensor

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        """Write the same graph with the network's weights, all in one file, once onnxruntime agrees with the network.

        Raises:
            ModelError: The network has another structure, or the written graph would compute something else.
        """
        model = type(self.model).FromString(self.model.SerializeToString())
        write_weights(model, network, self.places)
        content: bytes = model.SerializeToString()
        cut(model, self.layout.output)
        apart = _compare(network, self.x, _reference(model, self.layout, self.x), self.batch)
        if apart > TOLERANCE:
            message = f"the written ONNX file would differ from the cleaned network by {apart:.2g}"
            raise ModelError(message, "Only weights may change, not the structure or the mode of layers")
        path = folder / file_name(self.path, name)
        write_atomic(path, content)
        return path


def _converted(
    needed: Model, layout: Layout, x: Tensor, expected: NDArray[Any]
) -> tuple[nn.Module, list[Place], int | None]:
    """The converted network; freed of a fixed batch size where that gives the same, as it is many times faster."""
    if layout.batch is not None:
        try:
            free, places = convert(free_batch(needed, layout.batch))
            if _compare(free, x, expected, None) <= TOLERANCE:
                return free, places, None
        except ModelError:
            pass  # then it is fixed in more places than Reshape
    network, places = convert(needed)
    apart = _compare(network, x, expected, layout.batch)
    if apart > TOLERANCE:
        message = f"the converted model differs from onnxruntime by {apart:.2g} of the largest output"
        raise ModelError(message, "Export it again with opset 18, or give its weights as a state dict with --arch")
    images = x[: layout.batch or 1].clone().requires_grad_()
    if torch.autograd.grad(_flat(network(images)).sum(), images, allow_unused=True)[0] is None:
        raise ModelError("no gradient reaches the input of the ONNX model", "Give the model before it was quantised")
    return network, places, layout.batch


@torch.no_grad()
def _compare(network: nn.Module, x: Tensor, expected: NDArray[Any], batch: int | None) -> float:
    training = network.training
    device = next((t.device for t in network.parameters()), torch.device("cpu"))
    try:
        with explained("the converted model fails", "Export it again with opset 18"):
            found = OnnxClassifier(network.eval(), batch)(x.to(device)).cpu().numpy()
            return difference(found, expected.reshape(found.shape[0], -1))
    finally:
        network.train(training)


def _padded(x: Tensor, batch: int) -> Tensor:
    missing = -len(x) % batch
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


def _size(x: Tensor, layout: Layout) -> tuple[int, int]:
    height, width = x.shape[1:3] if layout.channels_last else x.shape[2:4]
    return height, width


def _flat(logits: Tensor) -> Tensor:
    return logits.flatten(1)
