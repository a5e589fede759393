"""GGUF files, as llama.cpp's family of tools writes them: header and plain floats are read here.

Quantized tensors are dequantized by the `gguf` package, an extra. Its reader of headers is not used, since a
hostile count of items makes it run for ever. The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any

import numpy as np

from minclip.checkpoint.tensor_files import Stored, in_a_row, map_file
from minclip.params import in_a_clone

PLAIN = {0: ("float32", 4), 1: ("float16", 2), 28: ("float64", 8), 30: ("bfloat16", 2)}
SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by type id
STRING, ARRAY = 8, 9
MOST_AXES = 8


class Cursor:
    """Reads values one after the other, and raises ValueError at the end of the file."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def scalar(self, form: str) -> Any:
        size = struct.calcsize(form)
        self.skip(size)
        return struct.unpack(form, self.data[self.at - size : self.at])[0]

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("the GGUF file is cut off, or its header is damaged")

    def string(self) -> str:
        size = self.scalar("<Q")
        self.skip(size)
        return self.data[self.at - size : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return a value of a type id. Arrays, such as a vocabulary, are skipped."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item == STRING:
                for _ in range(count):
                    self.skip(self.scalar("<Q"))
            else:
                self.skip(count * struct.calcsize(scalar_form(item)))
            return None
        return self.scalar(scalar_form(kind))


def scalar_form(kind: int) -> str:
    if kind >= len(SCALARS) or not SCALARS[kind]:
        raise ValueError(f"the GGUF header has a value of the unknown type {kind}")
    return SCALARS[kind]


def read_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return (tensors by name, the metadata that are no arrays) of a GGUF file."""
    data = map_file(path)
    cursor = Cursor(data)
    cursor.skip(4)
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}: minclip reads versions 2 and 3, little-endian")
    tensor_count, value_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {}
    for _ in range(value_count):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.scalar("<I"))
    infos = [tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError("the GGUF header has an impossible alignment")
    start = math.ceil(cursor.at / alignment) * alignment
    tensors = {name: gguf_tensor(data, name, shape, kind, start + at) for name, shape, kind, at in infos}
    if len(tensors) < len(infos):
        raise ValueError("the GGUF header names a tensor twice")
    return tensors, metadata


def tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return (name, shape, type id, offset). GGUF lists the axes from the last to the first."""
    name, axes = cursor.string(), cursor.scalar("<I")
    if axes > MOST_AXES:
        raise ValueError("the GGUF header has a tensor with too many axes")
    shape = tuple(cursor.scalar("<Q") for _ in range(axes))[::-1]
    return name, shape, cursor.scalar("<I"), cursor.scalar("<Q")


def gguf_tensor(data: Any, name: str, shape: tuple[int, ...], kind: int, start: int) -> Stored:
    if kind in PLAIN:
        dtype, itemsize = PLAIN[kind]
        nbytes = math.prod(shape) * itemsize
        check_end(data, name, start + nbytes)
        return in_a_row(data, dtype, shape, start, nbytes)
    try:
        from gguf import constants, quants
    except ImportError:
        return Stored(shape, "quantized", lambda: needs_gguf(name), 0, floats=True)
    try:
        quant = constants.GGMLQuantizationType(kind)
        block, size = constants.GGML_QUANT_SIZES[quant]
    except (ValueError, KeyError):
        return Stored(shape, f"GGML type {kind}", lambda: needs_gguf(name), 0)
    nbytes = math.prod(shape) // block * size
    check_end(data, name, start + nbytes)
    if not shape or shape[-1] % block:
        raise ValueError(f"{name!r:.80} of type {quant.name} has rows that are no multiple of {block}")

    def read() -> np.ndarray:
        rows = np.frombuffer(data, np.uint8, nbytes, start).reshape(*shape[:-1], -1)
        try:
            return quants.dequantize(rows, quant)
        except NotImplementedError as error:
            raise ValueError(f"{name!r:.80}: the gguf package cannot read it: {error}") from None

    return Stored(shape, quant.name, read, nbytes, floats=True)


def check_end(data: Any, name: str, end: int) -> None:
    if end > len(data):
        raise ValueError(f"GGUF tensor {name!r:.80} ends outside the file: it may be cut short")


def needs_gguf(name: str) -> np.ndarray:
    raise ValueError(f"{name!r:.80} is quantized: {in_a_clone('gguf')} to read it")
