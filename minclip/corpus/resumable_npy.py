"""A .npy file that is written row by row, and resumed after an interruption.

Three files lie side by side while the rows of features.npy are computed:

    features.npy.partial   the header of the .npy, and the rows so far
    features.npy.journal   line 1: the job as JSON, that is input, model, dtype, shape and options;
                           each later line: how many rows are on the disk
    features.npy           only once every row is there

A row is counted only after it reached the disk. So a process that is killed, at any moment, loses at
most the chunk it was computing. The next run reads the journal, refuses another job, cuts the partial
file after its last counted row, and goes on from there.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class ResumableNpy:
    """An array on the disk whose first `done` rows are finished.

    output   path of the .npy
    job      a JSON object of everything that the rows depend on. A later run with the same output must
             have the same job. "dtype" and "shape" are those of the array

    Raises ValueError where output was begun with another job, OSError where another process writes it,
    where the disk has too little room, or where a file cannot be written.
    """

    def __init__(self, output: str | os.PathLike[str], job: Mapping[str, Any]):
        self.output, self.partial = Path(output), Path(f"{output}.partial")
        self.journal_path = Path(f"{output}.journal")
        self.job, self.total = job, job["shape"][0]
        self.row_bytes = math.prod(job["shape"][1:]) * np.dtype(job["dtype"]).itemsize
        self.header = header_bytes(job["dtype"], job["shape"])
        self.done = 0
        self.rows: BinaryIO | None = None
        if not self.journal_path.exists():
            self.check_room()
        self.journal = self.opened(self.journal_path)
        try:
            self.lock()
            self.resume()
        except BaseException:
            self.close()
            raise

    def opened(self, path: Path) -> BinaryIO:
        """Open one of the two files; an OSError names the output."""
        try:
            return open(path, "a+b", buffering=0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.output)) from None

    def lock(self) -> None:
        """Keep a second run of the same command from writing between these rows, until `close`."""
        try:
            if fcntl is not None:
                fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{self.output} is being written by another process") from None

    def resume(self) -> None:
        """Open the partial file, cut it after its last finished row, and set `done`."""
        lines = self.read_journal()
        if lines:
            self.check_same(json.loads(lines[0]))
        counted = int(lines[-1]) if len(lines) > 1 else 0
        if counted == self.total and lines and self.output.exists() and not self.partial.exists():
            self.done = counted  # the process was stopped between the last two steps of finish
            return
        self.rows = self.opened(self.partial)
        on_disk = (self.partial.stat().st_size - len(self.header)) // self.row_bytes
        self.done = max(0, min(counted, on_disk))
        self.check_room()
        self.rows.truncate(len(self.header) + self.done * self.row_bytes if self.done else 0)
        if not self.done:
            self.write(self.rows, self.header)
        if not lines:
            self.write(self.journal, json.dumps(self.job).encode() + b"\n")

    def read_journal(self) -> list[bytes]:
        """Return the complete lines of the journal, and cut off an incomplete last line."""
        self.journal.seek(0)
        *lines, torn = self.journal.read().split(b"\n")
        self.journal.truncate(self.journal.tell() - len(torn))
        return lines

    def check_same(self, begun: Mapping[str, Any]) -> None:
        """Raise ValueError where the journal's job is another one."""
        changed = [name for name in {**self.job, **begun} if begun.get(name) != self.job.get(name)]
        if changed:
            raise ValueError(
                f"{self.output} was begun with another {', '.join(changed)}: give the same again, "
                f"or delete {self.partial.name} and {self.journal_path.name} to start over"
            )

    def check_room(self) -> None:
        """Raise OSError where the disk is too small for the missing rows: better now than when it is full."""
        needed = len(self.header) + (self.total - self.done) * self.row_bytes
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            raise OSError(
                f"{self.output} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free"
            )

    def append(self, rows: np.ndarray) -> None:
        """Add rows [n, ...], and count them once they are on the disk."""
        assert self.rows is not None
        self.write(self.rows, np.ascontiguousarray(rows))
        os.fsync(self.rows.fileno())
        self.done += len(rows)
        self.write(self.journal, b"%d\n" % self.done)
        os.fsync(self.journal.fileno())

    def write(self, file: BinaryIO, data: Any) -> None:
        """Write all of data; an OSError says how many rows are safe."""
        view = memoryview(data).cast("B")
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise OSError(
                f"{self.output}: {error.strerror}; {self.done:,} of {self.total:,} rows are kept; "
                "run the same command again to resume"
            ) from None

    def finish(self) -> None:
        """Rename the partial file to the output, delete the journal; raise ValueError if rows are missing."""
        if self.done != self.total:
            raise ValueError(f"{self.done} of {self.total} rows were written")
        if self.rows is not None:
            self.rows.close()
            os.replace(self.partial, self.output)
        self.close()
        self.journal_path.unlink()

    def close(self) -> None:
        """Close both files, which ends the lock."""
        for file in (self.rows, self.journal):
            if file is not None:
                file.close()


def header_bytes(dtype: str, shape: list[int]) -> bytes:
    """Return the bytes of a .npy file before its first row."""
    header = io.BytesIO()
    described = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()
