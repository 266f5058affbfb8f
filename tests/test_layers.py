"""Who may import whom, read from the syntax trees; the pictures are in docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "bezoar"
MAX_LINES = 400

#: What each folder of the package may import from the others; "" stands for the modules beside them (``bezoar.api``).
LAYERS: dict[str, set[str]] = {
    "core": {"core"},
    "nets": {"nets"},
    "ops": {"core", "ops"},
    "io": {"core", "io", "nets", "ops"},
    "tasks": {"core", "ops", "tasks"},
    "scanners": {"core", "ops", "scanners"},
    "purifiers": {"core", "ops", "purifiers", "scanners"},
    "scorers": {"core", "nets", "ops", "scorers"},
    "filters": {"core", "ops", "filters"},
    "trainers": {"core", "ops", "trainers"},
    "guards": {"core", "ops", "guards"},
    "attacks": {"core", "ops", "attacks"},
    # Ground truth lives here and in attacks: no defence can reach it.
    "evaluation": {"core", "ops", "attacks", "io", "nets", "report", "evaluation"},
    "report": {"core", "report"},
    "bench": {"", "bench", "core", "ops", "attacks", "io", "evaluation", "report"},
    "demo": {"", "core", "demo", "evaluation", "io", "nets", "ops", "report"},
    "": {
        *("", "core", "io", "nets", "ops", "tasks", "scanners", "scorers", "purifiers", "filters", "trainers"),
        *("attacks", "evaluation", "guards", "report"),
    },
    "cli": {"", "cli", "core", "io", "nets", "ops", "report", "demo", "evaluation", "bench"},
}

#: Libraries that only some folders may import.
ONLY_IN: dict[str, set[str]] = {
    "cyclopts": {"cli"},
    "jinja2": {"report"},
    "ray": {"core"},
    **dict.fromkeys(
        (
            "datasets",
            "huggingface_hub",
            "keras",
            "onnx",
            "onnx2torch",
            "onnxruntime",
            "onnxscript",
            "pyarrow",
            "timm",
            "torchvision",
            "transformers",
        ),
        {"io"},
    ),
}
#: These are absent or broken in many environments, so no module may need them just to be imported.
OPTIONAL = {library for library, folders in ONLY_IN.items() if folders == {"io"}} | {"ray"}

#: Functions that import the module that their first argument names.
BY_NAME = {"import_module", "__import__", "require"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    deferred: bool  # inside a function, or for type checkers only


def imports(tree: ast.Module, package: tuple[str, ...], folders: set[str]) -> Iterator[Import]:
    """All imports of a file, also in functions and by name (``import_module("timm")``).

    Args:
        tree: The file.
        package: Names of the packages that the file lies in, from the top.
        folders: Sub-packages of the top package: ``from bezoar import core`` imports one.
    """
    yield from _walk(tree.body, package, folders, deferred=False)


def _walk(nodes: Sequence[ast.AST], package: tuple[str, ...], folders: set[str], deferred: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _walk(node.body, package, folders, deferred=True)
            yield from _walk(node.orelse, package, folders, deferred)
            continue
        for module in _modules(node, package, folders):
            yield Import(module, node.lineno, deferred)
        inner = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(list(ast.iter_child_nodes(node)), package, folders, inner)


def _modules(node: ast.AST, package: tuple[str, ...], folders: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module == package[0]:
            return [f"{module}.{a.name}" if a.name in folders else module for a in node.names]
        return [module]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def violations(root: Path, max_lines: int = MAX_LINES) -> list[str]:
    """Everything in the package at ``root`` that breaks a rule, as ``file:line: what``."""
    present = {path.relative_to(root).parts[0] for path in root.glob("*/**/*.py")}
    folders = present | set(LAYERS) - {""}
    found = [f"{folder}/: no rule for this folder: add it to LAYERS" for folder in sorted(present - set(LAYERS))]
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        layer = relative.parts[0] if len(relative.parts) > 1 else ""
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > max_lines:
            found.append(f"{relative}: {len(text.splitlines())} lines, at most {max_lines}")
        package = (root.name, *relative.parts[:-1])
        for one in imports(ast.parse(text), package, folders):
            found += [f"{relative}:{one.line}: {wrong}" for wrong in _wrong(one, layer, root.name, folders)]
    return found


def _wrong(one: Import, layer: str, name: str, folders: set[str]) -> Iterator[str]:
    top, *rest = one.module.split(".")
    if top == name:
        other = rest[0] if rest and rest[0] in folders else ""
        if other not in LAYERS.get(layer, folders):
            yield f"{layer or name} must not import {one.module}"
        return
    if layer not in ONLY_IN.get(top, {layer}):
        yield f"{top} may be imported in {', '.join(sorted(ONLY_IN[top]))} only"
    elif top in OPTIONAL and not one.deferred:
        yield f"{top} is optional: import it inside the function that needs it"


def test_package_keeps_the_layers():
    assert violations(PACKAGE) == []


def test_no_cycle_between_folders():
    below = {layer: allowed - {layer} for layer, allowed in LAYERS.items()}
    while below:
        free = {layer for layer, allowed in below.items() if not allowed}
        assert free, f"a cycle among {sorted(below)}"
        below = {layer: allowed - free for layer, allowed in below.items() if layer not in free}


def test_cli_is_imported_by_nobody():
    assert [layer for layer, allowed in LAYERS.items() if "cli" in allowed] == ["cli"]


@pytest.mark.parametrize("defence", ["core", "ops", "io", "nets", "tasks", "scanners", "purifiers", "report"])
def test_ground_truth_is_out_of_reach(defence):
    assert not LAYERS[defence] & {"attacks", "evaluation", ""}


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("core/results.py", "import bezoar.ops.fit", "core must not import bezoar.ops.fit"),
        ("core/results.py", "from bezoar import ops", "core must not import bezoar.ops"),
        ("core/results.py", "from bezoar import scan", "core must not import bezoar"),
        ("core/results.py", "from ..ops import fit", "core must not import bezoar.ops"),
        ("core/deep/results.py", "from ...ops.fit import fit", "core must not import bezoar.ops.fit"),
        ("scanners/nc.py", "def f():\n    from bezoar.attacks import sig", "scanners must not import bezoar.attacks"),
        (
            "scanners/nc.py",
            "from bezoar.purifiers.unlearn import U",
            "scanners must not import bezoar.purifiers.unlearn",
        ),
        ("purifiers/a.py", "from bezoar.evaluation.measures import m", "must not import bezoar.evaluation.measures"),
        ("report/a.py", "if TYPE_CHECKING:\n    import bezoar.ops", "report must not import bezoar.ops"),
        (
            "ops/a.py",
            "from importlib import import_module\nimport_module('bezoar.io')",
            "ops must not import bezoar.io",
        ),
        ("api.py", "from bezoar.cli.main import main", "bezoar must not import bezoar.cli.main"),
        ("io/a.py", "import timm", "timm is optional"),
        ("io/a.py", "class A:\n    import onnx.helper", "onnx is optional"),
        ("io/a.py", "if True:\n    from torchvision import models", "torchvision is optional"),
        ("io/a.py", "import importlib\nimportlib.import_module('transformers')", "transformers is optional"),
        ("io/a.py", "timm = require('timm', 'hf')", "timm is optional"),
        ("ops/a.py", "def f():\n    import timm", "timm may be imported in io only"),
        ("core/a.py", "import ray", "ray is optional"),
        ("scanners/a.py", "def f():\n    import ray", "ray may be imported in core only"),
        ("cli/a.py", "def f():\n    from jinja2 import Template", "jinja2 may be imported in report only"),
        ("utils/a.py", "", "utils/: no rule for this folder"),
        ("core/a.py", "\n" * 401, "401 lines, at most 400"),
    ],
)
def test_checker_finds(tmp_path, path, code, expected):
    root = _tree(tmp_path, {path: code, "ops/fit.py": "", "io/a_file.py": "", "cli/main.py": "", "attacks/sig.py": ""})
    found = violations(root)
    assert len(found) == 1, found
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("core/a.py", "from bezoar.core.errors import X\nfrom . import errors\nimport torch"),
        ("purifiers/a.py", "from bezoar.scanners.nc import N\nfrom ..ops.fit import fit"),
        ("io/a.py", "def f():\n    import timm\n    from torchvision import models"),
        ("io/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx"),
        ("api.py", "from bezoar.scanners import nc\nfrom bezoar import core"),
        ("cli/a.py", "import bezoar\nfrom cyclopts import App"),
        ("core/a.py", "\n" * 400),
    ],
)
def test_checker_allows(tmp_path, path, code):
    assert violations(_tree(tmp_path, {path: code, "scanners/nc.py": "", "core/errors.py": ""})) == []


def _tree(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "bezoar"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
