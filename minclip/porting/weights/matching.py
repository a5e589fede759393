"""Recognize a port's arrays as the reference's tensors, by their values."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.porting.quantization import EXACT, FORMATS, Format, float_rounding, format_of
from minclip.porting.weights.layouts import PACKED, Kind, Unit, fits_shape, orientation

CHUNK = 2**20  # numbers compared at a time
NEAR = 0.03  # a vector further from a tensor than this, in relative L2, is another
LIKE = 0.5  # the same for a matrix: coarse quantization leaves more
SHIFTS = range(-3, 4)  # rows by which a table of embeddings may have slipped


@dataclasses.dataclass
class Reading:
    """One way to read an array: as which unit, in which layout.

    error is the relative L2 distance from scale times the unit, on the sampled numbers.
    """

    kind: Kind
    unit: Unit
    layout: tuple[str, ...]
    error: float
    scale: float


@dataclasses.dataclass
class Piece:
    """An array of the port, or one of the units packed in it, and the ways to read it, best first.

    name      the port's own name
    slot      its place among `count` packed units
    index     its place in a stack of layers, or None
    shape     the array's shape, or that of its layer in a stack
    part      a packed unit whose layout is another than that of those beside it
    state     "", or why it was not recognized: "zero", "one", "constant", "not finite"
    """

    name: str
    shape: tuple[int, ...]
    readings: list[Reading]
    slot: int = 0
    count: int = 1
    index: int | None = None
    state: str = ""
    rounding: str | None = ""
    error: float = 0.0
    wrong_rows: tuple[int, ...] = ()
    shift: int = 0
    table: bool = False
    part: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows of a table of embeddings."""
        return self.shape[0] if self.readings[0].layout[-1] == "i" else self.shape[-1]

    @property
    def size(self) -> int:
        """Return how many numbers the piece has; a table of embeddings counts as the reference's."""
        if self.table:
            return self.readings[0].kind.size
        return math.prod(self.shape) // self.count

    @property
    def key(self) -> str:
        """Return a name of its own, for a piece of a packed or stacked array too."""
        slot = f"/slot_{'abc'[self.slot]}" if self.count > 1 else ""
        return self.name + ("" if self.index is None else f"[{self.index}]") + slot

    @property
    def best(self) -> Reading | None:
        """Return the reading that is nearest."""
        return self.readings[0] if self.readings else None

    @property
    def reading(self) -> Reading:
        """Return the reading that is nearest, of a piece that was recognized."""
        return self.readings[0]

    def prefer(self, unit: Unit | None) -> None:
        """Put the reading as unit first, where values cannot tell it from the best."""
        self.readings.sort(key=lambda reading: reading.unit != unit)

    def reads_as(self, unit: Unit) -> bool:
        """Tell whether one of the readings is this unit."""
        return any(reading.unit == unit for reading in self.readings)


