"""Read a port's rows of ids: whether they have start, end and padding, and how ids are numbered."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minclip.porting.tokens.faults import CATALOGUE, TokenFault
from minclip.porting.tokens.port import CONTEXT, REFERENCE, TokenizerPort

PARSED = 0.5  # the share of rows that must have a frame's start, end and padding
FRAMES = 8  # readings kept, at most
LARGEST = 2**31  # ids are int32 in every known port

OTHER_PAD = TokenFault(
    "D1-other",
    "padded with the id {pad}",
    "open_clip#453; transformers#24925",
    "pad with 0 as OpenAI does. The features are the same; hidden states after the end differ",
    {},
)


def read_rows(texts: Any, ids: Any) -> tuple[list[str], list[list[int] | None]]:
    """Return texts as a list, and ids as one list of ints per text, or None where the port gave none.

    Raises ValueError or TypeError, with the place, for anything else.
    """
    if isinstance(texts, str):
        texts, ids = [texts], [ids] if is_flat(ids) else ids
    if ids is None:
        raise TypeError("ids must be a list with the ids of each text, not None")
    texts, ids = list(texts), list(ids)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} must be a str, not {type(text).__name__}")
    if not texts or len(ids) != len(texts):
        raise ValueError(f"rows of ids: {len(ids)}, texts: {len(texts)}; give one row for each text")
    return texts, [None if row is None else read_row(row, i) for i, row in enumerate(ids)]


def is_flat(ids):
    """Return whether ids is one row: a sequence of numbers."""
    return np.ndim(ids[0] if len(ids) else 0) == 0 and not (len(ids) and ids[0] is None)


def read_row(row, i):
    row = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise ValueError(f"row {i} of ids must be a list of integers, not {type(row).__name__}")
    for id in row:
        if isinstance(id, bool) or not isinstance(id, int | float | np.number) or id != id // 1:
            raise ValueError(f"row {i} of ids holds {id!r}: ids are integers")
        if not -LARGEST <= id < LARGEST:
            raise ValueError(f"row {i} of ids holds {int(id)}, which is no 32-bit id")
    return [int(id) for id in row]


@dataclasses.dataclass(frozen=True)
class Frame:
    """How rows are made around the ids of a text: the faults that differ from OpenAI's way, if any."""

    faults: tuple[TokenFault, ...]

    @functools.cached_property
    def port(self) -> TokenizerPort:
        """The reference with the frame's faults put in."""
        return TokenizerPort(self.faults)

    def fits(self, row: list[int]) -> bool:
        """Return whether a row begins with the start ids and ends with the end ids and padding."""
        row, start, end = self.port.unpadded(row), self.port.around("start"), self.port.around("end")
        return len(row) >= len(start) + len(end) and starts(row, start) and starts(row[::-1], end[::-1])

    def specificity(self) -> int:
        """Return the number of ids that the frame puts around a text."""
        return len(self.port.steps["start"]) + len(self.port.steps["end"])


def starts(row, ids):
    return row[: len(ids)] == ids


def read_frames(rows: list[list[int]], pad: int) -> list[Frame]:
    """Return the ways to read rows, likeliest first: OpenAI's, and those that fit most rows.

    pad   the id that rows are expected to be padded with
    """
    expected = () if pad == REFERENCE["pad"] else (pad_fault(pad),)
    frames = []
    for ends, shift, side in itertools.product(ends_faults(), shift_faults(), side_faults()):
        faults = tuple(fault for fault in (ends, shift, side) if fault)
        if overlapping(faults):
            continue
        for padding in paddings(rows, pad):
            frame = Frame((*faults, *padding))
            if sum(map(frame.fits, rows)) >= PARSED * len(rows):
                frames.append(frame)
    frames.sort(key=lambda frame: len(frame.faults) - frame.specificity())
    return list(dict.fromkeys([Frame(expected), *frames]))[:FRAMES]


def overlapping(faults: Iterable[TokenFault]) -> bool:
    """Return whether two faults change the same step."""
    names = [name for fault in faults for name in fault.change]
    return len(names) > len(set(names))


def ends_faults():
    found = (f for f in CATALOGUE if f.change.keys() & {"start", "end"} and "wrap" not in f.change)
    return [None, *found]


def shift_faults():
    return [None, *(fault for fault in CATALOGUE if "shift" in fault.change)]


def side_faults():
    return [None, *(fault for fault in CATALOGUE if "side" in fault.change)]


def paddings(rows, pad):
    """Return the faults of padding that rows may show, each as a tuple: none, and the ids that repeat."""
    ends = collections.Counter(row[-1] for row in rows if len(row) > 1 and row[-1] == row[-2])
    heads = collections.Counter(row[0] for row in rows if len(row) > 1 and row[0] == row[1])
    inner = collections.Counter(row[-2] for row in rows if len(row) > 2 and row[-2] == row[-3])
    common = [id for counter in (ends, heads, inner) for id, _ in counter.most_common(1)]
    return [(), *((pad_fault(id),) for id in dict.fromkeys([pad, *common]) if id != REFERENCE["pad"])]


def pad_fault(id: int) -> TokenFault:
    """Return the fault of padding with an id."""
    known = (f for f in CATALOGUE if f.change == {"pad": id})
    summary = OTHER_PAD.summary.format(pad=id)
    return next(known, dataclasses.replace(OTHER_PAD, summary=summary, change={"pad": id}))


def row_limit(rows: list[list[int]]) -> int:
    """Return the length that texts are cut to: the context, or the length of all rows where it is less."""
    lengths = {len(row) for row in rows}
    return min(CONTEXT, *lengths) if len(lengths) == 1 and len(rows) > 1 else CONTEXT
