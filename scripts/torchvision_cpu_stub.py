"""Let a torchvision wheel that was built for CUDA load its CPU kernels beside a CPU-only torch.

For test machines only: users install torch and torchvision from the same index and never need it. Where the two come
from different indexes, ``import torchvision`` fails with "operator torchvision::nms does not exist", because its
libraries link against libc10_cuda.so and libtorch_cuda.so. This writes two libraries of these names, whose functions
abort when they are called, and a .pth line that loads them first. It changes nothing where torchvision is absent,
where it already imports, or where torch itself has CUDA. It needs cc and nm, and libcudart on the loader's path.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

STUB = "_torchvision_cpu_stub"
LIBRARIES = ("libc10_cuda.so", "libtorch_cuda.so")
LOADER = f"""import ctypes
import pathlib

for name in {LIBRARIES!r}:
    ctypes.CDLL(str(pathlib.Path(__file__).with_name(name)))
"""


def imports() -> bool:
    """Whether a fresh interpreter can import torchvision with its kernels."""
    check = "import torchvision, sys; sys.exit(not torchvision.extension._has_ops())"
    return subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


def missing_symbols(folder: Path) -> list[str]:
    """CUDA symbols of torch that torchvision's libraries ask for."""
    found: set[str] = set()
    for library in ("_C.so", "image.so"):
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", folder / library], capture_output=True, text=True, check=True
        ).stdout
        found |= {name for name in re.findall(r"\bU (\S+)", listed) if re.match(r"_ZN?K?(2at|3c10)4cuda", name)}
    return sorted(found)


def stub_source(symbols: list[str]) -> str:
    """C source that defines the symbols; no device is ever reported, so nothing else is called."""
    lines = ["#include <stdlib.h>"]
    for name in symbols:
        if name.endswith("9allocatorE"):  # data, not a function
            lines.append(f"void *{name}[16];")
        elif "12device_count" in name:
            lines.append(f"signed char {name}(void) {{ return 0; }}")
        else:
            lines.append(f"void {name}(void) {{ abort(); }}")
    return "\n".join(lines) + "\n"


def compile_library(source: str, path: Path) -> None:
    """Compile C source to a shared library."""
    with tempfile.NamedTemporaryFile("w", suffix=".c") as file:
        file.write(source)
        file.flush()
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, file.name], check=True)


def main() -> int:
    """Install the stubs into this environment; 0 if torchvision works or is not needed, 1 if it still fails."""
    import torch

    site = Path(sysconfig.get_paths()["purelib"])
    wheel = site / "torchvision"
    if torch.version.cuda is not None or not (wheel / "_C.so").exists() or imports():
        print("torchvision needs no stubs here")
        return 0
    symbols = missing_symbols(wheel)
    folder = site / STUB
    folder.mkdir(exist_ok=True)
    for library, source in zip(LIBRARIES, (stub_source(symbols), ""), strict=True):
        compile_library(source, folder / library)
    (folder / "__init__.py").write_text(LOADER)
    (site / f"{STUB}.pth").write_text(f"import {STUB}\n")
    if not imports():
        print("torchvision still cannot be imported", file=sys.stderr)
        return 1
    print(f"torchvision's CPU kernels load now ({len(symbols)} stub symbols)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
