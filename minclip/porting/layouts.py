"""How a stage may lie in another implementation's memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

# Letters are axes, brackets merge them. P is the 3 of q, k, v packed. A layout with more axes than the stage
# repeats the stage along them. Julia lists axes in reverse.
LAYOUTS = {
    "B L D": ("B L D", "L B D", "(B L) D", "(L B) D", "B D L", "D L B", "D B L", "D (B L)", "D (L B)"),
    "B H L K": (
        *("B H L K", "B L (H K)", "L B (H K)", "(B H) L K", "B L H K", "L B H K", "H B L K"),
        *("(B L) (H K)", "(L B) (H K)", "B H K L", "(H K) L B", "K L H B", "K H L B", "K L (B H)"),
    ),
    "B H L M": ("B H L M", "(B H) L M", "H B L M", "B L H M", "M L H B", "M L (B H)"),
    "P B H L K": (
        *("B L (P H K)", "L B (P H K)", "P B H L K", "P B L (H K)", "P L B (H K)", "B L P H K"),
        *("B L P (H K)", "B L (H P K)", "B L H P K", "(B L) (P H K)", "(L B) (P H K)", "(P H K) L B"),
    ),
    "L D": ("L D", "D L", "B L D", "L B D", "D L B"),
    "B D": ("B D", "D B"),
    "B E": ("B E", "E B"),
}


class Match(NamedTuple):
    """A port's array as a stage.

    array, name, layout   the array in minclip's layout, the port's name for it, and its layout there
    rivals                other layouts of the same shape
    by_value              whether the numbers are those of the stage
    """

    array: Any
    name: str
    layout: str
    rivals: list[str]
    by_value: bool = False


class Reading(NamedTuple):
    """One way to read an array: its layout, its number of positions, and the array in minclip's layout."""

    layout: str
    length: int
    array: Any


def readings(array: Any, goal: str, sizes: Mapping[str, int]) -> list[Reading]:
    """Return the ways to read an array as a stage of axes `goal`, with as many positions as possible.

    There may be fewer positions than in sizes, for a port that leaves the last ones out.
    """
    for length in possible_lengths(array.shape, goal, sizes):
        here = {**sizes, "L": length, "M": length}
        found = [
            Reading(layout, length, read)
            for layout in LAYOUTS.get(goal, (goal,))
            if has_layout(array.shape, layout, here)
            and (read := arrange(array, layout, goal, here)) is not None
        ]
        if found:
            return found
    return []


def possible_lengths(shape: tuple[int, ...], goal: str, sizes: Mapping[str, int]) -> list[int]:
    """Return the numbers of positions that an array of this shape may have, the largest first."""
    letters, size = goal.split(), math.prod(shape)
    others = math.prod({"P": 3, **sizes}[axis] for axis in letters if axis not in "LM")
    if "L" not in letters:
        return [1]
    lengths = set()
    for repeats in {1, sizes["B"]}:  # a layout may repeat the stage along the batch
        n, rest = divmod(size, others * repeats)
        n = math.isqrt(n) if "M" in letters else n
        if not rest and 1 <= n <= sizes["L"]:
            lengths.add(n)
    return sorted(lengths, reverse=True)


def has_layout(shape: tuple[int, ...], layout: str, sizes: Mapping[str, int]) -> bool:
    """Tell whether shape is that of layout, axes of size 1 left out or put in anywhere."""
    return [n for n in shape if n != 1] == [n for n in merged_shape(layout, sizes) if n != 1]


def merged_shape(layout: str, sizes: Mapping[str, int]) -> list[int]:
    """Return the shape of a layout."""
    return [math.prod(sizes[axis] for axis in group) for group in groups(layout)]


def arrange(array: Any, layout: str, goal: str, sizes: Mapping[str, int]) -> Any:
    """Return an array of a layout with its axes split and in the goal's order.

    Returns None where the layout repeats the stage along an axis and the array does not.
    """
    array = array.reshape(merged_shape(layout, sizes))
    flat = [axis for group in groups(layout) for axis in group]
    extra = [axis for axis in flat if axis not in goal.split()]
    full = " ".join([*extra, *goal.split()])
    read = rearrange(array, f"{layout} -> {full}", **{axis: sizes[axis] for axis in flat})
    for _ in extra:
        if not same(read, np.broadcast_to(read[:1], read.shape)):
            return None
        read = read[0]
    return read


def groups(layout: str) -> list[list[str]]:
    """Return [["B"], ["H", "K"]] for "B (H K)"."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", layout)]


def crop(letters: str, array: Any, length: int | None) -> Any:
    """Return array with no more than length positions, as queries and as keys."""
    return array[tuple(slice(length if axis in "LM" else None) for axis in letters.split())]


def same(a: Any, b: Any) -> bool:
    """Tell whether two arrays are equal, NaN included."""
    return bool(np.array_equal(a, b, equal_nan=True))


def reversed_axes(array: Any) -> Iterator[Any]:
    """Return the array with its shape read in reverse, as ggml lists it: the fastest axis first."""
    if array.ndim > 1 and array.shape != array.shape[::-1]:
        yield array.reshape(array.shape[::-1])
