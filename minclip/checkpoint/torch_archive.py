"""Tensors of a PyTorch file, TorchScript or torch.save, without torch and without running anything.

Such a file is a zip archive: `NAME/data.pkl` says how the tensors are called and laid out,
`NAME/data/0`, `1` and so on hold their numbers, uncompressed. data.pkl is a pickle, which is a program
for a small stack machine that may call any function there is. The machine here knows some thirty of
its instructions and calls nothing: pickletools splits the program up, lists and dicts are
built, a tensor becomes a note of where it lies, and any name that such files do not need is refused.
"""

import collections
import io
import pickletools
import warnings

import numpy as np

from minclip.checkpoint.tensor_files import Stored, map_file, numbers, stored_bytes, zip_members

# Far more than any CLIP needs, its optimizer included; these bound time and memory.
MOST_INSTRUCTIONS = 1_000_000
MOST_NODES = 100_000
DEEPEST = 60

STORAGES = {  # what a tensor's numbers are, and their size in bytes
    "torch.HalfStorage": ("float16", 2),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.FloatStorage": ("float32", 4),
    "torch.DoubleStorage": ("float64", 8),
    "torch.LongStorage": ("int64", 8),
    "torch.IntStorage": ("int32", 4),
    "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.BoolStorage": ("bool", 1),
}
NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
    *STORAGES,
}


def read_archive(path):
    """(tensors, classes) of a PyTorch file, both by dotted name as in state_dict.

    tensors   `Stored`, read when asked for
    classes   of a TorchScript archive the class of each module; empty for one of torch.save
    """
    data = map_file(path)
    members = zip_members(path, data)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} entries NAME/data.pkl; PyTorch's have one")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members:
        start, size = stored_bytes(members, f"{folder}byteorder", data)
        if data[start : start + size] != b"little":
            raise ValueError("written on a big-endian machine: save it again on a little-endian one")

    def storage(key):
        return data, *stored_bytes(members, f"{folder}data/{key}", data)

    start, size = stored_bytes(members, pickles[0], data)
    return flatten(Machine(storage).run(data[start : start + size]))


def flatten(tree):
    """(tensors, classes) by dotted name, of nested dicts and modules."""
    tensors, classes = {}, {}
    waiting, visited = [((), tree)], 0
    while waiting:
        path, node = waiting.pop()
        visited += 1
        if len(path) > DEEPEST or visited > MOST_NODES:
            raise ValueError("data.pkl nests deeper or wider than any model")
        if isinstance(node, Stored):
            tensors[".".join(path)] = node
        elif isinstance(node, Module):
            classes[".".join(path)] = node.kind
            node = node.attributes
        if isinstance(node, dict):
            waiting += [((*path, str(key)), child) for key, child in reversed(node.items())]
    return tensors, classes


class Module:
    """A TorchScript object: the name of its class, and its attributes."""

    def __init__(self, kind):
        self.kind, self.attributes = kind, {}


class Name(str):
    """A global that the pickle mentions, as module.name: nothing is looked up by it."""


class Machine:
    """A stack machine that knows the instructions of a pickle of tensors: each method is one, by its name.

    It handles only numbers, strings, tuples, lists, dicts and the classes of this file, so there is
    nobody else's method that a hostile pickle could reach.
    """

    def __init__(self, storage):
        self.stack, self.marks, self.memo, self.storage = [], [], {}, storage

    def run(self, program):
        """What the program leaves on the stack."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pickletools' own, of odd escapes in a damaged name
                self.obey(pickletools.genops(io.BytesIO(program)))
            return self.stack.pop()
        except IndexError:
            raise ValueError("data.pkl is refused: it takes from an empty stack") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"data.pkl is refused: {error}") from None

    def obey(self, instructions):
        for count, (opcode, argument, _) in enumerate(instructions):
            if count == MOST_INSTRUCTIONS:
                raise ValueError("longer than any model's")
            if opcode.name in PUSHES:
                self.stack.append(argument)
            elif opcode.name in INSTRUCTIONS:
                getattr(self, opcode.name)(argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"the instruction {opcode.name}, which no model needs")

    def MARK(self, _):
        self.marks.append(len(self.stack))

    def since_mark(self):
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
        only(list, self.stack[-1]).append(item)

    def APPENDS(self, _):
        items = self.since_mark()
        only(list, self.stack[-1]).extend(items)

    def SETITEM(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def SETITEMS(self, _):
        self.fill(self.since_mark())

    def fill(self, items):
        target = only(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tuple: the hash of a deeply nested one would overrun the interpreter's own stack.
            target[key if type(key) is int else only(str, key)] = value

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

    def name(self, module, name):
        if module.split(".")[0] != "__torch__" and f"{module}.{name}" not in NAMES:
            raise ValueError(f"it would use {module}.{name}, and nothing is run: save the state_dict alone")
        self.stack.append(Name(f"{module}.{name}"))

    def REDUCE(self, _):
        arguments = only(tuple, self.stack.pop())
        name = only(Name, self.stack.pop())
        if name == "collections.OrderedDict" and not arguments:
            self.stack.append({})
        elif name == "torch._utils._rebuild_tensor_v2":
            self.stack.append(tensor(*arguments[:4]))
        elif name == "torch._utils._rebuild_parameter" or name.startswith("torch.jit._pickle."):
            self.stack.append(arguments[0])  # the thing itself; what follows says how it was used
        else:
            raise ValueError(f"a call of {name} with {len(arguments)} arguments")

    def NEWOBJ(self, _):
        only(tuple, self.stack.pop())
        self.stack.append(Module(only(Name, self.stack.pop())))

    def BUILD(self, _):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Module):  # a dict is built too, with versions that nobody needs
            self.stack[-1].attributes = only(dict, state)

    def BINPERSID(self, _):
        kind, name, key, _device, count = only(tuple, self.stack.pop())
        if kind != "storage" or only(Name, name) not in STORAGES:
            raise ValueError(f"a storage of {name!r:.80}, which is no plain tensor's")
        dtype, itemsize = STORAGES[name]
        data, start, size = self.storage(only(str, key))
        if only(int, count) * itemsize > size:
            raise ValueError(f"storage {key:.80} should hold {count} numbers, but has {size} bytes")
        self.stack.append(Storage(data, dtype, start, count))


Storage = collections.namedtuple("Storage", "data dtype start count")


def tensor(storage, offset, shape, strides):
    """A tensor over a storage, once every one of its elements lies within it, and none on another."""
    data, dtype, start, count = only(Storage, storage)
    for number in (offset, *only(tuple, shape), *only(tuple, strides)):
        if only(int, number) < 0:
            raise ValueError("a tensor with a negative size, stride or offset")
    reach = 0  # how far the axes so far take us
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"a tensor of shape {list(shape)} whose elements overlap")
        reach += stride * max(size - 1, 0)
    if 0 not in shape and offset + reach >= count:
        raise ValueError(f"a tensor of shape {list(shape)} that reaches out of its storage")

    def read():
        if 0 in shape:
            return np.empty(shape, np.float32)
        flat = numbers(data, dtype, start, count)[offset : offset + reach + 1]
        return np.lib.stride_tricks.as_strided(flat, shape, [stride * flat.itemsize for stride in strides])

    return Stored(shape, dtype, read)


def only(kind, value):
    """value, if it is exactly of that kind."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


PUSHES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
INSTRUCTIONS = {name for name in vars(Machine) if name.isupper()}
