"""A hook of mkdocs: the pages under docs/methods/ become the section "Methods", so that no list has to be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Put the section, and the results if they have been written, where mkdocs.yml says."""
    folder = Path(config["docs_dir"])
    config["nav"] = [item for entry in config["nav"] for item in _expanded(entry, folder)]
    return config


def _expanded(entry: Any, folder: Path) -> list[Any]:
    if entry == "methods/":
        pages = sorted(path.name for path in (folder / "methods").glob("*.md") if path.name != "index.md")
        return [{"Methods": [{"All methods": "methods/index.md"}, *(f"methods/{page}" for page in pages)]}]
    if isinstance(entry, dict):
        return [entry] if all((folder / page).exists() for page in entry.values() if page != "methods/") else []
    return [entry]
