"""PyTorch's files, of torch.save and TorchScript, read without torch and without running anything.

Since torch 1.6 such a file is a zip archive. `NAME/data.pkl` is a pickle that says how the tensors are called
and laid out; `NAME/data/0`, `NAME/data/1` and so on hold their numbers, uncompressed. An older file is a row
of five pickles, which the storages follow. `PickleMachine` reads the pickles of both.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from minclip.checkpoint.pickle_machine import Inert, PickleMachine, Storage, only
from minclip.checkpoint.tensor_files import Stored, map_file
from minclip.checkpoint.zip_archive import ZipArchive

DEEPEST = 60  # levels of nesting; a model has about ten
MOST_LETTERS = 2**24  # of all names together: nested dicts can share one long key
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file written before torch 1.6
PARTS = {"_modules", "_parameters", "_buffers"}  # where a pickled torch.nn.Module keeps its tensors


class TorchFile(NamedTuple):
    """The contents of a PyTorch file.

    tensors   by dotted name, as in a state_dict
    classes   the class of every object by dotted name; in a TorchScript archive, of every module
    foreign   the globals that the pickle mentions and no tensor needs
    """

    tensors: dict[str, Stored]
    classes: dict[str, str]
    foreign: list[str]


def read_archive(archive: ZipArchive) -> TorchFile:
    """Read the zip archive that torch.save and torch.jit.save write."""
    pickles = [name for name in archive.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} entries NAME/data.pkl; PyTorch's have one")
    folder = pickles[0].removesuffix("data.pkl")
    if archive.entries.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("written on a big-endian machine: save it again on a little-endian one")
    archive.locate(pickles[0])
    machine = PickleMachine()
    with refusing("its pickle, data.pkl,"):
        tree = machine.run(io.BytesIO(archive.read(pickles[0])))
        for storage in machine.storages.values():
            name = f"{folder}data/{storage.key}"
            storage.start, size = archive.locate(name)
            storage.data, storage.verify = (
                archive.data,
                functools.partial(archive.verify, name, storage.dtype),
            )
            check_size(storage, size)
        return TorchFile(*flatten(tree), list(machine.foreign))


def read_legacy(path: str | os.PathLike[str]) -> TorchFile:
    """Read a file of torch.save from before torch 1.6: five pickles, and the storages behind them.

    The pickles are a magic number, the version, the machine's byte order, the object, and the storages' keys
    in the order of the file. Each storage begins with the count of its numbers, in 8 bytes.
    """
    data = map_file(path)
    machine = PickleMachine()
    with refusing("its pickle"):
        if machine.run(data) != MAGIC:
            raise ValueError("torch did not write it, and nothing is run: save its arrays with numpy.savez")
        _, system, tree, keys = (machine.run(data) for _ in range(4))
        if type(system) is dict and system.get("little_endian") is False:
            raise ValueError("written on a big-endian machine: save it again on a little-endian one")
        place_storages(machine, data, only(list, keys))
        return TorchFile(*flatten(tree), list(machine.foreign))


def place_storages(machine: PickleMachine, data: mmap.mmap, keys: list[Any]) -> None:
    """Find the storages of an old file, which follow its pickles in the order of the keys."""
    start = data.tell()
    for key in keys:
        storage = machine.storages.get(only(str, key))
        if storage is None:
            raise ValueError(f"the file has a storage {key:.80} that its pickle does not mention")
        count = data[start : start + 8]
        if count != struct.pack("<q", storage.count):
            raise ValueError(f"storage {key:.80} is cut off, or has another size than its pickle says")
        storage.data, storage.start = data, start + 8
        start += 8 + storage.count * storage.itemsize
        if start > len(data):
            raise ValueError(f"storage {key:.80} ends outside the file: it may be cut short")
    for storage in machine.storages.values():
        if storage.data is None:
            raise ValueError(f"storage {storage.key:.80} is missing")


@contextlib.contextmanager
def refusing(pickle: str) -> Iterator[None]:
    """Say of a ValueError that it came from a pickle."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{pickle} is refused: {error}") from None


def check_size(storage: Storage, size: int) -> None:
    if storage.count * storage.itemsize != size:
        raise ValueError(
            f"storage {storage.key:.80} should hold {storage.count} numbers, but has {size} bytes"[:200]
        )


def flatten(tree: Any) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return (tensors, classes) by dotted name, of nested dicts, lists and objects.

    Each dict, list and object is visited once, under its first name. So the time is linear although they may
    share their items, and may contain themselves.
    """
    tensors: dict[str, Stored] = {}
    classes: dict[str, str] = {}
    letters, visited = 0, set()
    waiting: list[tuple[str, int, Any]] = [("", 0, tree)]
    while waiting:
        name, depth, node = waiting.pop()
        if type(node) is Stored:
            tensors[name] = node
            continue
        if type(node) is Inert:
            classes[name] = node.name
        if id(node) not in visited:
            visited.add(id(node))
            children = items(node)
            letters += sum(len(name) + len(key) for key, _ in children)
            if depth > DEEPEST or letters > MOST_LETTERS:
                raise ValueError("it nests deeper or has longer names than any model's")
            waiting += [(joined(name, key), depth + 1, child) for key, child in reversed(children)]
    return tensors, classes


def items(node: Any) -> list[tuple[str, Any]]:
    """Return the (key, child) pairs of a dict, an object, a list or a tuple that may hold tensors."""
    if type(node) is Inert:
        node = node.attributes
    if type(node) is dict:
        pairs = list(node.items())
    elif type(node) in (list, tuple):
        pairs = [(str(i), child) for i, child in enumerate(node)]
    else:
        return []
    return [(key, child) for key, child in pairs if type(child) in (Stored, Inert, dict, list, tuple)]


def joined(name: str, key: str) -> str:
    if key in PARTS:
        return name
    return f"{name}.{key}" if name else key
