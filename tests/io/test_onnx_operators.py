from pathlib import Path

import numpy as np
import pytest
import torch

from tests.io.onnx_models import close, graph, helper, load, run, saved, weight

OPERATORS = {
    "pad-constant-axes": (18, [("Pad", ["x", "p2", "", "axes"], {})], {"p2": [1, 2, 3, 4], "axes": [3, 2]}),
    "pad-edge": (18, [("Pad", ["x", "p8"], {"mode": "edge"})], {"p8": [0, 0, 1, 2, 0, 0, 3, 4]}),
    "pad-reflect": (19, [("Pad", ["x", "p8"], {"mode": "reflect"})], {"p8": [0, 0, 1, 2, 0, 0, 3, 4]}),
    "pad-wrap": (19, [("Pad", ["x", "p8"], {"mode": "wrap"})], {"p8": [0, 0, 1, 2, 0, 0, 3, 4]}),
    "pad-crop": (21, [("Pad", ["x", "p8"], {})], {"p8": [0, 0, -1, 2, 0, 0, 3, -2]}),
    "average-pool": (
        19,
        [("AveragePool", ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "dilations": [1, 1]})],
        {},
    ),
    "split": (18, [("Split", ["x"], {"num_outputs": 2, "axis": 3})], {}),
    "resize-linear": (
        18,
        [("Resize", ["x", "", "s4"], {"mode": "linear"})],
        {"s4": np.array([1, 1, 2, 1.5], np.float32)},
    ),
    "resize-sizes": (19, [("Resize", ["x", "", "", "z4"], {"mode": "linear"})], {"z4": [2, 3, 5, 12]}),
    "resize-axes": (18, [("Resize", ["x", "", "", "z2"], {"mode": "cubic", "axes": [2, 3]})], {"z2": [16, 16]}),
    "resize-align": (
        18,
        [
            (
                "Resize",
                ["x", "", "", "z2"],
                {"mode": "linear", "axes": [2, 3], "coordinate_transformation_mode": "align_corners"},
            )
        ],
        {"z2": [13, 5]},
    ),
    "resize-nearest": (
        18,
        [("Resize", ["x", "", "s4"], {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"})],
        {"s4": np.array([1, 1, 2, 3], np.float32)},
    ),
    "resize-antialias": (
        18,
        [("Resize", ["x", "", "", "z2"], {"mode": "linear", "axes": [2, 3], "antialias": 1, "exclude_outside": 1})],
        {"z2": [4, 4]},
    ),
    "gelu": (20, [("Gelu", ["x"], {})], {}),
    "gelu-tanh": (20, [("Gelu", ["x"], {"approximate": "tanh"})], {}),
    "mish": (18, [("Mish", ["x"], {})], {}),
    "group-norm-21": (
        21,
        [("GroupNormalization", ["x", "g3", "h3"], {"num_groups": 1})],
        {"g3": weight(3), "h3": weight(3)},
    ),
    "layer-norm": (17, [("LayerNormalization", ["x", "g8", "h8"], {})], {"g8": weight(8), "h8": weight(8)}),
    "lp-norm": (18, [("LpNormalization", ["x"], {"axis": 1, "p": 2})], {}),
    "reshape": (19, [("Reshape", ["x", "shape"], {"allowzero": 1})], {"shape": [-1, 3, 4, 16]}),
    "cast": (19, [("Cast", ["x"], {"to": 11}), ("Cast", [0], {"to": 1})], {}),
    "trilu": (18, [("Trilu", ["x", "k"], {"upper": 0})], {"k": np.array(1)}),
    "rms-norm": (23, [("RMSNormalization", ["x", "g8"], {})], {"g8": weight(8)}),
    "clip": (18, [("Clip", ["x", "lo", "hi"], {})], {"lo": np.float32(0.2), "hi": np.float32(0.7)}),
}
OPERATORS |= {
    f"{op}-{keep}": (20, [(op, ["x", "a2"], {"keepdims": keep})], {"a2": [-1, 1] if keep == 0 else [-1, 2]})
    for op in ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd")
    for keep in (0, 1)
}
OPERATORS |= {
    "reduce-noop": (18, [("ReduceMean", ["x"], {"noop_with_empty_axes": 1})], {}),
    "reduce-square": (18, [("ReduceSumSquare", ["x", "a1"], {"keepdims": 1})], {"a1": [1]}),
    "reduce-sum": (18, [("ReduceSum", ["x", "a1"], {"keepdims": 1})], {"a1": [1]}),
}


#: Channels that are left, where they are not 3.
OUTPUTS = {"reduce-square": 1, "reduce-sum": 1}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, tmp_path: Path) -> None:
    """Each operator before a linear layer; the reader itself compares with onnxruntime, and so does the test."""
    opset, steps, constants = OPERATORS[name]
    nodes, last = [], "x"
    for i, (operation, inputs, attributes) in enumerate(steps):
        outputs = [f"v{i}", f"v{i}b"] if operation == "Split" else [f"v{i}"]
        nodes.append(helper.make_node(operation, [last if v == 0 else v for v in inputs], outputs, **attributes))
        last = outputs[-1]
    weights = {k: np.asarray(v) for k, v in constants.items()}
    # What is left of (n, 3, 8, 8) is brought to (n, k) and through a linear layer.
    if name.endswith("-0"):
        nodes.append(helper.make_node("Flatten", [last], ["p"]))
    else:
        nodes.append(helper.make_node("ReduceMean", [last, "pool"], ["p"], keepdims=0))
        weights["pool"] = np.array([2, 3])
        if opset < 18:
            nodes[-1] = helper.make_node("ReduceMean", [last], ["p"], keepdims=0, axes=[2, 3])
    weights["w"] = weight(OUTPUTS.get(name, 8 if name.endswith("-0") else 3), 4)
    nodes.append(helper.make_node("MatMul", ["p", "w"], ["y"]))
    shape = (2 if name == "resize-sizes" else "n", 3, 8, 8)
    model = graph(nodes, weights, shape, opset, ("n", "k"))
    model.ir_version = 10
    path = saved(model, tmp_path / "a.onnx")
    loaded, module = load(path)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    x.requires_grad_()
    assert close(module(x).detach(), run(path, x.detach()))
    (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert gradient.abs().sum() > 0
