"""Write one page per method, made from its docstring, to ``docs/methods/``.

python scripts/make_method_docs.py           # write
python scripts/make_method_docs.py --check   # only say what is stale; exit code 1 if anything is
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from bezoar.core.registry import methods

FOLDER = Path(__file__).parents[1] / "docs" / "methods"

#: Kind in the registry, and what its methods are for.
KINDS = {
    "scanners": "Scanners: is there a backdoor, and for which label?",
    "scorers": "Scorers: how suspicious is each label, beside the scanners' searches?",
    "purifiers": "Purifiers: from a suspect model to a clean one",
    "filters": "Filters: which training examples are poisoned?",
    "guards": "Guards: does this input carry a trigger, asked while the model answers?",
    "trainers": "Trainers: a clean model from data that nobody vouches for",
    "attacks": "Attacks: plant a known backdoor, to measure the defences",
}
NOTE = "<!-- Made by scripts/make_method_docs.py from the docstring; change that, then run `make method-docs`. -->"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|References|Notes?|Examples?):\n", re.MULTILINE)
_ITEM = re.compile(r"^(\w+(?:, \w+)*)(?: \([^)]*\))?:\s+", re.MULTILINE)


def sections(docstring: str) -> dict[str, str]:
    """Split a Google docstring; the text before the first section stands under the empty name."""
    text = inspect.cleandoc(docstring) + "\n"
    parts = _SECTION.split(text)
    found = {"": parts[0].strip()}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        found[name] = textwrap.dedent(body).strip("\n")
    return found


def arguments(method: type) -> dict[str, str]:
    """Meaning of each argument, in one line; inherited ones are looked up in the base that documents them."""
    found: dict[str, str] = {}
    for base in method.__mro__:
        body = sections(base.__dict__.get("__doc__") or "").get("Args", "")
        pieces = _ITEM.split(body)
        for names, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
            for name in names.split(", "):
                found.setdefault(name, " ".join(meaning.split()))
    return found


def page(name: str, method: Any) -> str:
    """Text of a method's page."""
    module = inspect.getmodule(method)
    parts = sections(method.__doc__ or "")
    blocks = [
        NOTE,
        f"# {method.__name__}",
        f"Name: `{name}`. In Python: `from {method.__module__} import {method.__name__}`.",
        parts[""],
        _about(module.__doc__ if module else None),
        _settings(method),
    ]
    blocks += [f"## {title}\n\n{_body(title, parts[title])}" for title in parts if title not in ("", "Args")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def pages() -> dict[str, str]:
    """All pages, as {file name: text}."""
    found, overview = {}, [NOTE, "# Methods"]
    for kind, heading in KINDS.items():
        registered = methods(kind)
        if not registered:
            continue
        rows = [f"| [{name}]({name}.md) | {_summary(registered[name])} |" for name in sorted(registered)]
        overview += [f"## {heading}", "\n".join(["| method | in one sentence |", "| --- | --- |", *rows])]
        found |= {f"{name}.md": page(name, registered[name]) for name in registered}
    return {"index.md": "\n\n".join(overview) + "\n", **found}


def stale(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Files that are missing, differ, or belong to no method."""
    present = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in present.keys() | wanted.keys() if present.get(name) != wanted.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    wanted = pages()
    changed = stale(FOLDER, wanted)
    if parser.parse_args().check:
        sys.exit(f"docs/methods is stale, run `make method-docs`: {', '.join(changed)}" if changed else 0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name in wanted:
            (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    print(f"docs/methods: {len(wanted)} pages, {len(changed)} changed")


def _summary(method: Any) -> str:
    return " ".join(sections(method.__doc__ or "")[""].split("\n\n")[0].split()).replace("|", "\\|")


def _about(docstring: str | None) -> str:
    """The module's docstring but its first line, which repeats the title."""
    return inspect.cleandoc(docstring or "").partition("\n")[2].strip()


def _settings(method: Any) -> str:
    fields = [f for f in dataclasses.fields(method) if f.init]
    if not fields:
        return ""
    meaning = arguments(method)
    rows = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        cells = (f"`{field.name}`", f"`{field.type}`", f"`{_default(field)}`", meaning.get(field.name, ""))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "## Settings\n\n" + "\n".join(rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _body(title: str, text: str) -> str:
    """References as a list; an entry ends with a line that ends with a full stop."""
    if title != "References":
        return text
    entries = re.split(r"(?<=\.)\n", text)
    return "\n".join("- " + " ".join(entry.split()).removeprefix("- ") for entry in entries)


if __name__ == "__main__":
    main()
