"""The texts of a file, one per line: read, and checked before the first is encoded."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minclip import tokenizer
from minclip.checkpoint.tensor_files import check_replaceable
from minclip.corpus.progress import reporting

LONGEST_LINE = 2**18  # bytes
BLOCK = 2**18  # bytes read at once
REPORTED = 8192  # lines checked between two reports of progress


@contextlib.contextmanager
def readable_twice(
    source: str | os.PathLike[str] | BinaryIO, output: str | os.PathLike[str]
) -> Iterator[BinaryIO]:
    """Yield source as a binary file that can seek: source itself, or a copy in the folder of output.

    Raises OSError where source cannot be opened, or where no file can be written at output.
    """
    check_replaceable(output)
    folder = Path(output).parent
    if not folder.is_dir() or Path(output).is_dir():
        raise OSError(f"{output}: {'is a folder' if Path(output).is_dir() else 'its folder does not exist'}")
    with contextlib.ExitStack() as stack:
        if isinstance(source, str | os.PathLike):
            source = stack.enter_context(open(source, "rb"))
        elif isinstance(source, io.TextIOBase):
            raise TypeError("source must be a path or an open binary file: open it with mode 'rb'")
        elif isinstance(source, io.BytesIO) or not hasattr(source, "seekable"):
            kind = type(source).__name__
            raise TypeError(
                f"source must be a path or an open binary file, not {kind}: encode_stream takes texts"
            )
        file: Any = source
        if not file.seekable():
            import tempfile  # here, because it takes time to import

            try:
                copy = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # it leaves no trace
                shutil.copyfileobj(file, copy)
            except OSError as error:
                raise OSError(f"{output}: no copy of {name_of(file)} beside it: {error.strerror}") from None
            copy.seek(0)
            file = copy
        yield file


def file_stamp(file: BinaryIO) -> tuple[int, int]:
    """Return the size of an open file and the time of its last change: they change when it is written to."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def name_of(file: BinaryIO) -> str:
    """Return the path of an open file, for an error message."""
    return file.name if isinstance(file.name, str) and file.name != "<stdin>" else "standard input"


def check_lines(file: BinaryIO, context: int, truncate: bool, progress: bool) -> tuple[int, str]:
    """Return the number and the SHA-256 of the remaining lines of file, and seek back.

    Raises ValueError, with the line's number, where a line is not UTF-8, or has more than `context` tokens
    and truncate is False.
    """
    start = place = file.tell()
    count = 0
    with reporting(progress, file_stamp(file)[0] - start, 0, "B") as advance:
        for count, text in enumerate(read_texts(file), 1):
            if not truncate and not surely_fits(text, context):
                check_length(text, context, f"{name_of(file)}, line {count}")
            if count % REPORTED == 0:
                advance(file.tell() - place)
                place = file.tell()
    file.seek(start)
    import hashlib  # here, because it takes time to import

    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(start)
    return count, digest


def check_length(text: str, context: int, where: str) -> None:
    """Raise ValueError where a text has more than `context` tokens."""
    ids = len(tokenizer.encode(text)) + 2
    if ids > context:
        raise ValueError(
            f"{where} is {ids} tokens long, start and end included, but the context holds {context}: "
            "shorten it, or truncate it with truncate=True (--truncate)"
        )


def surely_fits(text: str, context: int) -> bool:
    """Tell whether the letters of a text are so few that it fits, which most are: faster than tokenizing.

    Every token takes a letter at least. Cleaning lengthens no text that is ASCII and has no HTML entity.
    """
    return text.isascii() and "&" not in text and len(text) - text.count(" ") <= context - 2


def read_texts(file: BinaryIO) -> Iterator[str]:
    r"""Yield the lines of a binary file as str, without "\n", "\r\n" or a byte order mark at the start.

    Raises ValueError, with the line's number, where a line is not UTF-8 or longer than 256 KiB.
    """
    for number, line in enumerate(read_lines(file), 1):
        try:
            yield line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{name_of(file)}, line {number}"
            raise ValueError(f"{where}: not UTF-8 at byte {error.start}: save the file as UTF-8") from None


def read_lines(file):
    r"""Yield the lines of a binary file, split at b"\n". Raise ValueError for a line of over 256 KiB."""
    rest, count = b"", 0
    while block := file.read(BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        count += len(lines)
        if len(rest) > LONGEST_LINE:
            where = f"{name_of(file)}, line {count + 1}"
            raise ValueError(f"{where}: longer than {LONGEST_LINE:,} bytes: give one text per line")
    if rest:
        yield rest
