"""The pages made from docstrings are up to date, and no text of the project points at one machine."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts import make_method_docs

ROOT = Path(__file__).parents[1]
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".j2", ".css", ".js", ".json", ""}
SKIPPED = {"build", "dist", "site", "demo-report", "__pycache__"}
#: Patterns, so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.}~/:-])/(work|root|home|opt|mnt|Users)/\w"),
    "a package registry": re.compile(r"py[p]i\.(org|python)|python[h]osted\.|registry\.n[p]mjs|download\.pyt[o]rch"),
    "an index or links option": re.compile(r"--(extra-)?index-u[r]l|--find-l[i]nks"),
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base.

    Args:
        rate: A share,
            in (0, 1].
    """

    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Sample(Base):
    """Does one | thing.

    And says more.

    Args:
        steps: How many.
        low, high: Bounds.

    References:
        A. Author, "A Title
        in Two Lines", 2019.
        B. Author, "Another", 2020.
    """

    steps: int | None = 3
    low: float = 0.0
    high: float = 1.0


def files() -> list[Path]:
    """Files that git knows or would add; all of them where there is no repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    paths = [ROOT / name for name in listed.stdout.splitlines()] if listed.returncode == 0 else list(ROOT.rglob("*"))
    paths = [path for path in paths if not any(map(_skipped, path.relative_to(ROOT).parts[:-1]))]
    return [path for path in paths if path.is_file() and path.suffix in TEXT and path.stat().st_size < 1_000_000]


def _skipped(folder: str) -> bool:
    return folder in SKIPPED or (folder.startswith(".") and folder != ".ci")


def test_method_pages_are_up_to_date():
    changed = make_method_docs.stale(make_method_docs.FOLDER, make_method_docs.pages())
    assert changed == [], "run `make method-docs`"


def test_stale_finds_changed_missing_and_left_over_pages(tmp_path):
    for name in ("same", "changed", "left-over"):
        (tmp_path / f"{name}.md").write_text(name)
    wanted = {"same.md": "same", "changed.md": "other", "missing.md": ""}
    assert make_method_docs.stale(tmp_path, wanted) == ["changed.md", "left-over.md", "missing.md"]


def test_page_shows_settings_inherited_meanings_and_references():
    page = make_method_docs.page("sample", Sample)
    assert "# Sample\n" in page
    assert "Name: `sample`" in page
    assert "Does one | thing.\n\nAnd says more." in page
    assert "| `rate` | `float` | `0.1` | A share, in (0, 1]. |" in page
    assert "| `steps` | `int \\| None` | `3` | How many. |" in page
    assert "| `low` | `float` | `0.0` | Bounds. |" in page
    assert "| `high` | `float` | `1.0` | Bounds. |" in page
    assert '- A. Author, "A Title in Two Lines", 2019.\n- B. Author, "Another", 2020.' in page


def test_no_text_points_at_one_machine():
    assert files()
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}" for what, rule in FORBIDDEN.items() if rule.search(line)
            ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["see /" + "home/ann/data", "x = '/" + "opt/wheels'", "https://pypi." + "org/simple", "pip --index-" + "url x"],
)
def test_forbidden_texts_are_recognised(line):
    assert any(rule.search(line) for rule in FORBIDDEN.values())


@pytest.mark.parametrize("line", ["docs/home/x", "https://example.org/home/x", "#!/usr/bin/env bash", "~/work/x"])
def test_harmless_texts_are_not(line):
    assert not any(rule.search(line) for rule in FORBIDDEN.values())
