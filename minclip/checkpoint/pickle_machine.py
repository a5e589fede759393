"""The pickle of a PyTorch file, read without running anything.

A pickle is a program for a small stack machine, which may call any function there is. This machine knows some
fifty of its instructions and calls nothing. Lists and dicts are built, and a tensor becomes a note of where
its numbers lie. Every other global becomes an `Inert` placeholder, which is never looked up, imported or
called; a "call" of a placeholder gives another placeholder. Time and memory grow linearly with the program.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from minclip.checkpoint.tensor_files import Stored, numbers

# Far more than any CLIP needs, its optimizer included. These bound time and memory.
MOST_INSTRUCTIONS = 1_000_000
LONGEST_GLOBAL = 250
MOST_AXES = 64

DTYPES = {  # torch's storage class: the dtype of its numbers, and their size in bytes
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
STORAGES = {f"{module}.{name}": known for name, known in DTYPES.items() for module in ("torch", "torch.cuda")}
UNTYPED = {f"torch{module}.UntypedStorage" for module in ("", ".storage", ".cuda")}
STORAGES |= dict.fromkeys(UNTYPED, ("uint8", 1))
ITEMSIZES = {f"torch.{name}": size for name, size in DTYPES.values()}
ITEMSIZES |= {"torch.float8_e4m3fn": 1, "torch.float8_e5m2": 1}
ITEMSIZES |= {"torch.uint16": 2, "torch.uint32": 4, "torch.uint64": 8}

DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
TENSORS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
# A call that gives its first argument: a parameter is its tensor, a size is its tuple. TorchScript's
# functions tell the type of a list, which is not needed.
WRAPPERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch.Size"}
WRAPPERS |= {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}
WRAPPERS |= {"torch.jit._pickle.restore_type_tag"}
SUBCLASS = "torch._tensor._rebuild_from_type_v2"
HARMLESS = {*STORAGES, *ITEMSIZES, *DICTS, *TENSORS, *WRAPPERS, SUBCLASS, "torch.device", "builtins.set"}
HARMLESS |= {"torch.serialization._get_layout", "torch.nn.parameter.Parameter"}


class Inert:
    """A placeholder for a global or an object of a class that the machine does not know.

    name         the global's module and name, or the name of the object's class
    attributes   the items and attributes that the pickle gives to the object
    """

    __slots__ = ("attributes", "name")

    def __init__(self, name: str):
        self.name = name
        self.attributes: dict[str, Any] = {}


class Storage:
    """The numbers that tensors are views of. The archive's reader sets data and start."""

    def __init__(self, key: str, dtype: str, itemsize: int, count: int):
        self.key, self.dtype, self.itemsize, self.count = key, dtype, itemsize, count
        self.data: Any = None
        self.start = 0
        self.verify: Callable[[], bool | None] = lambda: None


