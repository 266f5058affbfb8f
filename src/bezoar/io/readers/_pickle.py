"""What a pickle would do, found without doing it.

torch's ``weights_only`` unpickler decides what may be called. It does not bound what the calls cost: a storage of a
petabyte, a tensor larger than its storage, a constructor with hostile sizes. This module walks the opcodes with
placeholders for all values and refuses those before torch sees the file.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch

MAX_PICKLE = 32 << 20
MAX_OPCODES = 3_000_000

_STORAGE_BYTES = {
    "ComplexDoubleStorage": 16,
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_REBUILD_TENSOR = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_NUMPY_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NUMPY_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NUMPY_DTYPE = re.compile(r"[<>=|]?[biufc][0-9]{1,2}")
#: Functions that may be called; torch's own list is longer, but the rest can take memory without bound.
_CALLABLE = {
    *_REBUILD_TENSOR,
    *_NUMPY_SCALARS,
    *_NUMPY_ARRAYS,
    "numpy.dtype",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "collections.OrderedDict",
    "collections.Counter",
    "builtins.set",
    "builtins.complex",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
}
#: Classes that may be made without their constructor and filled with a state.
_PLAIN_CLASSES = {"argparse.Namespace", "torch.nn.parameter.Parameter"}
#: Classes that are named in plain values, but neither called nor made on their own.
_NAMED = {"torch.Tensor", "numpy.ndarray"}
_BUILDABLE = {*_PLAIN_CLASSES, *_NUMPY_ARRAYS, "collections.OrderedDict", "numpy.dtype"}


class HostilePickle(Exception):  # noqa: N818 - not an error of ours: readers turn it into a ModelError
    """The pickle is damaged, or asks for more than the file holds."""


@dataclass(frozen=True)
class _Global:
    path: str


@dataclass(frozen=True)
class _Storage:
    item: int
    numel: int


@dataclass(frozen=True)
class _Made:
    """The result of a call, or an instance, of what stands at ``path``."""

    path: str


class _Marker:
    pass


_OTHER = object()


@dataclass
class Scan:
    """What a pickle names and claims.

    Attributes:
        globals: Dotted names of all functions and classes that it asks for.
        unusual: Calls and instances that the plain list of this module does not allow.
        instances: Classes that are made without their constructor.
        storages: Bytes that each storage claims, by its key.
        value: The pickled value where it is a number, a string or a tuple of these.
        end: Where the pickle ends.
    """

    globals: set[str] = field(default_factory=set)
    unusual: set[str] = field(default_factory=set)
    instances: set[str] = field(default_factory=set)
    storages: dict[str, int] = field(default_factory=dict)
    value: Any = None
    end: int = 0

    def unknown(self) -> set[str]:
        """Names that a plain checkpoint has no use for."""
        return {name for name in self.globals if not is_plain(name)} | self.unusual


def is_plain(name: str) -> bool:
    """Whether a dotted name belongs in a checkpoint of tensors and plain values."""
    if name in _CALLABLE or name in _PLAIN_CLASSES or name in _DTYPES or name in _NAMED:
        return True
    package, _, last = name.rpartition(".")
    return last in _STORAGE_BYTES and package in ("torch", "torch.cuda", "torch.storage")


def scan(data: bytes, start: int = 0) -> Scan:
    """Walk one pickle.

    Args:
        data: The file's bytes, or as many as a pickle may take.
        start: Where the pickle begins.

    Raises:
        HostilePickle: It is damaged or truncated, too long, or builds a tensor larger than its storage.
    """
    walker = _Walker()
    stream = BytesIO(data)
    stream.seek(start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of odd escapes in names
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count > MAX_OPCODES:
                    raise HostilePickle(f"more than {MAX_OPCODES} opcodes")
                walker.step(opcode, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise HostilePickle(f"damaged pickle: {error}") from None
    walker.found.end = stream.tell()
    return walker.found


class _Walker:
    """A pickle machine on placeholders."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.found = Scan()

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        handler = _HANDLERS.get(opcode.name)
        if handler is not None:
            handler(self, argument)
        elif opcode.name in _CONSTANTS:
            self.stack.append(argument)
        elif opcode.name not in ("PROTO", "FRAME"):
            self._generic(opcode)

    def _generic(self, opcode: pickletools.OpcodeInfo) -> None:
        """Any other opcode: pop and push as many values as its description says."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            self._pop_mark()
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            self.stack.pop()
        self.stack.extend(_OTHER for _ in opcode.stack_after)

    def _pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(top := self.stack.pop(), _Marker):
            items.append(top)
        return items[::-1]

    def mark(self, _: Any) -> None:
        self.stack.append(_Marker())

    def stop(self, _: Any) -> None:
        self.found.value = self.stack.pop()

    def take(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def take_from_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise HostilePickle("a global with a computed name")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        # The same renaming of Python 2 names that torch does.
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        module = IMPORT_MAPPING.get(module, module)
        path = f"{module}.{name}"
        self.found.globals.add(path)
        self.stack.append(_Global(path))

    def extension(self, code: int) -> None:
        self.found.unusual.add(f"copyreg extension {code}")
        self.stack.append(_OTHER)

    def old_instance(self, argument: str) -> None:
        self._pop_mark()
        self.take(argument)
        self.found.unusual.add(self.stack[-1].path)

    def old_object(self, _: Any) -> None:
        maker = self._pop_mark()[0]
        self.found.unusual.add(_name(maker))
        self.stack.append(_OTHER)

    def put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    def pack(self, count: int | None) -> None:
        items = self._pop_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))

    def drop(self, _: Any) -> None:
        self.stack.pop()

    def drop_mark(self, _: Any) -> None:
        self._pop_mark()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def store(self, count: int | None) -> None:
        """Put values into the container below them, which stays what it is."""
        if count is None:
            self._pop_mark()
        else:
            del self.stack[-count:]
        self.stack[-1]  # noqa: B018 - IndexError where there is no container

    def keyword_instance(self, _: Any) -> None:
        made = self.stack[-3]
        del self.stack[-3:]
        self.found.unusual.add(_name(made))
        self.stack.append(_OTHER)

    def persistent(self, _: Any) -> None:
        identity = self.stack.pop()
        if not isinstance(identity, tuple) or len(identity) < 5 or _text(identity[0]) != "storage":
            self.found.unusual.add("a persistent object that is not a storage")
            self.stack.append(_OTHER)
            return
        kind, key, numel = identity[1], identity[2], identity[4]
        last = kind.path.rpartition(".")[2] if isinstance(kind, _Global) and is_plain(kind.path) else ""
        if last not in _STORAGE_BYTES or type(numel) is not int or numel < 0:
            raise HostilePickle("a storage of unknown type or size")
        if len(identity) > 5 and identity[5] is not None:
            raise HostilePickle("a view of a storage, as torch before 0.4 wrote it; load and save it again with torch")
        storage = _Storage(_STORAGE_BYTES[last], numel)
        name = _text(key)
        self.found.storages[name] = max(self.found.storages.get(name, 0), storage.item * numel)
        self.stack.append(storage)

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        path = _name(function)
        if not isinstance(function, _Global) or path not in _CALLABLE or not isinstance(arguments, tuple):
            self.found.unusual.add(path)
        elif path in _REBUILD_TENSOR:
            _check_tensor(path, arguments)
        elif not _numpy_call_is_plain(path, arguments):
            self.found.unusual.add(path)
        self.stack.append(_Made(path))

    def instance(self, _: Any) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        path = _name(made)
        if not isinstance(made, _Global) or (arguments != () and path not in _PLAIN_CLASSES):
            self.found.unusual.add(path)
        if path not in _PLAIN_CLASSES:
            self.found.instances.add(path)
        self.stack.append(_Made(path))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        path = target.path if isinstance(target, _Made) else ""
        if path == "numpy.dtype" and not (isinstance(state, tuple) and state[2:7] == (None, None, None, -1, -1)):
            self.found.unusual.add("numpy.dtype with a structure")
        if path in _NUMPY_ARRAYS and not _is_array_state(state):
            self.found.unusual.add("numpy.ndarray of something else than numbers")
        if path not in _BUILDABLE and path not in self.found.instances:
            self.found.unusual.add(f"a state for {path or 'a plain value'}")


def _check_tensor(path: str, arguments: tuple[Any, ...]) -> None:
    storage, offset, size, stride = arguments[:4]
    item = _STORAGE_BYTES["UntypedStorage"]
    if path.endswith("_v3"):
        dtype = _DTYPES.get(_name(arguments[6]))
        if dtype is None:
            raise HostilePickle("a tensor of unknown dtype")
        item = dtype.itemsize
    if not isinstance(storage, _Storage) or type(offset) is not int:
        raise HostilePickle("a tensor without a storage")
    if not all(isinstance(v, tuple) and all(type(n) is int and n >= 0 for n in v) for v in (size, stride)):
        raise HostilePickle("a tensor with a damaged shape")
    if len(size) != len(stride) or len(size) > 64 or offset < 0:
        raise HostilePickle("a tensor with a damaged shape")
    room = storage.numel * storage.item // item if path.endswith("_v3") else storage.numel
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numel else 0
    if max(last, numel) > room:
        raise HostilePickle(f"a tensor of {numel} values in a storage of {room}")


def _is_number_type(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments) and isinstance(arguments[0], str) and _NUMPY_DTYPE.fullmatch(arguments[0]) is not None


def _numpy_call_is_plain(path: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call of NumPy's, where it is one, makes a number type or an array that a state will fill."""
    if path == "numpy.dtype":
        return _is_number_type(arguments)
    if path in _NUMPY_ARRAYS:
        return len(arguments) == 3 and _name(arguments[0]) == "numpy.ndarray" and arguments[1] == (0,)
    return True


