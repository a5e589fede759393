"""Zip archives, which PyTorch's files and .npz are. The directory is checked before anything is read.

Readers of zip archives disagree about malformed ones, and attacks use the disagreement. This reader accepts
only archives about which all readers agree.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minclip.checkpoint.tensor_files import Stored, all_finite, map_file

MOST_ENTRIES = 100_000  # many times the tensors of any model; this bounds the memory of the directory
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
KNOWN_FLAGS = 0x080E  # compression level, sizes behind the data, names in UTF-8
SIZES_BEHIND = 0x0008
UTF8 = 0x0800
ELSEWHERE = 0xFFFFFFFF  # the size is in the zip64 extra field

CHUNK = 2**18  # bytes that are read at a time; a multiple of every float's size
MOST_UNPACKED = 20  # times the packed size: weights hardly compress, and zip bombs do
NPY_HEADER = 11_000  # bytes; numpy reads no header of more than 10,000
# NumPy's parser raises these, beside ValueError, for the damaged header of an array.
NPY_DAMAGE = (ValueError, SyntaxError, tokenize.TokenError, TypeError, RuntimeError, EOFError, MemoryError)


class Entry(NamedTuple):
    """One entry: where its bytes start in the file, how many they are, and how they are packed."""

    name: str
    start: int
    packed_size: int
    size: int
    crc: int
    deflated: bool


class ZipArchive:
    """The entries of a zip archive by name.

    Every entry lies inside the file and beside the others, under one harmless name, which its local header
    repeats. Raises ValueError for any other archive.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.data = path, map_file(path)
        self.entries = read_directory(path, self.data)
        self._finite: dict[str, bool | None] = {}

    def locate(self, name: str) -> tuple[int, int]:
        """Return (start, size) of the bytes of an uncompressed entry."""
        entry = self.entries.get(name)
        if entry is None:
            raise ValueError(f"the archive has no entry {name!r:.80}")
        if entry.deflated:
            raise ValueError(f"zip entry {name!r:.80} is compressed, as PyTorch never writes it")
        return entry.start, entry.size

    def verify(self, name: str, dtype: str | None = None) -> bool | None:
        """Raise ValueError where an uncompressed entry's bytes do not have its CRC-32.

        A CRC-32 of 0 is not checked: torch writes 0 where it is told to compute none.

        dtype   of the numbers in the entry
        Returns whether all numbers are finite: both checks share one pass over the file, which leaves no page
        of the mapped file in memory. Returns None where the entry was not read or dtype is no float.
        """
        entry = self.entries[name]
        if name not in self._finite and entry.crc:
            crc = 0
            finite: bool | None = dtype in ("float16", "float32", "float64") or None
            for chunk in self._chunks(entry):
                crc = zlib.crc32(chunk, crc)
                finite = finite and all_finite(np.frombuffer(chunk, dtype))
            check_crc(entry, crc)
            self._finite[name] = finite
        return self._finite.get(name)

    def _chunks(self, entry: Entry) -> Iterator[memoryview]:
        """Give the bytes of an uncompressed entry in chunks, which overwrite each other."""
        buffer = memoryview(bytearray(min(CHUNK, entry.size)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            for first in range(0, entry.size, CHUNK):
                chunk = buffer[: min(CHUNK, entry.size - first)]
                if file.readinto(chunk) != len(chunk):
                    raise ValueError(f"zip entry {entry.name!r:.80} is cut off")
                yield chunk

    def read(self, name: str) -> bytes:
        """Return the bytes of an entry, unpacked and checked by their CRC-32."""
        entry = self.entries[name]
        content = self._unpacked(entry, entry.size + 1)
        if len(content) != entry.size:
            raise ValueError(f"zip entry {name!r:.80} does not have the size that the directory says")
        if entry.crc or entry.deflated:
            check_crc(entry, zlib.crc32(content))
        return content

    def head(self, name: str, size: int) -> bytes:
        """Return the first bytes of an entry, at most size of them, unchecked."""
        return self._unpacked(self.entries[name], size)

    def _unpacked(self, entry: Entry, most: int) -> bytes:
        packed = memoryview(self.data)[entry.start : entry.start + entry.packed_size]
        if not entry.deflated:
            return bytes(packed[:most])
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most)
        except zlib.error as error:
            raise ValueError(f"zip entry {entry.name!r:.80} cannot be unpacked: {error}") from None


def check_crc(entry: Entry, crc: int) -> None:
    """Raise ValueError where the CRC-32 of an entry's bytes is not the one that the directory says."""
    if crc != entry.crc:
        raise ValueError(
            f"zip entry {entry.name!r:.80} is damaged (its CRC-32 differs): download or copy the file again"
        )


def read_directory(path: str | os.PathLike[str], data: mmap.mmap) -> dict[str, Entry]:
    """Return the checked entries of the archive by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"not a complete zip archive ({error}): the file may be cut short") from None
    if len(found) > MOST_ENTRIES:
        raise ValueError(f"a zip archive of {len(found)} entries, more than any model needs")
    found.sort(key=lambda info: info.header_offset)
    if found and found[0].header_offset:
        raise ValueError("the zip archive has other bytes before its first entry")
    entries: dict[str, Entry] = {}
    end = 0
    for info in found:
        if info.header_offset < end:
            raise ValueError(f"zip entry {info.filename!r:.80} overlaps the one before it")
        if info.filename in entries:
            raise ValueError(f"two zip entries have the name {info.filename!r:.80}")
        check_name(info.filename)
        entry = read_entry(info, data)
        end = entry.start + entry.packed_size
        if end > len(data):
            raise ValueError(f"zip entry {info.filename!r:.80} ends outside the file")
        entries[info.filename] = entry
    return entries


def check_name(name: str) -> None:
    """Raise ValueError for a name that would lead out of a folder."""
    folders = name.replace("\\", "/").split("/")
    if not folders[0] or ":" in folders[0] or ".." in folders:
        raise ValueError(f"zip entry {name!r:.80} is named as if outside its archive")


def read_entry(info: zipfile.ZipInfo, data: mmap.mmap) -> Entry:
    """Return the entry, once its local header says the same of it as the directory."""
    name = f"zip entry {info.filename!r:.80}"
    header = data[info.header_offset : info.header_offset + LOCAL_HEADER.size]
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise ValueError(f"{name} has no header where it should begin")
    _, _, flags, method, _, _, crc, packed_size, size, name_size, extra_size = LOCAL_HEADER.unpack(header)
    if (flags | info.flag_bits) & 1:
        raise ValueError(f"{name} is encrypted")
    if (flags | info.flag_bits) & ~KNOWN_FLAGS:
        raise ValueError(f"{name} has flags that no model's file needs")
    if method != info.compress_type or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that minclip does not read")
    start = info.header_offset + LOCAL_HEADER.size
    raw_name = info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437")
    if data[start : start + name_size] != raw_name or info.filename != info.orig_filename:
        raise ValueError(f"{name} has another name in its own header")
    left_out = (0, ELSEWHERE) if flags & SIZES_BEHIND else (ELSEWHERE,)
    pairs = {(packed_size, info.compress_size), (size, info.file_size), (crc, info.CRC)}
    if any(local != central and local not in left_out for local, central in pairs):
        raise ValueError(f"{name} has another size or CRC-32 in its own header")
    if method == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError(f"{name} has two sizes, but is not compressed")
    deflated = method == zipfile.ZIP_DEFLATED
    start += name_size + extra_size
    return Entry(info.filename, start, info.compress_size, info.file_size, info.CRC, deflated)


def read_npz(archive: ZipArchive) -> dict[str, Stored]:
    """Return the tensors by name of an .npz file, written by numpy.savez or numpy.savez_compressed."""
    unpacked = sum(entry.size for entry in archive.entries.values())
    packed = sum(entry.packed_size for entry in archive.entries.values())
    if unpacked > MOST_UNPACKED * packed + 2**20:
        raise ValueError(f"a zip bomb: {packed} bytes that would unpack to {unpacked}")
    return {name.removesuffix(".npy"): npy_entry(archive, name) for name in archive.entries}


def npy_entry(archive: ZipArchive, name: str) -> Stored:
    """Return one array of an .npz file: its header now, its numbers when somebody asks for them."""
    head = io.BytesIO(archive.head(name, NPY_HEADER))
    try:
        shape, fortran, dtype = npy_header(head)
    except NPY_DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name!r:.80} is not an array of numpy.save: {reason:.200}") from None
    start, size = head.tell(), archive.entries[name].size
    if dtype.hasobject:
        raise ValueError(f"{name!r:.80} holds Python objects, which would have to be unpickled")
    if min(shape, default=0) < 0 or start + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name!r:.80} does not match its header")

    def read() -> np.ndarray:
        flat = np.frombuffer(archive.read(name), dtype, offset=start)
        return flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))

    return Stored(shape, dtype.name, read, size)


def npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, whether in Fortran's order, dtype) from the head of an .npy file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f".npy version {version}, which no array of floats needs")
