"""What all tests share: no network, reproducible random data, and where the real models and data are."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before any test imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A busy machine is no fault of the code; in CI the same examples come every time.
_QUIET = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
settings.register_profile("local", deadline=None, suppress_health_check=_QUIET)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=_QUIET)
settings.load_profile("ci" if os.environ.get("CI") else "local")

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("BEZOAR_SHARED_DATA", ROOT.parent / "shared" / "data"))
_LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture
def shared_data() -> Path:
    """Folder with published models and data; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no published models here: set BEZOAR_SHARED_DATA to their folder")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail any test that talks to another machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in _LOCAL:
            raise AssertionError(f"a test tried to reach {address[0]}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
