"""Random damage: only errors of ours, or a model, may come out, and soon."""

import io
import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bezoar.core.errors import BezoarError
from bezoar.io.models import load_model
from bezoar.io.readers import _state
from bezoar.io.readers._base import Options
from tests.io.hostile_models import net, safetensors, torch_zip

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NET = """
from torch import nn


def net(num_classes=3, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )
"""


@pytest.fixture
def arch(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:net"


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """The first search for a fitting architecture builds all reference nets; later ones remember them."""
    with pytest.raises(BezoarError):
        _state.build(STATE, Options(), "warm")


def opens_or_refuses(path: Path, content: bytes, arch: str) -> bool:
    path.write_bytes(content)
    try:
        suspect = load_model(path, arch=arch, size=8)
    except BezoarError as error:
        assert str(error).isprintable()
        return False
    assert suspect.module(torch.zeros(1, suspect.facts.channels, 8, 8)).shape == (1, suspect.facts.num_classes)
    return True


def _torch_bytes(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


STATE = net().state_dict()
GOOD: dict[str, bytes] = {
    "m.safetensors": save(STATE),
    "zip.pt": _torch_bytes({"state_dict": STATE, "epoch": 3}),
    "old.pth": _torch_bytes({"net": STATE}, _use_new_zipfile_serialization=False),
    "module.pt": _torch_bytes(net()),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_files_open(name: str, tmp_path: Path, arch: str) -> None:
    assert opens_or_refuses(tmp_path / name, GOOD[name], arch)


@pytest.mark.parametrize("name", GOOD)
@FUZZ
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 12))
def test_changed_bytes(name: str, seed: int, changes: int, tmp_path: Path, arch: str) -> None:
    draw, content = random.Random(seed), bytearray(GOOD[name])
    for _ in range(changes):
        content[draw.randrange(len(content))] = draw.randrange(256)
    opens_or_refuses(tmp_path / name, bytes(content), arch)


@pytest.mark.parametrize("name", GOOD)
@FUZZ
@given(cut=st.floats(0, 1), extra=st.binary(max_size=64))
def test_cut_and_extended(name: str, cut: float, extra: bytes, tmp_path: Path, arch: str) -> None:
    content = GOOD[name]
    opens_or_refuses(tmp_path / name, content[: int(len(content) * cut)] + extra, arch)


def _repacked(name: str, seed: int, changes: int) -> bytes:
    """The same archive with a sound directory and another pickle, so that the damage reaches the pickle reader."""
    with zipfile.ZipFile(io.BytesIO(GOOD[name])) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    pkl = next(entry for entry in files if entry.endswith("data.pkl"))
    draw, content = random.Random(seed), bytearray(files[pkl])
    for _ in range(changes):
        place = draw.randrange(len(content))
        action = draw.randrange(3)
        if action == 0:
            content[place] = draw.choice(OPCODES)
        elif action == 1:
            content.insert(place, draw.choice(OPCODES))
        else:
            del content[place]
    storages = {entry.rpartition("/")[2]: data for entry, data in files.items() if "/data/" in entry}
    return torch_zip(bytes(content), storages)


OPCODES = (
    b"(.012FIJKLMNPQRSTUVXabcdeghijlopqrstu}\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8f\x90\x91\x92\x93\x94\x95"
)


@pytest.mark.parametrize("name", ["zip.pt", "module.pt"])
@FUZZ
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4))
def test_changed_pickles(name: str, seed: int, changes: int, tmp_path: Path, arch: str) -> None:
    opens_or_refuses(tmp_path / name, _repacked(name, seed, changes), arch)


@FUZZ
@given(pkl=st.binary(max_size=300))
def test_random_pickles(pkl: bytes, tmp_path: Path, arch: str) -> None:
    opens_or_refuses(tmp_path / "m.pt", torch_zip(b"\x80\x02" + pkl + b"."), arch)


NUMBERS = st.one_of(st.integers(-5, 200), st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=3))
ENTRIES = st.one_of(
    NUMBERS,
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "F16", "BOOL", "F8_E4M3", "I64", "X"]), NUMBERS),
            "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
            "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
        }
    ),
)


@FUZZ
@given(
    header=st.dictionaries(st.one_of(st.text(max_size=8), st.just("__metadata__")), ENTRIES, max_size=4),
    data=st.binary(max_size=64),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
def test_safetensors_headers(
    header: dict[str, Any], data: bytes, length: int | None, tmp_path: Path, arch: str
) -> None:
    opens_or_refuses(tmp_path / "m.safetensors", safetensors(header, data, length), arch)


@FUZZ
@given(shift=st.integers(-8, 8), key=st.sampled_from(list(STATE)), field=st.sampled_from(["shape", "data_offsets"]))
def test_safetensors_ranges(shift: int, key: str, field: str, tmp_path: Path, arch: str) -> None:
    """One number of a sound header moved: it opens only where nothing moved."""
    content = GOOD["m.safetensors"]
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header[key][field][0] += shift
    opened = opens_or_refuses(tmp_path / "m.safetensors", safetensors(header, content[8 + length :]), arch)
    assert opened == (shift == 0)


@FUZZ
@given(
    names=st.lists(
        st.sampled_from(["a/data.pkl", "a/data/0", "a/code/x.py", "../x", "/x", "b/c", "a\\b", "é"]), max_size=5
    ),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    data=st.binary(max_size=40),
)
def test_zip_archives(names: list[str], method: int, data: bytes, tmp_path: Path, arch: str) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name in dict.fromkeys(names):
            archive.writestr(name, data)
    assert not opens_or_refuses(tmp_path / "m.pt", out.getvalue(), arch)


@FUZZ
@given(
    value=st.recursive(
        st.one_of(st.none(), st.integers(-10, 10), st.text(max_size=4), st.just(torch.ones(2))),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 3)), inner, max_size=4),
        ),
        max_leaves=8,
    )
)
def test_checkpoints_of_anything(value: Any, tmp_path: Path, arch: str) -> None:
    assert not opens_or_refuses(tmp_path / "m.pt", _torch_bytes(value), arch)