def recognize(arrays: Mapping[str, Any], kinds: list[Kind], layers: int) -> Iterator[Piece]:
    """Yield the pieces of each array that may be the text tower's. One array is read at a time."""
    sizes = {kind.size * count for kind in kinds for count in (1, *PACKED)}
    formats = list(reversed(FORMATS))  # coarse ones first: numbers on a coarse grid lie on a fine one too
    for name, value in arrays.items():
        shape = tuple(value.shape)
        size = math.prod(shape)
        if size in sizes or (len(shape) > 1 and size // max(shape[0], 1) in sizes) or is_table(shape, kinds):
            array = to_floats(value)
            for piece in pieces_of(name, array, kinds, layers):
                if piece.readings:
                    measure(piece, array, formats)
                yield piece


def to_floats(value: Any) -> np.ndarray:
    """Return an array, of integers or 8-bit floats too, as floats."""
    array = np.asarray(as_array(value))
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def pieces_of(name: str, array: np.ndarray, kinds: list[Kind], layers: int) -> list[Piece]:
    """Return the pieces of one array: itself, its packed units, its layers, or a table of embeddings."""
    pieces = read_units(name, array, kinds)
    fitting = any(piece.best and shape_fits(piece, piece.best) for piece in pieces)
    if not fitting and array.ndim > 1 and len(array) == layers:
        stack = [read_units(name, layer, kinds) for layer in array]
        if any(map(recognized, stack)):
            for i, layer in enumerate(stack):
                for piece in layer:
                    piece.index = i
            pieces = list(itertools.chain.from_iterable(stack))
    if not recognized(pieces):
        pieces = read_table(name, array, kinds) or pieces
    return pieces


def recognized(pieces: list[Piece]) -> bool:
    return any(piece.readings for piece in pieces)


def read_units(name: str, array: np.ndarray, kinds: list[Kind]) -> list[Piece]:
    """Return the pieces of an array whose size is a unit's, or that of several packed units."""
    flat = np.ascontiguousarray(array).reshape(-1)
    state = state_of(flat)
    options = []
    for kind, count in itertools.product(kinds, (1, *PACKED)):
        packs = count == 1 or all(unit.part for unit in kind.arrays)
        if packs and len(flat) == kind.size * count:
            options += [read_slots(kind, flat, layout, count) for layout in kind.packed(count)]
    if not options:
        return []
    best = min(options, key=lambda slots: sum(error(slot) for slot in slots) / len(slots))
    alike = [slots for slots in options if len(slots) == len(best)]
    pieces = []
    for slot in range(len(best)):
        readings = sorted((r for slots in alike for r in slots[slot]), key=lambda reading: reading.error)
        piece = Piece(name, array.shape, nearest(readings, best[slot]), slot, len(best), state=state)
        pieces.append(piece)
    if len(pieces) > 1 and recognized(pieces):
        for piece in pieces:
            read_alone(piece, flat, next(p.best for p in pieces if p.best), kinds)
    elif not state:
        for piece in pieces:
            piece.state = constant(flat)
    return pieces


def nearest(readings: list[Reading], best: list[Reading]) -> list[Reading]:
    """Return the readings that values cannot tell from the nearest; those of the best layout go first."""
    least = readings[0].error if readings else 0.0
    layouts = {reading.layout for reading in best}
    kept = [reading for reading in readings if reading.error <= 1.5 * least + EXACT]
    return sorted(kept, key=lambda reading: (reading.layout not in layouts, reading.error))


def read_alone(piece: Piece, flat: np.ndarray, other: Reading, kinds: list[Kind]) -> None:
    """Read a packed unit by itself, where it is not recognized in the layout of the others beside it."""
    if piece.readings or piece.state:
        return
    part = other.kind.view(flat, other.layout, piece.slot, piece.count)
    part = as_rows(part, other.kind) if is_matrix(other.kind) else part.reshape(-1)
    (alone,) = read_units(piece.name, np.ascontiguousarray(part), kinds)
    piece.readings, piece.state = alone.readings, alone.state
    piece.part = part if alone.readings else None


def error(readings: list[Reading]) -> float:
    return readings[0].error if readings else 1.0


def state_of(flat: np.ndarray) -> str:
    return "" if np.isfinite(flat).all() else "not finite"


def constant(flat: np.ndarray) -> str:
    """Return "zero", "one" or "constant" where all numbers of an array are one number."""
    if len(flat) and (flat == flat[0]).all():
        return {0.0: "zero", 1.0: "one"}.get(float(flat[0]), "constant")
    return ""


def read_slots(kind: Kind, flat: np.ndarray, layout: tuple[str, ...], count: int) -> list[list[Reading]]:
    """Return the readings of each slot of a flat array as if it had this layout, the nearest first."""
    values = np.nan_to_num(kind.sample(flat, layout, count), posinf=0, neginf=0)
    units = list(kind.arrays)
    limit = LIKE if is_matrix(kind) else NEAR
    sizes = (kind.samples**2).sum(axis=1)  # (units,)
    slots = []
    for row in values:
        dots, size = kind.samples @ row, row @ row
        distance = np.sqrt(np.maximum(size - 2 * dots + sizes, 0) / np.where(sizes > 0, sizes, 1))
        distance[sizes == 0] = 0 if size == 0 else np.inf
        with np.errstate(all="ignore"):
            factors = dots / sizes
            angles = np.sqrt(np.maximum(1 - dots**2 / (size * sizes), 0))
        near = np.flatnonzero(distance <= 1.5 * distance.min() + EXACT)  # equal tensors are all kept
        direct = [Reading(kind, units[n], layout, float(distance[n]), 1.0) for n in near]
        readings = [reading for reading in direct if reading.error <= limit]
        varies = np.ptp(row) > 0
        if not varies:  # ones, say, are near every norm's weight
            readings = [reading for reading in readings if reading.error <= EXACT]
        if (not readings or readings[0].error > 2 * np.nanmin(angles, initial=np.inf) + EXACT) and varies:
            order = np.argsort(np.nan_to_num(angles, nan=np.inf))[:2]
            scaled = [Reading(kind, units[n], layout, float(angles[n]), float(factors[n])) for n in order]
            readings = [reading for reading in scaled if reading.error <= limit] or readings
        slots.append(sorted(readings, key=lambda reading: reading.error))
    return slots


def is_matrix(kind: Kind) -> bool:
    return len(kind.axes.keys() & {"i", "o", "h", "v", "l"}) > 1


def measure(piece: Piece, array: np.ndarray, formats: list[Format]) -> None:
    """Compare a piece of an array with its best reading in full: error, rounding, wrong rows.

    The format that fits goes to the front of formats: the next array will have the same.
    """
    reading, kind = piece.readings[0], piece.readings[0].kind
    reference = as_rows(kind.arrays[reading.unit], kind)
    if piece.table:
        table = array if piece.rows == len(array) else array.T
        first, last = overlap(len(reference), len(table), piece.shift)
        compare_rows(
            piece, table[first + piece.shift : last + piece.shift], reference[first:last], 1.0, formats
        )
        return
    array = array if piece.index is None else array[piece.index]
    slot, count = piece.slot, piece.count
    if piece.part is not None:
        array, slot, count = piece.part, 0, 1
    view = kind.view(np.ascontiguousarray(array), reading.layout, slot, count)
    compare_rows(piece, as_rows(view, kind), reference, reading.scale, formats)


def overlap(rows: int, table: int, shift: int) -> tuple[int, int]:
    """Return the rows [first, last) of the reference that a table of so many rows has, moved by shift."""
    return max(0, -shift), min(rows, table - shift)


def as_rows(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Return a unit as a matrix [out, in], or [rows, width] of a table, or [1, n] of a vector."""
    if not is_matrix(kind):
        return array.reshape(1, -1)
    if tuple(kind.axes) == ("i", "o"):
        return array.T
    lead = 2 if tuple(kind.axes)[:2] == ("h", "k") else 1
    rows = math.prod(array.shape[:lead])
    return array.reshape(rows, -1)


def compare_rows(
    piece: Piece, ours: np.ndarray, reference: np.ndarray, scale: float, formats: list[Format]
) -> None:
    """Set error, rounding and wrong_rows of a piece from its rows and the reference's."""
    step = max(1, CHUNK // max(1, ours.shape[1]))
    starts = range(0, len(ours), step)
    shown = {starts[0], starts[len(starts) // 2], starts[-1]}  # formats are tried on a few chunks only
    apart, size = np.zeros(len(ours)), np.zeros(len(ours))
    roundings = []
    with np.errstate(all="ignore"):
        for first in starts:
            rows = slice(first, first + step)
            a, b = ours[rows], np.asarray(reference[rows], np.float32) * np.float32(scale)
            apart[rows] = ((a.astype(np.float64) - b) ** 2).sum(axis=1)
            size[rows] = (b.astype(np.float64) ** 2).sum(axis=1)
            rounding = float_rounding(a, b)
            if rounding is not None or first in shown:
                roundings.append(rounding if rounding is not None else rounded_to(a, b, formats))
        relative = np.sqrt(apart / np.where(size > 0, size, 1))
        piece.error = float(np.sqrt(apart.sum() / size.sum())) if size.sum() else float(apart.sum() > 0)
    piece.rounding = None if None in roundings else max((r or "" for r in roundings), key=len)
    wrong = np.flatnonzero(~(relative <= 10 * np.median(relative) + EXACT))
    if len(ours) > 1 and len(wrong) <= len(ours) / 4 and piece.error > EXACT:
        piece.wrong_rows = tuple(map(int, wrong))


def rounded_to(matrix: np.ndarray, reference: np.ndarray, formats: list[Format]) -> str | None:
    """Return the format of a matrix in words, or None. A format that fits goes to the front of formats."""
    found = format_of(matrix, reference, formats)
    if found is None and len(matrix) > 1:  # scales and groups may also run along the other axis
        found = format_of(matrix.T, reference.T, formats)
    if found is None:
        return few_levels(matrix) or few_levels(matrix.T)
    formats.insert(0, formats.pop(formats.index(found)))
    return found.summary


def few_levels(matrix: np.ndarray) -> str | None:
    """Return a name for codes of few bits that no known format makes, or None."""
    if matrix.size >= 2048 and len(np.unique(matrix)) <= 256:
        return "codes of 8 bits or fewer"
    rows = matrix[:: max(1, len(matrix) // 16)][:16]
    for group in (32, 64):
        if matrix.shape[1] % group == 0:
            levels = max(len(np.unique(part)) for row in rows for part in row.reshape(-1, group))
            if levels <= 16:
                return "codes of 4 bits or fewer"
    levels = max(len(np.unique(row)) for row in rows)
    return "codes of 8 bits or fewer" if levels <= 256 and matrix.shape[1] > 512 else None


def is_table(shape: tuple[int, ...], kinds: list[Kind]) -> bool:
    """Tell whether an array may be a table of embeddings with more or fewer rows than the reference's."""
    widths = {kind.axes["i"] for kind in kinds if kind.axes.keys() & {"v", "l"}}
    return len(shape) == 2 and bool(widths & set(shape)) and min(shape) > 1


def read_table(name: str, array: np.ndarray, kinds: list[Kind]) -> list[Piece]:
    """Return the piece of a table of embeddings with more, fewer or shifted rows, or nothing."""
    if not is_table(array.shape, kinds):
        return []
    for kind in kinds:
        if not kind.axes.keys() & {"v", "l"}:
            continue
        (unit, reference), rows = next(iter(kind.arrays.items())), next(iter(kind.axes.values()))
        for layout, table in (((*kind.axes,), array), (tuple(kind.axes)[::-1], array.T)):
            if table.shape[1] != kind.axes["i"]:
                continue
            for shift in sorted(SHIFTS, key=abs):  # row n + shift of the port is row n of the reference
                first, last = overlap(rows, len(table), shift)
                if last - first < 2:
                    continue
                n = np.unique(np.linspace(first, last - 1, 64).astype(int))
                a, b = np.float64(table[n + shift]), np.float64(reference[n])
                if np.linalg.norm(a - b) <= NEAR * np.linalg.norm(b):
                    reading = Reading(kind, unit, layout, 0.0, 1.0)
                    return [Piece(name, array.shape, [reading], shift=shift, table=True)]
    return []


def layout_words(piece: Piece, reading: Reading) -> str:
    """Return a layout in words: "[in, out]", "[in, heads, head width]", "q k v packed, [out, in]"."""
    kind = reading.kind
    layout = tuple(axis for axis in reading.layout if axis != "p")
    straight = orientation(reading.layout, kind)
    words = {"v": "vocabulary", "l": "context", "h": "heads", "k": "head width", "i": "in", "o": "out"}
    parts = len([n for n in piece.shape if n != 1]) - ("p" in reading.layout)
    if straight and parts <= 2:
        text = straight
    else:
        text = "[" + ", ".join(words[axis] for axis in layout) + "]"
    if kind.axes.keys() & {"v", "l"}:
        text = "[rows, width]" if layout == tuple(kind.axes) else "[width, rows]"
    elif not is_matrix(kind) and "k" not in layout:
        text = f"[{kind.size}]"
    if "p" in reading.layout:
        place = reading.layout.index("p")
        inside = "" if place == 0 else f", interleaved at axis {place}"
        text = f"{piece.count} packed{inside}, {text}"
    if len([n for n in piece.shape if n != 1]) == 1 and is_matrix(kind):
        text += ", flattened"
    return text


def shape_fits(piece: Piece, reading: Reading) -> bool:
    """Tell whether the array's shape agrees with the order of its numbers."""
    sizes = reading.kind.axes | {"p": piece.count}
    shape = piece.shape if piece.part is None else piece.part.shape
    return piece.table or fits_shape(reading.layout, sizes, shape)
