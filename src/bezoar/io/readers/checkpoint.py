"""Files of ``torch.save``, zip and older: state dicts, and whole modules made only of known layers."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bezoar.core.errors import BezoarError, ModelError, UnsafeError
from bezoar.io.containers import Source, check_zip, open_source, read_entry, replace_when_done, sha256
from bezoar.io.extras import one_line
from bezoar.io.readers import _allowlist, _pickle, _state, _tree
from bezoar.io.readers._base import Loaded, Options, as_float32, check_target, file_name

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_OLD_PICKLE = 1 << 20


@dataclass(frozen=True)
class Content:
    """What opening the file would take.

    Attributes:
        container: ``zip``, ``legacy`` (torch before 1.6) or ``pickle`` (not of torch at all).
        classes: Layers of known libraries in it, by dotted name.
        code: Everything else that it wants to call.
    """

    container: str
    classes: dict[str, type[nn.Module]]
    code: tuple[str, ...]


@dataclass(frozen=True)
class _Reader:
    """A state dict or a module, somewhere in a file of ``torch.save``."""

    def matches(self, source: Source) -> bool:
        names = source.zip_names
        if names:
            return any(n.endswith("/data.pkl") for n in names) and not any("/code/" in n for n in names)
        return source.head[:1] == b"\x80" and source.head[1:2] <= b"\x05" or _is_old_pickle(source)

    def read(self, source: Source, options: Options) -> Loaded:
        content = inspect(source)
        _judge(source, content, options.allow_code)
        found, notes = _tree.find(_open(source, content), source.path.name)
        if isinstance(found.value, nn.Module):
            loaded = _read_module(source, content, found, options)
        else:
            loaded = _read_state(source, content, found, options)
        return Loaded(**{**vars(loaded), "warnings": (*notes, *loaded.warnings)})


def _read_state(source: Source, content: Content, found: _tree.Found, options: Options) -> Loaded:
    assert isinstance(found.value, dict)
    built = _state.build(_tree.tensors(found.value), options, source.path.name)
    return Loaded(
        network=built.network,
        format="state-dict",
        arch=built.architecture.name,
        origin=_origin(source, content, found, built.names),
        size=built.plan.size,
        channels=built.plan.channels,
        warnings=built.warnings,
    )


def _read_module(source: Source, content: Content, found: _tree.Found, options: Options) -> Loaded:
    assert isinstance(found.value, nn.Module)
    where = source.path.name
    if not content.code:
        _allowlist.check_tree(found.value, where)
    try:
        network = unwrap(found.value)
        state = network.state_dict()
        _state.check_tensors(state, where)
        _state.check_finite(state, where)
        network = as_float32(network)
    except BezoarError:
        raise
    except Exception as error:  # a module with attributes of the wrong kind raises anything
        raise ModelError(f"{where}: the module in it is damaged ({one_line(error)})", "Get another copy") from None
    return Loaded(
        network=network,
        format="pickled-module",
        arch=type(network).__name__,
        origin=_origin(source, content, found, {key: key for key in state}),
        warnings=("--arch was ignored: the file holds the whole module",) if options.arch else (),
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, which looks for the devices of the machine that it was saved on."""
    while isinstance(module, nn.DataParallel):
        module = module.module
    return module


@dataclass(frozen=True)
class _Origin:
    """The same nesting, keys, dtypes and other entries, with other weights.

    Attributes:
        path, sha256: The file that was read.
        address: Where the weights stand in it.
        names: Key in the file to key in the network.
        code: Whether the user allowed it to run code.
    """

    path: Path
    sha256: str
    address: _tree.Address
    names: dict[str, str]
    code: bool

    def write(self, network: nn.Module, folder: Path, name: str | None = None) -> Path:
        target = folder / file_name(self.path, name)
        check_target(self.path, self.sha256, target)
        source = open_source(self.path)
        content = inspect(source)
        _judge(source, content, self.code)
        root = _open(source, content)
        place = _tree.at(root, self.address)
        old = unwrap(place).state_dict() if isinstance(place, nn.Module) else place
        with torch.no_grad():
            for key, value in _state.changed(network, self.names).items():
                if old[key].shape != value.shape:
                    raise ModelError(f"{key} changed its shape from {tuple(old[key].shape)} to {tuple(value.shape)}")
                old[key].copy_(value)
        with replace_when_done(target) as part, part.open("wb") as file:
            if content.container == "pickle":
                pickle.dump(root, file)
            else:
                torch.save(root, file, _use_new_zipfile_serialization=content.container == "zip")
        return target


