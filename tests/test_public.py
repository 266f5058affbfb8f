"""The front door: what ``import bezoar`` offers and what it costs."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bezoar

NAMES = sorted(getattr(bezoar, "__all__", []))

#: Each takes a good part of a second to import; none is needed to print a help text.
HEAVY = {"torch", "numpy", "scipy", "PIL", "jinja2", "safetensors", "torchvision", "timm", "transformers", "onnx"}
HELP = """
import sys
from bezoar.cli.main import main
sys.argv = ["bezoar", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
"""


def public_names(source: str) -> set[str]:
    """Names without underscore that a module binds at its top level, also for type checkers only."""
    found: set[str] = set()
    nodes = list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If | ast.Try):
            nodes += [*node.body, *node.orelse]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bezoar":
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def loaded_by(code: str) -> tuple[set[str], str]:
    """Top-level modules that a fresh interpreter has loaded after ``code``, and what that printed."""
    tail = (
        "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


def test_all_is_sorted_and_without_doubles():
    assert NAMES
    assert list(bezoar.__all__) == sorted(set(bezoar.__all__))


def test_all_is_complete():
    source = Path(bezoar.__file__).read_text(encoding="utf-8")
    assert public_names(source) <= set(bezoar.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_exists(name):
    assert getattr(bezoar, name) is not None
    assert name in dir(bezoar)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("_")])
def test_public_name_is_documented(name):
    value = getattr(bezoar, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # a constant or an alias of a type
    text = value.__doc__ or ""
    assert text.strip() and not text.startswith(f"{name}("), f"bezoar.{name} has no docstring of its own"
    if inspect.isfunction(value):
        missing = [p for p in inspect.signature(value).parameters if not re.search(rf"\b{p}\b", text)]
        assert not missing, f"bezoar.{name} does not say what {', '.join(missing)} means"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        bezoar.no_such_name  # noqa: B018


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert bezoar.__version__ == version("bezoar")


def test_import_is_light():
    modules, _ = loaded_by("import bezoar")
    assert "bezoar" in modules
    assert not modules & HEAVY


def test_help_is_light():
    modules, printed = loaded_by(HELP)
    assert not modules & HEAVY
    for command in ("scan", "purify", "report", "demo"):
        assert re.search(rf"\b{command}\b", printed), f"--help does not list {command}"


def test_light_checks_can_fail():
    modules, _ = loaded_by("import numpy")
    assert modules & HEAVY == {"numpy"}


def test_completeness_check_can_fail():
    source = (
        "from __future__ import annotations\nimport sys\nfrom typing import TYPE_CHECKING\n"
        "_hidden = 1\nSHOWN: int = 2\n"
        "if TYPE_CHECKING:\n    from bezoar.api import scan as scan, purify\ndef report(): ...\nclass Thing: ...\n"
    )
    assert public_names(source) == {"SHOWN", "scan", "purify", "report", "Thing"}
