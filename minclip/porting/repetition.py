"""Output that a port repeats: over the positions, over several images of a text, or along its width.

The first text class of Stable Diffusion normalized the features and repeated them over 77 positions. Such an
output has the shape of hidden states. Each copy is removed here, and one is diagnosed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minclip.porting.catalogue import NO_PROJECTION, REPEATED
from minclip.porting.faults import Fault
from minclip.porting.verdict import Diagnosis, Finding
from minclip.porting.which_states import POOLED

EQUAL = 1e-6  # the largest difference between copies, as a share of the largest number


@dataclasses.dataclass(frozen=True)
class Repetition:
    """A port's output without its copies.

    once        the output with every copy removed
    count       how often each row is there
    positions   whether the copies are a row for every position, where one row for each text is right
    projects    whether the model has a projection
    """

    once: Any
    count: int
    positions: bool
    projects: bool

    def explain(self, diagnosis: Diagnosis) -> Diagnosis:
        """Return the diagnosis of one copy, with the repetition as a further fault."""
        if diagnosis.verdict == "unknown":
            note = f"Every row is there {self.count} times; one copy was diagnosed."
            return dataclasses.replace(diagnosis, notes=[note, *diagnosis.notes])
        if diagnosis.findings:
            findings = [
                dataclasses.replace(f, faults=self.with_repetition(f.faults)) for f in diagnosis.findings
            ]
            return dataclasses.replace(diagnosis, findings=findings)
        told = f"one copy {'agrees' if diagnosis.verdict == 'agrees' else 'has the noise of quantization'}"
        finding = Finding(self.with_repetition(()), diagnosis.error, told)
        return dataclasses.replace(diagnosis, verdict="known", findings=[finding])

    def with_repetition(self, faults: Sequence[Fault]) -> tuple[Fault, ...]:
        """Return faults with the repetition. Pooled states at every position have an entry of their own."""
        kept = tuple(fault for fault in faults if fault is not NO_PROJECTION)
        if self.positions and (len(kept) < len(faults) or not self.projects):
            return (*kept, POOLED)
        return (*faults, dataclasses.replace(REPEATED, summary=REPEATED.summary.format(count=self.count)))


def find_repetition(params: Mapping[str, Any], tokens: Any, output: Any) -> Repetition | None:
    """Return the output [..., E] without its copies, or None where it holds none."""
    texts, L = int(np.prod(tokens.shape[:-1])), tokens.shape[-1]
    D = len(params["ln_final.weight"])
    widths = {texts, D, *params.get("text_projection", np.empty((D, D))).shape}  # logits are [texts, texts]
    for sizes in ({texts * width for width in widths}, {texts * L * D}):
        if output.size <= min(sizes) or output.size in sizes or is_constant(output.reshape(-1), 0):
            continue
        if (once := reduce(output, sizes, sorted({1, *widths}))) is not None:
            count = output.size // once.size
            return Repetition(once, count, count == L, "text_projection" in params)
    return None


def reduce(array: Any, sizes: set[int], units: Sequence[int]) -> Any:
    """Return an array of one of these sizes, with every copy removed; None where copies are not all."""
    for smaller in without_one_repetition(array, units):
        if smaller.size in sizes:
            return smaller.reshape([n for n in smaller.shape if n > 1])
        if smaller.size > min(sizes) and (found := reduce(smaller, sizes, units)) is not None:
            return found
    return None


def without_one_repetition(array: Any, units: Sequence[int]) -> Iterator[Any]:
    """Yield the first copy of an array whose axis is a number of copies of a part, one of units long.

    The copies follow one another, or each number of the part is repeated.
    """
    for axis, length in enumerate(array.shape):
        for unit in units:
            if length <= unit or length % unit:
                continue
            copies = length // unit
            for split, at in (((copies, unit), axis), ((unit, copies), axis + 1)):
                parts = array.reshape(*array.shape[:axis], *split, *array.shape[axis + 1 :])
                if is_constant(np.take(parts, [0, 1], at), at) and is_constant(parts, at):
                    first = np.take(parts, 0, at)
                    yield first.reshape(*array.shape[:axis], unit, *array.shape[axis + 1 :])


def is_constant(array: Any, axis: int) -> bool:
    """Tell whether an array is the same all along an axis."""
    largest = float(np.abs(array).max(initial=0))
    return bool(np.ptp(array, axis=axis).max(initial=0) <= EQUAL * largest)
