"""Tensors in files: mapped numbers, safetensors, and how to write a file completely or not at all.

To read, a file is mapped: names, shapes and dtypes come from its header. A tensor's numbers are read
only when somebody asks for them, so the image tower beside a text tower costs nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

# Bytes of each float that a file can hold. NumPy lacks bfloat16 and float8: they become float32.
FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}

# The dtype names of safetensors in NumPy's and torch's words. Any other dtype keeps its name and is refused.
DTYPES = {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
DTYPES |= {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "BOOL": "bool"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

FEW = 2**16  # numbers that are checked at a time, few enough for a processor's cache


class Stored:
    """A tensor in a file. Its shape and dtype are known; `np.asarray(stored)` reads its numbers.

    dtype    a name, such as "float16", "float8_e4m3fn" or GGUF's "Q8_0"
    nbytes   the size of the numbers in the file
    floats   whether the numbers are floats once they are read
    finite   True once the numbers are read and known to be finite, as a by-product of another check
    storage  the storage that a tensor of PyTorch is a view of
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: str,
        read: Callable[[], npt.NDArray[Any]],
        nbytes: int,
        *,
        floats: bool | None = None,
        storage: Any = None,
    ):
        self.shape, self.dtype, self.read, self.nbytes = tuple(shape), dtype, read, nbytes
        self.floats = dtype in FLOATS if floats is None else floats
        self.finite: bool | None = None
        self.storage = storage

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.read()


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """Map a file. Nothing is read yet, and writing to the mapped bytes never changes the file."""
    with open(path, "rb") as file:
        if not file.seek(0, io.SEEK_END):
            raise ValueError("the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def numbers(data: Any, dtype: str, start: int, count: int) -> npt.NDArray[Any]:
    """Return count numbers of the bytes data from start on, as a flat array: a view where possible."""
    if dtype == "bfloat16":  # the upper half of a float32
        upper = np.frombuffer(data, np.uint16, count, start)
        return (upper.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith("float8"):
        return float8_values(dtype)[np.frombuffer(data, np.uint8, count, start)]
    array = np.frombuffer(data, dtype, count, start)
    return array if array.flags.aligned else array.copy()


@functools.cache
def float8_values(dtype: str) -> npt.NDArray[np.float32]:
    """Return the values of the 256 codes of a float8 format, from arXiv 2209.05433."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (codes << 8).view(np.float16).astype(np.float32)
    # E4M3FN: one sign bit, 4 exponent bits with bias 7, 3 mantissa bits; no infinity; 0x7F and 0xFF are NaN.
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    values = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def all_finite(array: np.ndarray) -> bool:
    """Tell whether no number of an array is NaN or infinite."""
    if array.dtype == np.float16:  # NumPy is slow at float16; such a number has all bits of the exponent set
        return all((chunk & 0x7C00).max() < 0x7C00 for chunk in chunks(array.view(np.uint16)))
    return all(bool(np.isfinite(chunk).all()) for chunk in chunks(array))


def chunks(array: np.ndarray) -> Any:
    """Give the numbers of an array in flat chunks. The array is copied only where it is not contiguous."""
    flat = array.reshape(-1)
    return (flat[start : start + FEW] for start in range(0, flat.size, FEW))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return (tensors by name, metadata) of a safetensors file, whose header the library checks first."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"not a complete safetensors file: {error}") from None
    data = map_file(path)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start], object_pairs_hook=without_duplicates)
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        first, last = about["data_offsets"]
        dtype = DTYPES.get(about["dtype"], about["dtype"])
        tensors[name] = in_a_row(data, dtype, about["shape"], start + first, last - first)
    return tensors, metadata


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object. Raises ValueError where it has a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header of the safetensors file names a tensor twice")
    return found


def in_a_row(data: Any, dtype: str, shape: Sequence[int], start: int, nbytes: int) -> Stored:
    """Return a tensor whose numbers lie one after the other in data."""
    return Stored(shape, dtype, lambda: numbers(data, dtype, start, math.prod(shape)).reshape(shape), nbytes)


@contextlib.contextmanager
def only_when_complete(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to. The file gets its own name when the block ends, and is removed if it fails.

    An OSError of the block names path. Where path is a link, the file that it leads to is replaced. A device
    or a pipe is never replaced: OSError.
    """
    check_replaceable(path)
    place = os.path.realpath(path)
    partial = Path(f"{place}.{os.getpid()}.partial")
    try:
        partial.touch()  # a missing or forbidden folder is an OSError here, with any writer
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # the safetensors library writes a file that only its owner may read
        os.replace(partial, place)
    except OSError as error:
        if str(error.filename) == str(partial) or error.errno == errno.ENOSPC:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    finally:
        with contextlib.suppress(OSError):  # the file was never there, say in a path that is no folder
            partial.unlink()


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise OSError where path is a device or a pipe, such as /dev/null: a file must not take its place."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(f"{os.fspath(path)} is a device or a pipe: give the name of a file")
