"""Files of tensors: safetensors, .npz, what these share with PyTorch archives, and how to write one whole.

To read, a file is mapped: names, shapes and dtypes come from its header, and a tensor's numbers only
when somebody asks for them, so the image tower beside a text tower costs nothing.
To write, `only_when_whole` gives a file its name at the end.
"""

import contextlib
import io
import json
import math
import mmap
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import safetensors

# The floats a file can hold, by size in bytes. bfloat16 is no NumPy dtype: it becomes float32.
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# safetensors' names of dtypes, in NumPy's words; others, such as F8_E4M3, keep their own and are not read.
DTYPES = {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
DTYPES |= {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "BOOL": "bool"}

# What zipfile and numpy raise, beside ValueError, over the damaged bytes of an entry.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
DAMAGE += (SyntaxError, tokenize.TokenError, TypeError)


class Stored:
    """A tensor in a file: `shape` and `dtype` (a name) are known, np.asarray(stored) reads the numbers."""

    def __init__(self, shape, dtype, read):
        self.shape, self.dtype, self.read = tuple(shape), dtype, read

    def __array__(self, dtype=None, copy=None):
        return self.read()


@contextlib.contextmanager
def only_when_whole(path):
    """Where to write a file that is to appear at path: it gets its name at the end, or leaves no trace."""
    partial = Path(f"{path}.{os.getpid()}.partial")
    partial.touch()  # a folder that is missing or forbidden is an OSError here, whoever writes
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors puts a file of its own there, which nobody else may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def map_file(path):
    """The file's bytes, mapped: nothing is read yet, and what is written to them never reaches the file."""
    with open(path, "rb") as file:
        if not file.seek(0, io.SEEK_END):
            raise ValueError("the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def numbers(data, dtype, start, count):
    """count numbers of the bytes data from start on, as a flat array: a view wherever it can be one."""
    if dtype == "bfloat16":  # the upper half of a float32
        upper = np.frombuffer(data, np.uint16, count, start)
        return (upper.astype(np.uint32) << 16).view(np.float32)
    array = np.frombuffer(data, dtype, count, start)
    return array if array.flags.aligned else array.copy()


def read_safetensors(path):
    """(tensors by name, metadata) of a safetensors file. The library checks the whole header first."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}") from None
    data = map_file(path)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        dtype = DTYPES.get(about["dtype"], about["dtype"])
        tensors[name] = in_a_row(data, dtype, about["shape"], start + about["data_offsets"][0])
    return tensors, metadata


def in_a_row(data, dtype, shape, start):
    """A tensor whose numbers lie one after the other in data."""
    return Stored(shape, dtype, lambda: numbers(data, dtype, start, math.prod(shape)).reshape(shape))


def read_npz(path):
    """Tensors by name of an .npz file, as numpy.savez and numpy.savez_compressed write it."""
    members = zip_members(path, map_file(path))
    unpacked, packed = (
        sum(getattr(m, size) for m in members.values()) for size in ("file_size", "compress_size")
    )
    if unpacked > 20 * packed + 2**20:
        raise ValueError(f"a zip bomb: {packed} bytes that would unpack to {unpacked}")
    return {name.removesuffix(".npy"): npy_member(path, member) for name, member in members.items()}


def npy_member(path, member):
    """One array of an .npz: its header now, its numbers when asked for."""
    with unpacking(path, member) as file:
        shape, fortran, dtype = npy_header(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r:.80} holds Python objects, which would have to be unpickled")
    if start + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename!r:.80} does not hold what its header says")

    def read():
        with unpacking(path, member) as file:
            flat = np.frombuffer(file.read(), dtype, offset=start)
        return flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))

    return Stored(shape, dtype.name, read)


@contextlib.contextmanager
def unpacking(path, member):
    """A stream of a zip entry's bytes; whatever zipfile and numpy find wrong with them is a ValueError."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{member.filename!r:.80} cannot be unpacked: {reason:.200}") from None


def npy_header(file):
    """(shape, whether in Fortran's order, dtype) from the head of an .npy stream."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f".npy version {version}, which no array of floats needs")


def zip_members(path, data):
    """The entries of a zip file by name, each inside the file, beside the others and harmlessly named."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"not a whole zip archive ({error}): the file may be cut short") from None
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise ValueError(f"zip entry {entry.filename!r:.80} overlaps the one before it")
        end = data_start(entry, data) + entry.compress_size
        if end > len(data):
            raise ValueError(f"zip entry {entry.filename!r:.80} ends outside the file")
        parts = entry.filename.replace("\\", "/").split("/")
        if not parts[0] or ":" in parts[0] or ".." in parts:
            raise ValueError(f"zip entry {entry.filename!r:.80} is named as if outside its archive")
    members = {entry.filename: entry for entry in entries}
    if len(members) < len(entries):
        raise ValueError("two zip entries have the same name")
    return members


def data_start(entry, data):
    """Where a zip entry's own bytes begin: behind its local header, its name and its extra field."""
    header = data[entry.header_offset : entry.header_offset + 30]
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise ValueError(f"zip entry {entry.filename!r:.80} has no header where it should begin")
    if entry.flag_bits & 1:
        raise ValueError(f"zip entry {entry.filename!r:.80} is encrypted")
    name, extra = struct.unpack("<HH", header[26:])
    return entry.header_offset + 30 + name + extra


def stored_bytes(members, name, data):
    """(start, length) of an uncompressed zip entry in data."""
    entry = members.get(name)
    if entry is None:
        raise ValueError(f"the archive has no entry {name!r:.80}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"zip entry {name!r:.80} is compressed, as PyTorch never writes it")
    return data_start(entry, data), entry.file_size