class PickleMachine:
    """A stack machine that knows the instructions of a pickle of tensors: each method is one, by its name.

    The machine handles only numbers, strings, tuples, lists, dicts and the classes of this file, so a hostile
    pickle reaches no method of anybody else. No message contains the `repr` of an object: nested tuples that
    share their items double its length at each level.

    storages   the storages that the pickle mentions, by key
    foreign    the names of the globals that became placeholders
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.foreign: dict[str, None] = {}

    def run(self, file: Any) -> Any:
        """Return the object that the next pickle of a binary file describes."""
        import pickletools  # here, because it takes time to import

        self.stack, self.marks, self.memo = [], [], {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pickletools warns about odd escapes in a damaged name
                self.obey(pickletools.genops(file))
            return self.stack.pop()
        except IndexError:
            raise ValueError("the pickle takes from an empty stack") from None
        except KeyError:
            raise ValueError("the pickle reads a memo entry that it never wrote") from None
        except (TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the pickle is malformed: {error!s:.200}") from None

    def obey(self, instructions: Iterable[tuple[Any, Any, Any]]) -> None:
        for count, (opcode, argument, _) in enumerate(instructions):
            if count == MOST_INSTRUCTIONS:
                raise ValueError("the pickle is longer than any model's")
            if opcode.name in PUSHES:
                self.stack.append(argument)
            elif opcode.name in INSTRUCTIONS:
                getattr(self, opcode.name)(argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"the pickle has the instruction {opcode.name}, which no model needs")

    def MARK(self, _):
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def NONE(self, _):
        self.stack.append(None)

    def NEWTRUE(self, _):
        self.stack.append(True)

    def NEWFALSE(self, _):
        self.stack.append(False)

    def EMPTY_TUPLE(self, _):
        self.stack.append(())

    def EMPTY_LIST(self, _):
        self.stack.append([])

    def EMPTY_DICT(self, _):
        self.stack.append({})

    def EMPTY_SET(self, _):
        self.stack.append(Inert("builtins.set"))

    def ADDITEMS(self, _):
        self.since_mark()
        only(Inert, self.stack[-1])

    def FROZENSET(self, _):
        self.since_mark()
        self.stack.append(Inert("builtins.frozenset"))

    def POP(self, _):
        self.stack.pop()

    def POP_MARK(self, _):
        self.since_mark()

    def TUPLE(self, _):
        self.stack.append(tuple(self.since_mark()))

    def TUPLE1(self, _):
        self.stack.append((self.stack.pop(),))

    def TUPLE2(self, _):
        second = self.stack.pop()
        self.stack.append((self.stack.pop(), second))

    def TUPLE3(self, _):
        third, second = self.stack.pop(), self.stack.pop()
        self.stack.append((self.stack.pop(), second, third))

    def APPEND(self, _):
        item = self.stack.pop()
        self.extend([item])

    def APPENDS(self, _):
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not Inert:  # a placeholder keeps no items of a list
            only(list, self.stack[-1]).extend(items)

    def SETITEM(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def SETITEMS(self, _):
        self.fill(self.since_mark())

    def fill(self, items: list[Any]) -> None:
        """Set items of the dict on the stack, under str keys.

        The hash of a str is random, so nobody can make keys that collide. An int becomes a str. An item under
        any other key, such as a class, cannot be a model's and is dropped.
        """
        target = self.stack[-1]
        target = target.attributes if type(target) is Inert else only(dict, target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) in (str, int):
                target[str(key)] = value

    def BINPUT(self, index):
        self.memo[index] = self.stack[-1]

    LONG_BINPUT = BINPUT

    def MEMOIZE(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def BINGET(self, index):
        self.stack.append(self.memo[index])

    LONG_BINGET = BINGET

    def GLOBAL(self, both):
        self.name(*both.split(" ", 1))

    def STACK_GLOBAL(self, _):
        name = only(str, self.stack.pop())
        self.name(only(str, self.stack.pop()), name)

    def name(self, module: str, name: str) -> None:
        if len(module) + len(name) > LONGEST_GLOBAL:
            raise ValueError(f"the pickle mentions a global of {len(module) + len(name)} letters")
        full = f"{module}.{name}"
        if full not in HARMLESS and not module.startswith("__torch__"):
            self.foreign[full] = None
        self.stack.append(Inert(full))

    def REDUCE(self, _):
        arguments = only(tuple, self.stack.pop())
        self.stack.append(self.reduced(only(Inert, self.stack.pop()).name, arguments))

    def reduced(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Return the object that a call would make: a dict, a tensor, an argument, or a placeholder."""
        if name in DICTS:
            return {}
        if name == SUBCLASS and len(arguments) == 4:
            return self.reduced(only(Inert, arguments[0]).name, only(tuple, arguments[2]))
        if name in TENSORS:
            dtype = only(Inert, arguments[6]).name if name.endswith("_v3") else None
            known = dtype is None or dtype in ITEMSIZES
            return tensor(*arguments[:4], dtype=dtype) if known else Inert(name)
        return arguments[0] if name in WRAPPERS and arguments else Inert(name)

    def NEWOBJ(self, _):
        arguments = only(tuple, self.stack.pop())
        name = only(Inert, self.stack.pop()).name
        self.stack.append(
            self.reduced("torch.Size" if name == "torch.nn.parameter.Parameter" else name, arguments)
        )

    def NEWOBJ_EX(self, _):
        only(dict, self.stack.pop())
        self.NEWOBJ(None)

    def BUILD(self, _):
        state = self.stack.pop()
        if type(self.stack[-1]) is Inert:  # other objects are built too, with versions that are not needed
            self.stack[-1].attributes.update(state if type(state) is dict else {})

    def BINPERSID(self, _):
        kind, storage, key, _device, count, *view = only(tuple, self.stack.pop())
        name = storage.name if type(storage) is Inert else "?"
        if kind != "storage" or name not in STORAGES:
            raise ValueError(f"the pickle mentions a storage of {name:.80}, which is no plain tensor's")
        if view not in ([], [None]):
            raise ValueError("a storage is a view of another one, as before torch 0.4")
        dtype, itemsize = STORAGES[name]
        if only(int, count) < 0:
            raise ValueError("a storage of a negative size")
        found = self.storages.setdefault(only(str, key), Storage(key, dtype, itemsize, count))
        if (found.dtype, found.count) != (dtype, count):
            raise ValueError(f"storage {key:.80} has two dtypes or sizes")
        self.stack.append(found)