def _is_array_state(state: Any) -> bool:
    """Whether an array's state is its shape, a number type and the bytes; NumPy itself checks that these fit."""
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[1], tuple):
        return False
    _, shape, dtype, _, content = state
    if not all(type(n) is int and n >= 0 for n in shape) or not isinstance(dtype, _Made):
        return False
    written = isinstance(content, bytes) or (isinstance(content, _Made) and content.path == "_codecs.encode")
    return dtype.path == "numpy.dtype" and (written or math.prod(shape) == 0)


def _name(value: Any) -> str:
    return value.path if isinstance(value, _Global | _Made) else "a computed value"


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else repr(type(value))


_CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "NONE", "NEWTRUE"),
    *("NEWFALSE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_HANDLERS: dict[str, Callable[[_Walker, Any], None]] = {
    "MARK": _Walker.mark,
    "STOP": _Walker.stop,
    "GLOBAL": _Walker.take,
    "STACK_GLOBAL": _Walker.take_from_stack,
    "INST": _Walker.old_instance,
    "OBJ": _Walker.old_object,
    "PUT": _Walker.put,
    "BINPUT": _Walker.put,
    "LONG_BINPUT": _Walker.put,
    "MEMOIZE": _Walker.memoize,
    "GET": _Walker.get,
    "BINGET": _Walker.get,
    "LONG_BINGET": _Walker.get,
    "EMPTY_TUPLE": lambda walker, _: walker.pack(0),
    "TUPLE1": lambda walker, _: walker.pack(1),
    "TUPLE2": lambda walker, _: walker.pack(2),
    "TUPLE3": lambda walker, _: walker.pack(3),
    "TUPLE": lambda walker, _: walker.pack(None),
    "APPEND": lambda walker, _: walker.store(1),
    "SETITEM": lambda walker, _: walker.store(2),
    **dict.fromkeys(("APPENDS", "SETITEMS", "ADDITEMS"), lambda walker, _: walker.store(None)),
    "POP": _Walker.drop,
    "POP_MARK": _Walker.drop_mark,
    "DUP": _Walker.duplicate,
    "BINPERSID": _Walker.persistent,
    "REDUCE": _Walker.call,
    "NEWOBJ": _Walker.instance,
    "NEWOBJ_EX": _Walker.keyword_instance,
    "BUILD": _Walker.build,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Walker.extension),
}
