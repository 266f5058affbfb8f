"""ONNX files: opened without trusting them, simplified for conversion, run with onnxruntime."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.core.errors import BezoarError, ModelError
from bezoar.io.data_readers._base import inside
from bezoar.io.extras import one_line, require

#: Most bytes of a model with all its weights: protobuf cannot hold more.
FILE_CAP = (2 << 30) - (1 << 20)
#: Most values of one tensor that the graph computes, where that is known beforehand.
VALUES_CAP = 1 << 30
#: Most values of the input, where the file fixes its shape.
INPUT_CAP = 1 << 26
_MAIN_DOMAINS = ("", "ai.onnx")
_HALF = {10: "float16", 16: "bfloat16"}
Model = Any  # onnx.ModelProto: onnx is optional


@contextmanager
def explained(what: str, hint: str) -> Iterator[None]:
    """Turn whatever a library raises into a ModelError of one line."""
    try:
        yield
    except BezoarError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {one_line(error)}", hint) from None


def open_model(path: Path) -> Model:
    """Read and check a model with all its weights.

    Raises:
        ModelError: Damaged, hostile, too large, or in need of something that is not supported.
        MissingExtra: onnx is missing.
    """
    onnx = require("onnx", "onnx")
    if path.stat().st_size > FILE_CAP:
        raise ModelError(f"{path} has more than {FILE_CAP >> 20} MiB", "ONNX models of 2 GB and more are not supported")
    with explained(f"{path} is not a valid ONNX file", "It is damaged or of another format: export or fetch it again"):
        model = onnx.load_model_from_string(path.read_bytes())
        if not model.graph.node:
            raise ModelError(f"{path} holds no operators", "Export or fetch it again")
        _refuse_unsupported(model)
        _load_external(model, path)
        _check_tensors(model)
        onnx.checker.check_model(model)
        if model.functions:
            require("onnx.inliner", "onnx")
            model = onnx.inliner.inline_local_functions(model)
    return model


def _tensors(model: Model) -> Iterator[Any]:
    yield from model.graph.initializer
    for nodes in (model.graph.node, *(f.node for f in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _refuse_unsupported(model: Model) -> None:
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    own = {(f.domain, f.name) for f in model.functions}
    foreign = sorted(
        {
            f"{n.domain}::{n.op_type}"
            for n in nodes
            if n.domain not in _MAIN_DOMAINS and (n.domain, n.op_type) not in own
        }
    )
    if foreign:
        message = f"operators of custom domains are not supported: {', '.join(foreign[:5])}"
        raise ModelError(message, "Export the model again with the standard operators of ONNX only")
    nested = sorted({n.op_type for n in nodes for a in n.attribute if a.HasField("g") or a.graphs})
    if nested:
        message = f"operators with a graph inside are not supported: {', '.join(nested)}"
        raise ModelError(message, "Export the model again without branches and loops")
    sparse = len(model.graph.sparse_initializer) or any(a.HasField("sparse_tensor") for n in nodes for a in n.attribute)
    if sparse:
        raise ModelError("sparse weights are not supported", "Export the model again with dense weights")


def _load_external(model: Model, path: Path) -> None:
    """Take weights that lie in files of their own into the model: regular files of the same folder only."""
    onnx = require("onnx", "onnx")
    total = path.stat().st_size
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        file = inside(path.parent, location) if location else None
        if file is None:
            message = f"the weights {tensor.name!r} lie in {location!r}, which is no file of the folder {path.parent}"
            raise ModelError(message, "Put the file that came with the model next to it; weights elsewhere are refused")
        size = _bytes(tensor)
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", size))
        total += size
        if length != size or offset < 0 or offset + size > file.stat().st_size:
            message = f"the weights {tensor.name!r} claim {size:,} bytes at {offset:,} of {file.name}, which do not fit"
            raise ModelError(message, "The files are damaged or do not belong together: fetch them again")
        if total > FILE_CAP:
            raise ModelError(
                f"{path} needs more than {FILE_CAP >> 20} MiB", "Models of 2 GB and more are not supported"
            )
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(size)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


def _bytes(tensor: Any) -> int:
    onnx = require("onnx", "onnx")
    count = math.prod(max(dim, 0) for dim in tensor.dims)
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _check_tensors(model: Model) -> None:
    """Every tensor holds as many values as its shape says, and weights are finite float32."""
    onnx = require("onnx", "onnx")
    broken = []
    for tensor in _tensors(model):
        if tensor.data_type in _HALF:
            message = f"the weights {tensor.name!r} are {_HALF[tensor.data_type]}"
            raise ModelError(message, "Export the model in float32")
        values = onnx.numpy_helper.to_array(tensor)  # raises where shape and data disagree; takes no memory before
        if values.dtype.kind == "f" and not np.isfinite(values).all() and values.ndim:
            broken.append(tensor.name)
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ModelError(f"NaN or Inf in the weights {', '.join(broken[:3])}{more}", "Export or fetch the model again")


def simplify(model: Model) -> None:
    """Bring a checked model into the form that is converted and written back; what it computes stays the same.

    Constants become initializers, copies of constants (``Identity``) are replaced by what they copy, outputs that
    nobody reads are dropped, and every node gets a name of its own.
    """
    for entry in model.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    model.ir_version = max(model.ir_version, 4)  # from 4 on, initializers need not be inputs as well
    _lift_constants(model.graph)
    _drop_copies(model.graph)
    _drop_unread_outputs(model.graph)
    fixed = {i.name for i in model.graph.initializer}
    kept = [i for i in model.graph.input if i.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    names: set[str] = set()
    for node in model.graph.node:
        node.domain = "" if node.domain == "ai.onnx" else node.domain
        name = re.sub(r"[^A-Za-z0-9_]+", "_", node.name).strip("_") or node.op_type
        number = 1
        while name in names or not name or name[0].isdigit():
            name, number = f"{node.op_type}_{number}", number + 1
        names.add(name)
        node.name = name


def _lift_constants(graph: Any) -> None:
    onnx = require("onnx", "onnx")
    kept, types = (
        [],
        {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64},
    )
    for node in graph.node:
        attribute = node.attribute[0] if node.op_type == "Constant" and len(node.attribute) == 1 else None
        if attribute is not None and attribute.name == "value":
            graph.initializer.append(attribute.t)
            graph.initializer[-1].name = node.output[0]
        elif attribute is not None and attribute.name in types:
            values = np.array(onnx.helper.get_attribute_value(attribute), dtype=types[attribute.name])
            graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _drop_copies(graph: Any) -> None:
    constants = {i.name for i in graph.initializer}
    outputs = {o.name for o in graph.output}
    stands_for: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = stands_for.get(name, name)
        if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs:
            stands_for[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _drop_unread_outputs(graph: Any) -> None:
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for node in graph.node:
        while len(node.output) > 1 and node.output[-1] not in read:
            del node.output[-1]


def check_sizes(model: Model) -> Model:
    """The model with the shapes of what it computes.

    Raises:
        ModelError: Shapes contradict each other, or a tensor would take more memory than any classifier needs.
    """
    onnx = require("onnx", "onnx")
    require("onnx.shape_inference", "onnx")
    with explained("the shapes in the ONNX graph contradict each other", "Export or fetch the model again"):
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for value in inferred.graph.value_info:
        count = math.prod(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
        if count > VALUES_CAP:
            message = f"the graph computes a tensor {value.name!r} of {count:,} values"
            raise ModelError(message, "No image classifier needs that: do not trust where the file came from")
    return inferred


@dataclass(frozen=True)
class Layout:
    """Input and output of a classifier.

    Attributes:
        name: Of the input.
        batch: Batch size that was fixed at export; None if any will do.
        channels, size: Colours, and (height, width); None where the file leaves them open.
        channels_last: Whether images go in as (B, H, W, C).
        output: Name of the output with the logits.
        probabilities: Whether the file goes on with a softmax, which is left out of the network.
    """

    name: str
    batch: int | None
    channels: int | None
    size: tuple[int, int] | None
    channels_last: bool
    output: str
    probabilities: bool

    @classmethod
    def of(cls, model: Model) -> Layout:
        """Find them in a simplified model.

        Raises:
            ModelError: It is not an image classifier.
        """
        inputs = model.graph.input
        if len(inputs) != 1:
            raise ModelError(f"the graph takes {len(inputs)} inputs", "Give an image classifier with one input")
        kind = inputs[0].type.tensor_type
        dims = [d.dim_value or None for d in kind.shape.dim]
        if kind.elem_type != 1 or len(dims) != 4:
            message = f"the input {inputs[0].name!r} is not float32 of shape (B, C, H, W)"
            raise ModelError(message, "Export the classifier so that it takes a batch of float32 images")
        if math.prod(d or 1 for d in dims) > INPUT_CAP:
            message = f"the input {inputs[0].name!r} claims the shape {tuple(dims)}"
            raise ModelError(message, "Export the classifier with a batch size of 1 or an open one")
        last = dims[3] in (1, 3) and dims[1] not in (1, 3)
        channels, height, width = (dims[3], dims[1], dims[2]) if last else (dims[1], dims[2], dims[3])
        output, probabilities = _logits(model.graph)
        size = (height, width) if height and width else None
        return cls(inputs[0].name, dims[0], channels, size, last, output, probabilities)

    def example(self, batch: int, channels: int, size: tuple[int, int]) -> Tensor:
        """Random images in [0, 1], the same at each call, with the axes in the order that the graph takes."""
        x = torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0))
        return x.permute(0, 2, 3, 1).contiguous() if self.channels_last else x


def _logits(graph: Any) -> tuple[str, bool]:
    """The output to use: the first of two dimensions; before a softmax, which would flatten the gradients."""
    shapes = {o.name: len(o.type.tensor_type.shape.dim) for o in graph.output if o.type.tensor_type.elem_type == 1}
    name = next((n for n, rank in shapes.items() if rank == 2), graph.output[0].name)
    maker = next((n for n in graph.node if name in n.output), None)
    if maker is None:
        raise ModelError(f"the output {name!r} is computed by no operator", "Export or fetch the model again")
    return (maker.input[0], True) if maker.op_type == "Softmax" else (name, False)


def cut(model: Model, output: str) -> None:
    """Leave only what one value needs, and make it the output."""
    onnx = require("onnx", "onnx")
    graph = model.graph
    needed, kept = {output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    values = {v.name: v for v in (*graph.value_info, *graph.output)}
    info = values.get(output) or onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    initializers = [i for i in graph.initializer if i.name in needed]
    for repeated, content in ((graph.node, kept[::-1]), (graph.output, [info]), (graph.initializer, initializers)):
        content = [type(c).FromString(c.SerializeToString()) for c in content]
        del repeated[:]
        repeated.extend(content)


def reference(model: Model, x: Tensor, batch: int | None) -> NDArray[Any]:
    """What onnxruntime makes of a cut model: the first output for ``x``, in pieces of ``batch``.

    Raises:
        ModelError: onnxruntime refuses the model or fails.
        MissingExtra: onnxruntime is missing.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    with explained("onnxruntime cannot run the model", "Export or fetch the model again"):
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        step = batch or len(x)
        pieces = [x[i : i + step].numpy() for i in range(0, len(x), step)]
        return np.concatenate([np.asarray(session.run(None, {name: piece})[0]) for piece in pieces])


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference relative to the largest value; infinite where shapes differ or values are not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-6))
