"""A grid as TOML: which victims, which purifiers, how many clean images, which seeds."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bezoar.core.errors import DataError, SettingError
from bezoar.core.fields import fields_from
from bezoar.core.method import Method, Purifier
from bezoar.core.registry import find
from bezoar.evaluation.implant import RECORD
from bezoar.io.arch import resolve
from bezoar.ops.recipe import Recipe

CLEAN = "none"  #: As an attack: a net without a backdoor, to measure what a purifier costs.

_KNOWN = {
    "": {"grid", "recipe", "scan", "victim", "purifier"},
    "grid": {"data", "test", "archs", "images", "seeds", "train_images", "size", "channels"},
    "scan": {"seeds", "budget", "additive"},  # as in ScanSettings
    "victim": {"attack", "settings", "name", "archs", "seed", "folder", "recipe"},
    "purifier": {"method", "settings", "name", "oracle"},
}


@dataclass(frozen=True, kw_only=True)
class VictimSpec:
    """A net to purify.

    Attributes:
        name: Unique in the grid; names its folder.
        attack: Registry name, or ``none`` for a clean net; empty with ``folder``.
        settings: Of the attack, each ``key=value``.
        arch: Architecture; that of the record with ``folder``.
        seed: Of attack and training.
        recipe: Fields of :class:`bezoar.ops.recipe.Recipe`.
        folder: A folder that ``bezoar attack`` wrote, instead of training one.
    """

    name: str
    attack: str
    settings: tuple[str, ...]
    arch: str
    seed: int
    recipe: tuple[tuple[str, Any], ...]
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class PurifierSpec:
    """A purifier under a name.

    Attributes:
        name: Unique in the grid.
        purifier: The method with its settings.
        oracle: Name of a setting and the values to try. The best is then chosen **with the ground truth**, as published
            tables often do: an upper bound, no defence.
    """

    name: str
    purifier: Purifier
    oracle: tuple[str, tuple[Any, ...]] | None = None

    def candidates(self) -> list[Purifier]:
        """The method, or one for each value of the oracle."""
        if self.oracle is None:
            return [self.purifier]
        return [dataclasses.replace(self.purifier, **{self.oracle[0]: value}) for value in self.oracle[1]]


@dataclass(frozen=True)
class Cell:
    """One measurement: a purifier on a victim with so many clean images under a seed."""

    victim: VictimSpec
    purifier: PurifierSpec
    images: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All cells and what they share.

    Attributes:
        data, test: What the victims are trained and measured on, see ``bezoar attack --data`` and ``--test``.
        train_images, size, channels: As the flags of ``bezoar attack``.
        scan: Settings of the scan that purifiers with a trigger need.
    """

    data: str
    test: str | None
    train_images: int | None
    size: int | None
    channels: int | None
    scan: Mapping[str, Any]
    victims: tuple[VictimSpec, ...]
    purifiers: tuple[PurifierSpec, ...]
    images: tuple[int, ...]
    seeds: tuple[int, ...]

    def cells(self) -> Iterator[Cell]:
        """In an order in which each victim is trained once and its cells follow."""
        for victim in self.victims:
            for images in self.images:
                for seed in self.seeds:
                    for purifier in self.purifiers:
                        yield Cell(victim, purifier, images, seed)

    def key(self, cell: Cell, versions: Mapping[str, str], data: Sequence[str] = ()) -> str:
        """Hash over all that decides a cell's outcome; names do not.

        Args:
            cell: Which.
            versions: Of the software.
            data: Hashes of the training and test images.
        """
        record = Path(cell.victim.folder) / RECORD
        parts: list[Any] = [
            list(data) or [self.data, self.test, self.train_images, self.size, self.channels],
            hashlib.sha256(record.read_bytes()).hexdigest() if cell.victim.folder else "",
            dataclasses.asdict(dataclasses.replace(cell.victim, name="")),
            type(cell.purifier.purifier).__name__,
            cell.purifier.purifier.config(),
            cell.purifier.oracle,
            dict(self.scan) if needs_scan(cell.purifier.purifier) else {},
            cell.images,
            cell.seed,
            dict(versions),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def needs_scan(purifier: Purifier) -> bool:
    """Whether a scan comes first."""
    return purifier.needs_triggers or purifier.wants_scan


def read_grid(path: Path) -> Grid:
    """Read and check a grid, before anything is trained.

    Raises:
        DataError: It is no TOML file.
        SettingError: It says something that cannot be done.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} is not a grid: {error}", "See examples/grid.toml") from None
    _known("the grid", raw, _KNOWN[""])
    head = _table(raw, "grid")
    if not isinstance(head.get("data"), str):
        raise SettingError("[grid] needs data", 'Such as data = "fashion-mnist"')
    _recipe(raw.get("recipe", {}), "[recipe]")
    scan_pairs = tuple(f"{k}={_text(v)}" for k, v in _table(raw, "scan").items())
    scan = fields_from(ScanSettings, "[scan]", "[scan]", scan_pairs)
    grid = Grid(
        data=head["data"],
        test=_as("[grid] test", head.get("test"), str),
        train_images=_as("[grid] train_images", head.get("train_images"), int),
        size=_as("[grid] size", head.get("size"), int),
        channels=_as("[grid] channels", head.get("channels"), int),
        scan=dataclasses.asdict(ScanSettings(**scan)),
        victims=tuple(_victims(raw, head, path.parent)),
        purifiers=tuple(_purifier(one) for one in _tables(raw, "purifier")),
        images=_integers(head, "images", (500,), 2),
        seeds=_integers(head, "seeds", (0,), 0),
    )
    for kind, names in (("victim", [v.name for v in grid.victims]), ("purifier", [p.name for p in grid.purifiers])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingError(f"two {kind}s are called {twice[0]!r}", 'Give one of them a name = "..."')
    return grid


def _victims(raw: dict[str, Any], head: dict[str, Any], base: Path) -> Iterator[VictimSpec]:
    shared = _texts(head, "archs")
    for one in _tables(raw, "victim"):
        given = _recipe({**raw.get("recipe", {}), **one.get("recipe", {})}, "[[victim]] recipe")
        recipe = tuple(sorted(given.items()))
        seed = _as("[[victim]] seed", one.get("seed", 0), int)
        assert seed is not None
        if "folder" in one:
            folder = base / one["folder"]
            name = one.get("name", Path(one["folder"]).name)
            if not (folder / RECORD).is_file():
                raise DataError(f"{folder} holds no victim", "Give a folder of bezoar attack --out")
            yield VictimSpec(
                name=name, attack="", settings=(), arch="", seed=seed, recipe=(), folder=str(folder.resolve())
            )
            continue
        settings = _settings(one)
        attack = one.get("attack", "")
        if attack != CLEAN:
            kind = find("attacks", attack)
            kind(**fields_from(kind, attack, "[[victim]] settings", settings))
        archs = _texts(one, "archs") or shared
        if not archs:
            raise SettingError(f"the victim {attack!r} has no architecture", 'Give archs = ["wrn-16-1"] in [grid]')
        for arch in archs:
            resolve(arch)
            label = one.get("name") or "-".join([attack, *(s.replace("=", "-").replace("/", "-") for s in settings)])
            name = f"{label}_{arch.replace('/', '-')}_{seed}"
            yield VictimSpec(name=name, attack=attack, settings=settings, arch=arch, seed=seed, recipe=recipe)


def _purifier(one: dict[str, Any]) -> PurifierSpec:
    method = one.get("method", "")
    kind: type[Method] = find("purifiers", method)
    settings = _settings(one)
    made = kind(**fields_from(kind, method, "[[purifier]] settings", settings))
    assert isinstance(made, Purifier)
    oracle = None
    if "oracle" in one:
        (field, values), *more = one["oracle"].items() if isinstance(one["oracle"], dict) else [("", ())]
        if more or not isinstance(values, list) or not values:
            raise SettingError(
                "oracle names one setting and the values to try", "Such as oracle = {threshold = [0.1, 0.2]}"
            )
        tried = [fields_from(kind, method, "[[purifier]] oracle", (f"{field}={_text(value)}",)) for value in values]
        oracle = (field, tuple(found[field] for found in tried))
        for found in tried:
            dataclasses.replace(made, **found)
    name = one.get("name") or " ".join([method, *settings])
    return PurifierSpec(name=f"(oracle) {name}" if oracle else name, purifier=made, oracle=oracle)


def _settings(one: dict[str, Any]) -> tuple[str, ...]:
    given = one.get("settings", {})
    if not isinstance(given, dict):
        raise SettingError(f"settings must be a table, got {given!r}", "Such as settings = {rate = 0.1}")
    return tuple(f"{key}={_text(value)}" for key, value in given.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


def _recipe(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of a recipe, of their types."""
    made: dict[str, Any] = fields_from(Recipe, where, where, tuple(f"{k}={_text(v)}" for k, v in given.items()))
    try:
        Recipe(**made)
    except ValueError as error:
        raise SettingError(f"{where}: {error}", "See bezoar attack --help") from None
    return made


@dataclass(frozen=True)
class ScanSettings:
    """The scan that purifiers with a trigger need.

    Attributes:
        seeds: Seeds, at least 1.
        budget: Seconds allowed; None for no limit.
        additive: Also search for faint changes of the whole image.
    """

    seeds: int = 3
    budget: float | None = None
    additive: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1 or (self.budget is not None and self.budget <= 0):
            raise SettingError("[scan] needs seeds of at least 1, and a budget above 0 seconds")


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    found = raw.get(name, {})
    if not isinstance(found, dict):
        raise SettingError(f"[{name}] must be a table", "See examples/grid.toml")
    _known(f"[{name}]", found, _KNOWN[name])
    return found


def _tables(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = raw.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise SettingError(f"the grid needs at least one [[{name}]]", "See examples/grid.toml")
    for one in found:
        _known(f"[[{name}]]", one, _KNOWN[name])
    return found


def _known(where: str, given: dict[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(known))}"
            raise SettingError(f"{where} has no {key!r}", hint)


def _as(where: str, value: Any, kind: type[Any]) -> Any:
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise SettingError(f"{where} must be {'a number' if kind is int else 'a text'}, got {value!r}")
    return value


def _integers(head: dict[str, Any], name: str, usual: tuple[int, ...], least: int) -> tuple[int, ...]:
    found = head.get(name, list(usual))
    if not isinstance(found, list) or not found or not all(type(v) is int and v >= least for v in found):
        raise SettingError(
            f"[grid] {name} must be a list of whole numbers, at least {least}", f"Such as {name} = [500]"
        )
    return tuple(dict.fromkeys(found))


def _texts(table: dict[str, Any], name: str) -> tuple[str, ...]:
    found = table.get(name, [])
    if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
        raise SettingError(f"{name} must be a list of texts", f'Such as {name} = ["wrn-16-1"]')
    return tuple(found)
