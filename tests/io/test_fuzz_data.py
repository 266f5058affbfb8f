"""Random damage to data files: a BezoarError or good data may come out, nothing else, in bounded time and memory."""

import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bezoar.core.errors import BezoarError
from bezoar.io.data import load_data
from tests.io.hostile_data import labels, pixels, png

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
#: Changes of a file: (place as a share of its length, new bytes, whether to cut there).
DAMAGE = st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def damaged(content: bytes, changes: list[tuple[float, bytes]], cut: float) -> bytes:
    out = bytearray(content)
    for place, new in changes:
        at = int(place * len(out))
        out[at : at + len(new)] = new
    return bytes(out[: int(cut * len(out))] if cut < 0.9 else out)


def good_or_refused(source: Any) -> bool:
    """Whether it loaded; anything but good data or a BezoarError is a failure."""
    try:
        data = load_data(source, num_classes=None, size=None, channels=None)
    except BezoarError as error:
        assert error.message
        assert error.hint
        return False
    assert torch.isfinite(data.x).all()
    assert data.x.min() >= 0
    assert data.x.max() <= 1
    assert len(data.x) == len(data.y) == sum(data.facts.per_class)
    return True


def written(content: bytes, name: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        return good_or_refused(file)


def npz_bytes(x: bytes | None = None, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, x=pixels(), y=labels())
    if x is not None:
        y = io.BytesIO()
        np.save(y, labels())
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x.npy", x)
            archive.writestr("y.npy", y.getvalue())
    return buffer.getvalue()


NPZ, NPZ_COMPRESSED = npz_bytes(), npz_bytes(compressed=True)


def test_undamaged_files_load() -> None:
    assert written(NPZ, "a.npz")
    assert written(NPZ_COMPRESSED, "a.npz")
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (12, 8, 8, 3)}"
    assert written(npz_bytes(npy(header, pixels().tobytes())), "a.npz")


@QUICK
@given(DAMAGE, st.floats(0, 1), st.booleans())
def test_npz_container(changes: list[tuple[float, bytes]], cut: float, compressed: bool) -> None:
    written(damaged(NPZ_COMPRESSED if compressed else NPZ, changes, cut), "a.npz")


def npy(header: str, body: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("utf-8")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text) & 0xFFFF)
    return b"\x93NUMPY" + bytes(version) + size + text + body


DTYPES = st.sampled_from(
    ["|u1", "<f4", ">f8", "<i8", "|O", "|b1", "<f2", "<c8", "|S5", "<U3", "|V7", "<M8[s]", "x", "<u1000000000"]
)
SHAPES = st.lists(st.integers(-2, 2**63) | st.integers(0, 12), max_size=5)


@QUICK
@given(DTYPES | st.text(max_size=6), SHAPES, st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]), st.integers(0, 4000))
def test_npy_headers(dtype: str, shape: list[int], version: tuple[int, int], size: int) -> None:
    header = repr({"descr": dtype, "fortran_order": False, "shape": tuple(shape)})
    written(npz_bytes(npy(header, bytes(size), version)), "a.npz")


@QUICK
@given(st.text(alphabet="{}()[]'\",:x0123456789deshapfort_ \n", max_size=200) | st.just("(" * 5000))
def test_npy_header_text(header: str) -> None:
    written(npz_bytes(npy(header, bytes(100))), "a.npz")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 16)[0]).save(buffer, kind)
    return buffer.getvalue()


IMAGES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF")}


@QUICK
@given(st.sampled_from(sorted(IMAGES)), DAMAGE, st.floats(0, 1))
def test_image_files(kind: str, changes: list[tuple[float, bytes]], cut: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b"):
            (Path(folder) / name).mkdir()
            for i in range(2):
                (Path(folder) / name / f"{i}.png").write_bytes(png(i, 16))
        (Path(folder) / "a" / "2.png").write_bytes(damaged(IMAGES[kind], changes, cut))
        good_or_refused(Path(folder))


@pytest.fixture(scope="module")
def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet as pq

    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 3} for i in range(12)]
    buffer = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=5)
    assert written(buffer.getvalue(), "a.parquet")
    return buffer.getvalue()


@QUICK
@given(changes=DAMAGE, cut=st.floats(0.5, 1))
def test_parquet(parquet: bytes, changes: list[tuple[float, bytes]], cut: float) -> None:
    written(damaged(parquet, changes, cut), "a.parquet")


@QUICK
@given(changes=DAMAGE)
def test_parquet_footer(parquet: bytes, changes: list[tuple[float, bytes]]) -> None:
    (size,) = struct.unpack("<I", parquet[-8:-4])
    written(parquet[: -8 - size] + damaged(parquet[-8 - size :], changes, 1), "a.parquet")


@QUICK
@given(changes=DAMAGE, cut=st.floats(0.5, 1))
def test_arrow_stream(changes: list[tuple[float, bytes]], cut: float) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow")
    rows = [{"image": {"bytes": png(i), "path": None}, "label": i % 3} for i in range(12)]
    table = pyarrow.Table.from_pylist(rows)
    buffer = io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    with tempfile.TemporaryDirectory() as folder:
        state = {"_data_files": [{"filename": "data.arrow"}]}
        (Path(folder) / "state.json").write_text(json.dumps(state))
        (Path(folder) / "data.arrow").write_bytes(damaged(buffer.getvalue(), changes, cut))
        good_or_refused(Path(folder))


@QUICK
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["_data_files", "filename", "x"]), inner),
    )
)
def test_state_json(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "state.json").write_text(json.dumps(value))
        good_or_refused(Path(folder))


@QUICK
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"PAR1", b"\x80\x04"]))
def test_any_bytes(content: bytes, magic: bytes) -> None:
    written(magic + content, "data")
