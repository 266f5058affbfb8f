"""Conversion of an ONNX graph to a torch module that remembers which weight came from where."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bezoar.core.errors import ModelError
from bezoar.io.extras import one_line, require
from bezoar.io.onnx_file import Model, check_sizes
from bezoar.io.onnx_ops import register

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div")
_NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
#: Operators whose constant inputs are weights, rather than sizes, bounds or scales of a picture.
_WEIGHTED = frozenset(
    (*_ELEMENTWISE, *_NORMS, "Concat", "Conv", "ConvTranspose", "Einsum", "Expand", "Gather", "Gemm", "MatMul", "PRelu")
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of the module stands in the graph.

    Attributes:
        key: In the module's state dict.
        node: Number of the node that uses it.
        position: Of the node's input.
        transposed: Whether the module holds it transposed.
        scale: What it was multiplied by.
    """

    key: str
    node: int
    position: int
    transposed: bool = False
    scale: float = 1.0

    def as_module(self, stored: Tensor, shape: torch.Size) -> Tensor | None:
        """The stored tensor as the module holds it, or None if it cannot be."""
        value = stored.T if self.transposed and stored.ndim == 2 else stored
        return (
            (value * self.scale if self.scale != 1 else value).reshape(shape)
            if value.numel() == shape.numel()
            else None
        )

    def as_stored(self, held: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The reverse."""
        value = held / self.scale if self.scale != 1 else held
        return (value.T if self.transposed else value).reshape(shape)


def convert(model: Model) -> tuple[nn.Module, list[Place]]:
    """Convert a simplified and cut model.

    Args:
        model: Not changed.

    Returns:
        The module in eval mode, weights as parameters, and where each of them comes from. Parameters without a place
        (constants that the file has no tensor for) are frozen.

    Raises:
        ModelError: Operators that cannot be converted, named with their opset.
    """
    register()
    onnx2torch = require("onnx2torch", "onnx")
    copy = type(model).FromString(model.SerializeToString())
    for node in copy.graph.node:
        _without_allowzero(node)
    copy = check_sizes(copy)
    _check_operators(copy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about small differences, which are measured afterwards
            network: fx.GraphModule = onnx2torch.convert(copy, attach_onnx_mapping=True).eval()
    except Exception as error:
        raise _failed(copy, error) from None
    constants = {i.name: i for i in copy.graph.initializer}
    places = [*_folded(network, copy, constants), *_passed(network, copy)]
    _make_parameters(network, copy, places)
    held = {p.key for p in places}
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key in held)
    return network, places


def write_weights(model: Model, network: nn.Module, places: list[Place]) -> None:
    """Put the network's weights into the model, in place.

    A tensor that several nodes share and that is no longer the same for all of them is split.

    Raises:
        ModelError: The network has another structure.
    """
    onnx = require("onnx", "onnx")
    state = network.state_dict()
    constants = {i.name: i for i in model.graph.initializer}
    written: dict[str, list[tuple[str, Tensor]]] = {}
    for place in places:
        node = model.graph.node[place.node]
        original = constants[node.input[place.position]]
        if place.key not in state:
            raise ModelError(f"the network has no {place.key}", "Only weights may change, not the structure")
        before = onnx.numpy_helper.to_array(original)
        try:
            held = place.as_stored(state[place.key].detach().cpu(), before.shape).contiguous()
        except RuntimeError:
            raise ModelError(f"{place.key} has another shape", "Only weights may change, not the structure") from None
        versions = written.setdefault(original.name, [])
        name = next((n for n, value in versions if torch.equal(value, held)), None)
        if name is None:
            name = original.name if not versions else f"{original.name}_{len(versions) + 1}_of_{node.name}"
            versions.append((name, held))
        node.input[place.position] = name
    for original_name, versions in written.items():
        _store(model, constants[original_name], versions)


def _store(model: Model, original: Any, versions: list[tuple[str, Tensor]]) -> None:
    onnx = require("onnx", "onnx")
    kind = onnx.helper.tensor_dtype_to_np_dtype(original.data_type)
    for name, value in versions:
        tensor = onnx.numpy_helper.from_array(value.numpy().astype(kind), name)
        if name == original.name:
            original.CopyFrom(tensor)
        else:
            model.graph.initializer.append(tensor)


def _without_allowzero(node: Any) -> None:
    # 0 in a shape means "no pixels" with allowzero and "as before" without; classifiers have no empty tensors.
    if node.op_type == "Reshape":
        kept = [a for a in node.attribute if a.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)


def free_batch(model: Model, batch: int) -> Model:
    """A copy that takes any number of images, where only shapes given to ``Reshape`` had the batch size fixed."""
    onnx = require("onnx", "onnx")
    free = type(model).FromString(model.SerializeToString())
    graph = free.graph
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    constants = {i.name: i for i in graph.initializer}
    for number, node in enumerate(graph.node):
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        dims = onnx.numpy_helper.to_array(shape).copy() if shape is not None else np.zeros(0)
        if len(dims) and dims[0] == batch:
            dims[0] = 0 if -1 in dims else -1
            _without_allowzero(node)
            node.input[1] = f"{node.input[1]}_free_{number}"
            graph.initializer.append(onnx.numpy_helper.from_array(dims, node.input[1]))
    return free


def _opsets(model: Model) -> dict[str, int]:
    return {o.domain: o.version for o in model.opset_import}


def _check_operators(model: Model) -> None:
    registry = require("onnx2torch.node_converters.registry", "onnx")
    opset = _opsets(model).get("", 0)
    missing = set()
    for node in model.graph.node:
        try:
            registry.get_converter(node.op_type, opset, node.domain)
        except Exception:  # NotImplementedError, or what onnx raises for an operator that it does not know
            missing.add(node.op_type)
    if missing:
        message = f"operators that cannot be converted, at opset {opset}: {', '.join(sorted(missing))}"
        raise ModelError(message, "Export the model again, with opset 18, or give its weights as a state dict")


def _failed(model: Model, error: Exception) -> ModelError:
    """Name the first node that cannot be converted."""
    registry = require("onnx2torch.node_converters.registry", "onnx")
    graph = require("onnx2torch.onnx_graph", "onnx").OnnxGraph(model.graph)
    opset = _opsets(model).get("", 0)
    for node in graph.nodes.values():
        try:
            registry.get_converter(node.operation_type, opset, node.domain)(node, graph)
        except Exception as reason:
            where = f"{node.operation_type} at opset {opset} (node {node.unique_name})"
            hint = "Export the model again, with opset 18, or give its weights as a state dict"
            return ModelError(f"the operator {where} cannot be converted: {one_line(reason)}", hint)
    return ModelError(f"the graph cannot be converted: {one_line(error)}", "Export the model again with opset 18")


def _modules(network: nn.Module, model: Model) -> Iterator[tuple[int, Any, str, Any]]:
    """Each node's number and itself, with the name of the module that does its work, and that module."""
    for number, node in enumerate(model.graph.node):
        yield number, node, node.name, network.get_submodule(node.name)


def _folded(network: nn.Module, model: Model, constants: dict[str, Any]) -> list[Place]:
    """Weights that became parameters of a module: both sides are walked in order, values must agree."""
    onnx = require("onnx", "onnx")
    places = []
    for number, node, name, module in _modules(network, model):
        tensors = list(module.state_dict().items())
        passed = set(module.onnx_mapping.inputs)
        for position, source in enumerate(node.input):
            if source not in constants or source in passed or not tensors:
                continue
            stored = torch.from_numpy(onnx.numpy_helper.to_array(constants[source]).copy())
            for key, held in tensors:
                place = _place(node, number, position, f"{name}.{key}")
                value = place.as_module(stored, held.shape)
                if value is not None and value.dtype == held.dtype and torch.equal(value, held):
                    places.append(place)
                    tensors.remove((key, held))
                    break
    return places


def _place(node: Any, number: int, position: int, key: str) -> Place:
    if node.op_type != "Gemm":
        return Place(key, number, position)
    attributes = {a.name: a.i or a.f for a in node.attribute}
    if position == 1:
        return Place(key, number, 1, not attributes.get("transB", 0), float(attributes.get("alpha", 1.0)))
    return Place(key, number, position, False, float(attributes.get("beta", 1.0)))


def _passed(network: fx.GraphModule, model: Model) -> list[Place]:
    """Weights that the module gets as arguments: read off the torch graph."""
    places = []
    of_name = {name: (number, node, module) for number, node, name, module in _modules(network, model)}
    for call in network.graph.nodes:
        if call.op != "call_module":
            continue
        number, node, module = of_name[str(call.target)]
        sources = [s for s in module.onnx_mapping.inputs if s]
        given = [*call.args, *call.kwargs.values()]
        for source, argument in zip(sources, given, strict=True):
            if argument.op == "get_attr" and network.get_buffer(str(argument.target)).is_floating_point():
                places.append(Place(str(argument.target), number, list(node.input).index(source)))
    return places


def _make_parameters(network: nn.Module, model: Model, places: list[Place]) -> None:
    """Turn weights that onnx2torch keeps as buffers into parameters, or training would not touch them.

    Single numbers (such as the root of 2 in a GELU) stay buffers, and so do those that only normalise the input.
    """
    prepared = {i.name for i in model.graph.input}
    constants = {i.name for i in model.graph.initializer}
    fixed = set()
    for number, node in enumerate(model.graph.node):
        inputs = [i for i in node.input if i not in constants]
        if node.op_type in _ELEMENTWISE and inputs and prepared.issuperset(inputs):
            prepared.update(node.output)
            fixed.add(number)
        if node.op_type not in _WEIGHTED:
            fixed.add(number)
    container = getattr(network, "initializers", None)  # absent where every weight went into a module
    if not isinstance(container, nn.Module):
        return
    for place in places:
        owner, _, name = place.key.rpartition(".")
        statistic = model.graph.node[place.node].op_type == "BatchNormalization" and place.position > 2
        if owner == "initializers" and place.node not in fixed and not statistic and name in container._buffers:
            value = container.get_buffer(name)
            if value.numel() > 1:
                del container._buffers[name]
                container.register_parameter(name, nn.Parameter(value))