def _origin(source: Source, content: Content, found: _tree.Found, names: dict[str, str]) -> _Origin:
    return _Origin(source.path, sha256(source.path), found.address, names, bool(content.code))


def inspect(source: Source) -> Content:
    """Find out what is in the file without running any of it.

    Raises:
        ModelError: Damaged, or it claims more than it holds.
    """
    try:
        return _inspect_zip(source) if source.head.startswith(b"PK") else _inspect_legacy(source)
    except _pickle.HostilePickle as error:
        raise ModelError(f"{source.path}: {one_line(error)}", "The file is damaged or hostile: get it again") from None


def _inspect_zip(source: Source) -> Content:
    entries = check_zip(source)
    roots = {name.partition("/")[0] for name in entries}
    root = next(iter(roots))
    if len(roots) > 1 or f"{root}/data.pkl" not in entries:
        raise ModelError(f"{source.path}: {len(roots)} folders in the archive, torch writes one", "Get another copy")
    found = _pickle.scan(read_entry(source, entries[f"{root}/data.pkl"], _pickle.MAX_PICKLE))
    for key, claimed in found.storages.items():
        entry = entries.get(f"{root}/data/{key}")
        if entry is None or entry.file_size < claimed:
            held = 0 if entry is None else entry.file_size
            raise ModelError(
                f"{source.path}: storage {key[:40]!r} claims {claimed} bytes and has {held}", "Get it again"
            )
    return _content("zip", found)


def _inspect_legacy(source: Source) -> Content:
    with source.path.open("rb") as file:
        data = file.read(_pickle.MAX_PICKLE)
    first = _pickle.scan(data)
    if first.value != _MAGIC:
        return _content("pickle", first)
    # Magic number, protocol, system, the object, keys of the storages; then the storages themselves.
    scans = [first]
    for _ in range(4):
        scans.append(_pickle.scan(data, scans[-1].end))
    claimed, left = sum(scans[3].storages.values()), source.size - scans[-1].end
    if claimed > left:
        raise ModelError(
            f"{source.path}: its tensors claim {claimed} bytes, {left} follow", "The file is truncated: get it again"
        )
    everything = _pickle.Scan()
    for one in scans:
        everything.globals |= one.globals
        everything.unusual |= one.unusual
        everything.instances |= one.instances
    return _content("legacy", everything)


def _content(container: str, found: _pickle.Scan) -> Content:
    classes, rest = _allowlist.split(found.unknown() - found.unusual)
    code = sorted({*rest, *found.unusual, *(found.instances - classes.keys() - found.globals)})
    return Content(container, classes, tuple(code))


def _judge(source: Source, content: Content, allow_code: bool) -> None:
    quantised = [name for name in content.code if "qtensor" in name or "sparse" in name]
    if quantised:
        raise ModelError(f"{source.path} holds quantised or sparse tensors", "Export the float weights")
    if content.code and not allow_code:
        raise UnsafeError(
            f"{source.path} is not only weights: opening it would call {_state.listing(content.code, 8)}",
            "Ask for its state dict or a safetensors file; --allow-code runs whatever the file brings",
        )
    if content.container == "pickle" and not content.code:
        raise ModelError(
            f"{source.path} is a plain pickle, not a file of torch.save", "Save the weights with torch.save"
        )


def _open(source: Source, content: Content) -> Any:
    """Load with torch's own restricted unpickler; without it only where there is code and the user allowed it."""
    try:
        with warnings.catch_warnings(), source.path.open("rb") as file:
            warnings.simplefilter("ignore")
            if content.container == "pickle":
                return pickle.load(file)
            if content.code:
                return torch.load(file, map_location="cpu", weights_only=False)
            with _allowlist.safe_globals(content.classes):
                return torch.load(file, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ModelError(f"{source.path} needs the module {error.name!r}", "Put its code on PYTHONPATH") from None
    except Exception as error:  # a crafted file makes torch raise anything
        raise ModelError(f"{source.path}: torch cannot read it ({one_line(error)})", "Get another copy") from None


def _is_old_pickle(source: Source) -> bool:
    """A pickle of protocol 0 or 1 looks like text; it is recognised so that the refusal can say what it would call."""
    if source.is_folder or source.size > _OLD_PICKLE or source.head[:1] not in (b"c", b"(", b"]", b"}", b"i"):
        return False
    try:
        data = source.path.read_bytes()
        found = _pickle.scan(data)
    except (_pickle.HostilePickle, OSError):
        return False
    return found.end == len(data.rstrip()) and bool(found.globals)


READER = _Reader()
