"""The reference's tensors as other frameworks store them: their axes, and every order of them in memory.

Axes, one letter each:  v vocabulary   l context   h heads   k head width   i in   o out   p packed q, k, v
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.params import BLOCK, TEXT_TOWER, architecture

SAMPLED = 2048  # numbers of a tensor by which it is recognized; a shorter tensor is compared in full
PACKED = 3, 2  # q, k and v in one array; or k and v


@dataclasses.dataclass(frozen=True)
class Unit:
    """A tensor of the reference that a port may store by itself: a parameter, or its q, k or v rows."""

    name: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.part} of {self.name}" if self.part else self.name

    @property
    def layer(self) -> int | None:
        """Return the number of the block, or None outside the blocks."""
        return int(self.name.split(".")[2]) if self.name.startswith(BLOCK) else None

    @property
    def role(self) -> tuple[str, str]:
        """Return the name without its block, and the part: the same for every layer."""
        return (self.name if self.layer is None else self.name.split(".", 3)[3]), self.part


class Kind:
    """Units with the same axes and sizes.

    axes      letter -> size, in the reference's order
    arrays    unit -> its array, shaped as axes says
    layouts   every order of the axes in memory
    samples   [units, n], some numbers of each unit, in float64
    """

    def __init__(self, axes: dict[str, int]):
        self.axes = axes
        self.size = math.prod(axes.values())
        self.arrays: dict[Unit, np.ndarray] = {}
        self.layouts = list(itertools.permutations(axes))
        few = self.size <= SAMPLED
        places = np.arange(self.size) if few else np.random.default_rng(0).integers(self.size, size=SAMPLED)
        self.places = dict(zip(axes, np.unravel_index(places, tuple(axes.values())), strict=True))
        self.samples = np.empty((0, len(places)))

    def finish(self) -> None:
        """Take the samples, once all units are there."""
        index = tuple(self.places.values())
        self.samples = np.array([array[index] for array in self.arrays.values()], np.float64)

    def packed(self, count: int) -> "list[tuple[str, ...]]":
        """Return the layouts of count units in one array, with the axis p."""
        return list(itertools.permutations(("p", *self.axes))) if count > 1 else self.layouts

    def sample(self, flat: np.ndarray, layout: tuple[str, ...], count: int = 1) -> np.ndarray:
        """Return [count, n], the numbers of a flat array at the sampled places, if it has this layout."""
        sizes = self.axes | {"p": count}
        places = self.places | {"p": np.arange(count)[:, None]}
        index = np.ravel_multi_index(
            np.broadcast_arrays(*(places[axis] for axis in layout)), [sizes[axis] for axis in layout]
        )
        return np.asarray(flat[index], np.float64).reshape(count, -1)

    def view(self, array: np.ndarray, layout: tuple[str, ...], slot: int = 0, count: int = 1) -> np.ndarray:
        """Return one unit of an array of this layout, with its axes in the reference's order."""
        sizes = self.axes | {"p": count}
        array = array.reshape([sizes[axis] for axis in layout])
        if "p" in layout:
            array = array.take(slot, axis=layout.index("p"))
            layout = tuple(axis for axis in layout if axis != "p")
        return array.transpose([layout.index(axis) for axis in self.axes])


def kinds_of(params: Mapping[str, Any]) -> list[Kind]:
    """Return every unit of the reference, grouped by axes."""
    _, heads, _ = architecture(params)
    kinds: dict[tuple[tuple[str, int], ...], Kind] = {}
    for name, array in params.items():
        if not name.startswith(TEXT_TOWER):
            continue
        for unit, axes, part in units_of(name, as_array(array), heads):
            kind = kinds.setdefault(tuple(axes.items()), Kind(axes))
            kind.arrays[unit] = part.reshape(tuple(axes.values()))
    for kind in kinds.values():
        kind.finish()
    return list(kinds.values())


def units_of(name: str, array: np.ndarray, heads: int) -> list[tuple[Unit, dict[str, int], np.ndarray]]:
    """Return the units of one parameter: (unit, axes, array)."""
    if "attn.in_proj" in name:
        D = len(array) // 3
        axes = {"h": heads, "k": D // heads} | ({"i": D} if array.ndim == 2 else {})
        return [(Unit(name, part), axes, array[j * D : (j + 1) * D]) for j, part in enumerate("qkv")]
    if name.endswith("attn.out_proj.weight"):
        D = len(array)
        return [(Unit(name), {"o": D, "h": heads, "k": D // heads}, array)]
    letters = {"token_embedding.weight": "vi", "positional_embedding": "li", "text_projection": "io"}
    axes = dict(zip(letters.get(name, "oi"), array.shape, strict=False))
    return [(Unit(name), axes, array)]


def fits_shape(layout: tuple[str, ...], sizes: Mapping[str, int], shape: tuple[int, ...]) -> bool:
    """Tell whether an array of this shape can have this layout: each of its axes is a run of the layout's.

    Axes of size 1 do not count. Inside a run, the head goes before the position inside the head.
    """
    rest = list(layout)
    for n in [n for n in shape if n != 1]:
        run: list[str] = []
        while rest and math.prod(sizes[axis] for axis in run) < n:
            run.append(rest.pop(0))
        if math.prod(sizes[axis] for axis in run) != n or "k" in run[: run.index("h") if "h" in run else 0]:
            return False
    return True


def orientation(layout: tuple[str, ...], kind: Kind) -> str | None:
    """Return "[out, in]" or "[in, out]" of a linear layer's matrix, or None."""
    axes = kind.axes.keys()
    if axes & {"v", "l"} or not (axes >= {"i"} or axes >= {"o", "h"}):
        return None
    outs = "o" if "o" in axes else "hk"
    out = [axis in outs for axis in layout if axis != "p"]
    if out == sorted(out, reverse=True):
        return "[out, in]"
    return "[in, out]" if out == sorted(out) else None
