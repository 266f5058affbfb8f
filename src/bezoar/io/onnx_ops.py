"""Operators that onnx2torch lacks, above all those of opset 18 and later, added through its own registry.

Two ways, both safe because every converted model is held against onnxruntime before it is used:

- a newer version of an operator whose signature has not changed takes the converter of the older version;
- operators whose signature changed, or that are missing, get a converter of their own below. A few replace one of
  onnx2torch that needs to know shapes which dynamic graphs do not tell, or that torch is about to break.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.io.extras import require

Converter = Callable[[Any, Any], Any]
Dims = tuple[int, ...]


@cache
def register() -> None:
    """Add the converters; does nothing the second time.

    Raises:
        MissingExtra: onnx or onnx2torch is missing, or its import fails (a torchvision that does not fit torch).
    """
    require("onnx", "onnx")
    require("onnx2torch", "onnx")
    registry = require("onnx2torch.node_converters.registry", "onnx")
    known = {(d.operation_type, d.version) for d in registry._CONVERTER_REGISTRY if d.domain == ""}
    for operation, versions, _ in _REPLACED:
        for version in versions:
            registry._CONVERTER_REGISTRY.pop(registry.OperationDescription("", operation, version), None)
            known.discard((operation, version))
    for operation, versions, build in (*_REPLACED, *_OWN):
        for version in versions:
            if (operation, version) not in known:
                registry.add_converter(operation, version)(partial(_convert, build))
                known.add((operation, version))
    for operation, version, older, added in _unchanged(known):
        converter = registry.get_converter(operation, older)
        registry.add_converter(operation, version)(partial(_as_before, converter, added))


def _unchanged(known: set[tuple[str, int]]) -> list[tuple[str, int, int, dict[str, Any]]]:
    """Versions that came after the newest known one and take and give as many values as it.

    Each row holds the operator, the version, the version whose converter will do, and the attributes that were added,
    with their defaults.
    """
    onnx = require("onnx", "onnx")
    schemas = {(s.name, s.since_version): s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    rows = []
    for operation, version in sorted(set(schemas) - known):
        older = max((v for o, v in known if o == operation and v < version and (o, v) in schemas), default=None)
        if older is None:
            continue
        old, new = schemas[operation, older], schemas[operation, version]
        same = len(old.inputs) == len(new.inputs) and len(old.outputs) == len(new.outputs)
        if same and set(old.attributes) <= set(new.attributes):
            added = set(new.attributes) - set(old.attributes)
            rows.append((operation, version, older, {a: _default(new.attributes[a]) for a in added}))
    return rows


def _default(attribute: Any) -> Any:
    onnx = require("onnx", "onnx")
    value = attribute.default_value
    return onnx.helper.get_attribute_value(value) if value.type else None


def _as_before(converter: Converter, added: dict[str, Any], node: Any, graph: Any) -> Any:
    """Convert as the older version did, unless the node uses what is new."""
    for name, default in added.items():
        value = node.attributes.get(name, default)
        default = default.decode() if isinstance(default, bytes) else default
        neutral = isinstance(value, list) and set(value) == {1}  # dilations
        if value != default and not neutral:
            raise NotImplementedError(f"attribute {name}={value}")
    return converter(node, graph)


def _convert(build: Callable[..., nn.Module], node: Any, _: Any) -> Any:
    common = require("onnx2torch.utils.common", "onnx")
    module = build(node.operation_type, node.attributes, len(node.output_values))
    return common.OperationConverterResult(module, common.onnx_mapping_from_node(node))


class Reduce(nn.Module):
    """The Reduce family with the axes as a second input (opset 18).

    Args:
        operation: Such as ``ReduceMean``.
        keepdims: Whether reduced axes stay with length 1.
        noop: Whether no axes means "leave it as it is" rather than "all of them".
    """

    def __init__(self, operation: str, keepdims: bool, noop: bool) -> None:
        super().__init__()
        self.operation, self.keepdims, self.noop = operation, keepdims, noop

    def forward(self, x: Tensor, axes: Tensor | None = None) -> Tensor:
        """Reduce over ``axes``."""
        dims: Dims = () if axes is None else tuple(axes.tolist())
        if not dims and self.noop:
            return x
        dims = tuple(sorted(d % x.ndim for d in dims)) or tuple(range(x.ndim))
        return _REDUCTIONS[self.operation](x, dims, self.keepdims) if dims else x


def _prod(x: Tensor, dims: Dims, keep: bool) -> Tensor:
    for dim in reversed(dims):
        x = x.prod(dim, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, Dims, bool], Tensor]] = {
    "ReduceL1": lambda x, d, k: x.abs().sum(d, keepdim=k),
    "ReduceL2": lambda x, d, k: torch.linalg.vector_norm(x, 2, d, keepdim=k),
    "ReduceLogSum": lambda x, d, k: x.sum(d, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, d, k: x.logsumexp(d, keepdim=k),
    "ReduceMax": lambda x, d, k: x.amax(d, keepdim=k),
    "ReduceMean": lambda x, d, k: x.mean(d, keepdim=k),
    "ReduceMin": lambda x, d, k: x.amin(d, keepdim=k),
    "ReduceProd": _prod,
    "ReduceSum": lambda x, d, k: x.sum(d, keepdim=k),
    "ReduceSumSquare": lambda x, d, k: x.square().sum(d, keepdim=k),
}


class Pad(nn.Module):
    """Pad with optional axes (opset 18) and wrapping (opset 19).

    Args:
        mode: ``constant``, ``reflect``, ``edge`` or ``wrap``.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        if mode not in _PAD_MODES:
            raise NotImplementedError(f"attribute mode={mode}")
        self.mode = mode

    def forward(
        self, x: Tensor, pads: Tensor, constant_value: Tensor | None = None, axes: Tensor | None = None
    ) -> Tensor:
        """Pad as ``pads`` says: what comes before each of ``axes``, then what comes after."""
        chosen = range(x.ndim) if axes is None else [int(a) % x.ndim for a in axes.tolist()]
        widths = pads.tolist()
        both = dict(zip(chosen, zip(widths[: len(chosen)], widths[len(chosen) :], strict=True), strict=True))
        flat = [w for d in reversed(range(x.ndim)) for w in both.get(d, (0, 0))]
        if self.mode == "constant":
            return F.pad(x, flat, value=0.0 if constant_value is None else float(constant_value))
        if min(flat) < 0:
            raise NotImplementedError(f"negative padding with mode={self.mode}")
        for dim, (before, after) in both.items():
            x = x.index_select(dim, _padded_index(x.shape[dim], before, after, self.mode).to(x.device))
        return x