def tensor(storage: Storage, offset: int, shape: Any, strides: Any, *, dtype: str | None) -> Stored:
    """Return a tensor over a storage, once its elements all lie within the storage, and none on another.

    dtype   torch's name of it, where the storage is one of untyped bytes
    """
    only(Storage, storage)
    itemsize = storage.itemsize if dtype is None else ITEMSIZES[dtype]
    dtype = storage.dtype if dtype is None else dtype.removeprefix("torch.")
    if len(only(tuple, shape)) > MOST_AXES:
        raise ValueError("a tensor with more axes than NumPy has")
    if len(only(tuple, strides)) != len(shape):
        raise ValueError(f"a tensor with {len(shape)} sizes and {len(strides)} strides")
    for number in (offset, *shape, *strides):
        if only(int, number) < 0:
            raise ValueError("a tensor with a negative size, stride or offset")
    reach = 0  # how far the axes so far take us
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"a tensor of shape {list(shape)} whose elements overlap"[:200])
        reach += stride * max(size - 1, 0)
    if 0 not in shape and offset + reach >= storage.count * storage.itemsize // itemsize:
        raise ValueError(f"a tensor of shape {list(shape)} that reaches out of its storage"[:200])

    def read() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, np.float32)
        stored.finite = storage.verify()
        start = storage.start + offset * itemsize
        flat = numbers(storage.data, dtype, start, reach + 1)
        return np.lib.stride_tricks.as_strided(flat, shape, [stride * flat.itemsize for stride in strides])

    stored = Stored(shape, dtype, read, int(np.prod(shape, dtype=object)) * itemsize, storage=storage)
    return stored


def only(kind: type, value: Any) -> Any:
    """Return value, if it is exactly of that kind."""
    if type(value) is not kind:
        found, wanted = (KINDS.get(of, of.__name__) for of in (type(value), kind))
        raise ValueError(f"the pickle has {found} where {wanted} belongs")
    return value


KINDS = {Inert: "a global", Storage: "a storage", Stored: "a tensor", type(None): "None", int: "an int"}
KINDS |= {kind: f"a {kind.__name__}" for kind in (str, bytes, bool, float, tuple, list, dict)}


PUSHES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
PUSHES |= {
    "BINUNICODE8",
    "SHORT_BINSTRING",
    "BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
INSTRUCTIONS = {name for name in vars(PickleMachine) if name.isupper()}
