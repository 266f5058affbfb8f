import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bezoar.core.errors import BezoarError, ModelError
from tests.io.onnx_models import linear, load, saved, weight

onnx = pytest.importorskip("onnx", reason="reading ONNX needs bezoar[onnx]", exc_type=Exception)
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def _outside(path: Path):
    (path / "in").mkdir()
    onnx.save(linear(), path / "in" / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    (path / "in" / "a.data").rename(path / "a.data")
    model = onnx.load(path / "in" / "a.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../a.data"
    return saved(model, path / "in" / "a.onnx")


def _linked_outside(path: Path):
    file = _outside(path)
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "a.data" if entry.key == "location" else entry.value
    (path / "in" / "a.data").symlink_to(path / "a.data")
    return saved(model, file)


def _external(key: str, value: str):
    def build(path: Path):
        onnx.save(linear(), path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
        model = onnx.load(path / "a.onnx", load_external_data=False)
        tensor = model.graph.initializer[0]
        if key == "dims":
            tensor.dims[0] = int(value)
        for entry in tensor.external_data:
            entry.value = value if entry.key == key else entry.value
        return saved(model, path / "a.onnx")

    return build


def _hand(change):
    def build(path: Path):
        model = linear()
        change(model)
        return saved(model, path / "a.onnx")

    return build


def _nan(model) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight(3, 4) * np.nan, "w"))


def _huge_dims(model) -> None:
    model.graph.initializer[1].dims[0] = 10**15


def _huge_constant(model) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([10**6, 10**6]), "big"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["big"], ["zeros"]))
    model.graph.node.insert(1, helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["y0", "zero"], ["y"]))
    model.graph.node[3].output[0] = "y0"


def _huge_batch(model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**9


def _custom(model) -> None:
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _unknown_operator(model) -> None:
    model.graph.node[1].CopyFrom(helper.make_node("Hardmax", ["m"], ["y"]))


def _branch(model) -> None:
    then = helper.make_graph(
        [helper.make_node("Identity", ["m"], ["t"])], "t", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    model.graph.node[1].CopyFrom(helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then))


def _half(model) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight(3, 4).astype(np.float16), "w"))


def _sparse(model) -> None:
    model.graph.sparse_initializer.add()


def _two_inputs(model) -> None:
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1,)))


def _integers(model) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def _no_gradient(model) -> None:
    model.graph.node[0].output[0] = "m0"
    model.graph.node.insert(1, helper.make_node("Cast", ["m0"], ["i"], to=TensorProto.INT64))
    model.graph.node.insert(2, helper.make_node("Cast", ["i"], ["m"], to=TensorProto.FLOAT))


def _cut_off(path: Path):
    file = saved(linear(), path / "a.onnx")
    file.write_bytes(file.read_bytes()[:150])
    return file


def _text(path: Path):
    (path / "a.onnx").write_text("not a model at all, whatever its name says")
    return path / "a.onnx"


HOSTILE = {
    "truncated": (_cut_off, "not a valid ONNX file"),
    "text": (_text, "not a valid ONNX file"),
    "external data outside": (_outside, "is no file of the folder"),
    "external data linked outside": (_linked_outside, "is no file of the folder"),
    "external data at an absolute path": (_external("location", "/etc/passwd"), "is no file of the folder"),
    "external data beyond the end": (_external("offset", "100000"), "do not fit"),
    "external data of a negative offset": (_external("offset", "-8"), "do not fit"),
    "external data of petabytes": (_external("dims", str(10**14)), "do not fit"),
    "NaN weights": (_hand(_nan), "NaN or Inf in the weights w"),
    "weights of petabytes": (_hand(_huge_dims), "not a valid ONNX file"),
    "graph that computes terabytes": (_hand(_huge_constant), "of 1,000,000,000,000 values"),
    "batch of a billion": (_hand(_huge_batch), "claims the shape"),
    "custom operator": (_hand(_custom), "custom domains are not supported: com.example::Gemm"),
    "operator without converter": (_hand(_unknown_operator), "cannot be converted, at opset 18: Hardmax"),
    "branch": (_hand(_branch), "a graph inside are not supported: If"),
    "half precision": (_hand(_half), "float16"),
    "sparse": (_hand(_sparse), "sparse weights"),
    "two inputs": (_hand(_two_inputs), "takes 2 inputs"),
    "integer input": (_hand(_integers), "not float32"),
    "rounded": (_hand(_no_gradient), "no gradient"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, tmp_path: Path) -> None:
    build, fragment = HOSTILE[name]
    path = build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError) as caught:
        load(path)
    assert fragment in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


GOOD = linear().SerializeToString()
#: Places, as shares of the length, and what is written there.
DAMAGE = st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3),
    st.floats(0, 1),
)
def test_fuzz(changes: list[tuple[float, bytes]], cut: float) -> None:
    """Random damage gives a BezoarError or a model that works."""
    content = bytearray(GOOD)
    for place, new in changes:
        at = int(place * len(content))
        content[at : at + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        path.write_bytes(content[: int(cut * len(content))] if cut < 0.5 else content)
        try:
            loaded, module = load(path)
        except BezoarError as error:
            assert error.message
            return
        assert torch.isfinite(module(torch.rand(2, 3, *(loaded.size or (8, 8))))).all()