_PAD_MODES = ("constant", "reflect", "edge", "wrap")


def _padded_index(size: int, before: int, after: int, mode: str) -> Tensor:
    """Which of ``size`` places each place of the padded axis shows."""
    index = torch.arange(-before, size + after)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(1, 2 * (size - 1))
    index = index % period
    return torch.where(index < size, index, period - index)


class Split(nn.Module):
    """Split by sizes, or into a number of equal parts of which the last may be smaller (opset 18)."""

    def __init__(self, axis: int, parts: int) -> None:
        super().__init__()
        self.axis, self.parts = axis, parts

    def forward(self, x: Tensor, split: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        """The parts."""
        size = -(-x.shape[self.axis] // self.parts)
        pieces = torch.split(x, size if split is None else split.tolist(), dim=self.axis)
        return pieces[0] if self.parts == 1 else pieces


class Slice(nn.Module):
    """Slices along some axes; steps may be negative."""

    def forward(
        self, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        """Cut out ``starts`` to ``ends``."""
        chosen = range(len(starts)) if axes is None else axes.tolist()
        widths = [1] * len(starts) if steps is None else steps.tolist()
        for start, end, axis, step in zip(starts.tolist(), ends.tolist(), chosen, widths, strict=True):
            places = range(*slice(start, end, step).indices(x.shape[axis]))
            if step == 1:
                x = x.narrow(axis, places.start, len(places))
            else:
                x = x.index_select(axis, torch.tensor(list(places), dtype=torch.long, device=x.device))
        return x


class Resize(nn.Module):
    """Resize of the image axes in the ways that torch has too.

    Args:
        attributes: Of the ONNX node.

    Raises:
        NotImplementedError: A way that torch does not have.
    """

    def __init__(self, attributes: Any) -> None:
        super().__init__()
        mode = attributes.get("mode", "nearest")
        place = attributes.get("coordinate_transformation_mode", "half_pixel")
        self.antialias = bool(attributes.get("antialias", 0))
        self.axes: list[int] | None = attributes.get("axes")
        self.mode, self.corners = self._way(mode, place, attributes.get("nearest_mode", "round_prefer_floor"))
        for name, usual in (("cubic_coeff_a", -0.75), ("exclude_outside", 0), ("keep_aspect_ratio_policy", "stretch")):
            antialiased = self.antialias and name != "keep_aspect_ratio_policy"
            if attributes.get(name, usual) != usual and not antialiased:
                raise NotImplementedError(f"attribute {name}={attributes[name]}")

    @staticmethod
    def _way(mode: str, place: str, nearest: str) -> tuple[str, bool | None]:
        if mode == "nearest":
            if (place, nearest) == ("asymmetric", "floor"):
                return "nearest", None
            if (place, nearest) == ("half_pixel", "round_prefer_floor"):
                return "nearest-exact", None
        elif place in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            return {"linear": "bilinear", "cubic": "bicubic"}[mode], place == "align_corners"
        raise NotImplementedError(f"mode={mode} with {place}, {nearest}")

    def forward(
        self, x: Tensor, _: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """Resize by ``scales`` or to ``sizes``; the region of interest belongs to a way that torch does not have."""
        axes = [a % x.ndim for a in self.axes] if self.axes else list(range(x.ndim))
        given = sizes if sizes is not None and sizes.numel() else scales
        if given is None or x.ndim != 4:
            raise NotImplementedError("Resize of something other than images")
        of_axis = dict(zip(axes, given.tolist(), strict=True))
        kept = (1.0, 1.0) if given is scales else tuple(x.shape[:2])
        if tuple(of_axis.get(d, kept[d]) for d in (0, 1)) != kept:
            raise NotImplementedError("Resize of the batch or the channels")
        target: list[Any] = [of_axis.get(d, 1.0 if given is scales else x.shape[d]) for d in (2, 3)]
        size, factor = (None, target) if given is scales else (target, None)
        return F.interpolate(x, size, factor, self.mode, self.corners, antialias=self.antialias)


class GroupNorm(nn.Module):
    """Group normalisation; scale and bias have one value per group (opset 18) or per channel (opset 21)."""

    def __init__(self, groups: int, epsilon: float) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Normalise each group, then scale and shift."""
        if len(scale) == self.groups != x.shape[1]:
            scale, bias = (t.repeat_interleave(x.shape[1] // self.groups) for t in (scale, bias))
        return F.group_norm(x, self.groups, scale, bias, self.epsilon)


class Elementwise(nn.Module):
    """A function of one or more tensors without state."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the function."""
        return self.function(*inputs)


def _global_max(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), device=x.device)


def _rms_norm(x: Tensor, scale: Tensor, *, axis: int, epsilon: float) -> Tensor:
    return F.rms_norm(x, x.shape[axis:], scale, epsilon)


def _lp_norm(x: Tensor, *, axis: int, p: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return x / norm


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _swish(x: Tensor, *, alpha: float) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _trilu(x: Tensor, k: Tensor | None = None, *, upper: bool) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def _reduce(operation: str, a: Any, _: int) -> nn.Module:
    return Reduce(operation, bool(a.get("keepdims", 1)), bool(a.get("noop_with_empty_axes", 0)))


def _gelu(_: str, a: Any, __: int) -> nn.Module:
    return nn.GELU(approximate=a.get("approximate", "none"))


def _group_norm(_: str, a: Any, __: int) -> nn.Module:
    return GroupNorm(a["num_groups"], a.get("epsilon", 1e-5))


def _trilu_module(_: str, a: Any, __: int) -> nn.Module:
    return Elementwise(partial(_trilu, upper=bool(a.get("upper", 1))))


def _rms_norm_module(_: str, a: Any, __: int) -> nn.Module:
    return Elementwise(partial(_rms_norm, axis=a.get("axis", -1), epsilon=a.get("epsilon", 1e-5)))


def _layer_norm_module(_: str, a: Any, outputs: int) -> nn.Module:
    if outputs > 1:
        raise NotImplementedError("outputs of mean and deviation")
    return Elementwise(partial(_layer_norm, axis=a.get("axis", -1), epsilon=a.get("epsilon", 1e-5)))


def _instance_norm_module(_: str, a: Any, __: int) -> nn.Module:
    return Elementwise(partial(_instance_norm, epsilon=a.get("epsilon", 1e-5)))


def _lp_norm_module(_: str, a: Any, __: int) -> nn.Module:
    return Elementwise(partial(_lp_norm, axis=a.get("axis", -1), p=a.get("p", 2)))


def _swish_module(_: str, a: Any, __: int) -> nn.Module:
    return Elementwise(partial(_swish, alpha=a.get("alpha", 1.0)))


_Row = tuple[str, tuple[int, ...], Callable[[str, Any, int], nn.Module]]
# Operator, versions, what builds the module from (operator, attributes, number of outputs).
_REPLACED: tuple[_Row, ...] = (
    ("InstanceNormalization", (1, 6), _instance_norm_module),
    ("LayerNormalization", (17,), _layer_norm_module),
    ("Slice", (10, 11, 13), lambda *_: Slice()),
)
# The same; versions that are known already are left alone.
_OWN: tuple[_Row, ...] = (
    *((name, (18, 20, 28) if name in ("ReduceMax", "ReduceMin") else (18,), _reduce) for name in _REDUCTIONS),
    ("Pad", (18,), lambda _, a, __: Pad(a.get("mode", "constant"))),
    ("Split", (18,), lambda _, a, parts: Split(a.get("axis", 0), parts)),
    ("Resize", (18,), lambda _, a, __: Resize(a)),
    ("Gelu", (20,), _gelu),
    ("GroupNormalization", (18,), _group_norm),
    ("GlobalMaxPool", (1,), lambda *_: Elementwise(_global_max)),
    ("LpNormalization", (1,), _lp_norm_module),
    ("Mish", (18,), lambda *_: nn.Mish()),
    ("RMSNormalization", (23,), _rms_norm_module),
    ("Size", (1, 13), lambda *_: Elementwise(_size)),
    ("Swish", (24,), _swish_module),
    ("Trilu", (14,), _trilu_module),
)
