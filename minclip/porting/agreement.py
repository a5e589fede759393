"""Whether a port's features agree with the reference, to the rounding of the precision found or given.

This is the one decision that `compare` and `diagnose` share. At a coarse precision rounding can hide a bug.
The port's error is therefore projected on the change that each fault makes: a coefficient near 1, with a
small uncertainty, shows the fault; one near 0 excludes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from minclip.porting.faults import Fault
from minclip.porting.rounding import UNIT, relative_l2
from minclip.porting.search import Judgment, Search, exclusive, pair_misfits

SURE = 6  # standard deviations of the coefficient that show a fault
POSSIBLE = 3  # standard deviations from 1 that do not exclude one
TEXTS = 4  # short texts that errors are projected on
RESEMBLING = 0.3  # the cosine between two errors of the same rounded weights, at least
EXPLAINED = 0.6  # the share of the error that two faults must explain to be searched for


@dataclasses.dataclass(frozen=True)
class Projection:
    """The port's error projected on the change that a fault makes.

    coefficient, uncertainty   how much of the fault's change is in the error, and its standard deviation
    effect                     the relative L2 change that the fault makes
    left                       the share of the error that is left without the fault's change
    """

    fault: Fault
    coefficient: float
    uncertainty: float
    effect: float
    left: float

    @property
    def is_seen(self) -> bool:
        """Whether the port shows the fault."""
        certain = abs(self.coefficient) > SURE * self.uncertainty and abs(self.coefficient - 1) < 0.3
        return certain and self.left < 0.85

    @property
    def is_possible(self) -> bool:
        """Whether the fault can be neither seen nor excluded."""
        return not self.is_seen and abs(self.coefficient - 1) <= POSSIBLE * self.uncertainty


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A precision whose rounding explains the port's error.

    judgment    the error on all texts beside what rounding does
    seen        faults that the error shows in spite of the rounding
    hidden      faults too small to see at this precision
    """

    precision: str
    judgment: Judgment
    seen: tuple[Projection, ...] = ()
    hidden: tuple[Fault, ...] = ()

    @property
    def shows_a_fault(self) -> bool:
        """Whether a fault is seen through coarse rounding. In float32 a fit at the edge is only noted."""
        return bool(self.seen) and UNIT[self.precision] > UNIT["float32"]


def agree(search: Search) -> Agreement | None:
    """Return the finest precision whose rounding explains the port's error, or None.

    An error that a bug explains to a finer precision is a bug, not rounding: then the result is None.
    """
    finest = search.target.precisions[0]
    for precision in search.target.precisions:
        if search.judge((), "", precision).fits:
            if precision != finest and UNIT[precision] > UNIT["float32"] and is_explained(search):
                return None
            named = precision if precision == finest else likelier(search, precision)
            return with_faults(search, named, search.judge((), "", named))
    return None


def resembles_rounding(search: Search, precision: str, faults: Sequence[Fault] = ()) -> bool:
    """Tell whether the error that faults leave points where that of their own run at a precision does."""
    return alike(search, precision, faults) >= RESEMBLING


def alike(search: Search, precision: str, faults: Sequence[Fault] = ()) -> float:
    """Return the cosine between the error that faults leave and that of their own run at a precision."""
    target, runs = search.target, search.runs
    if not target.aligned:
        return 0.0
    exact = target.transform(runs.run(faults, precision="float64"))
    ours = target.transform(runs.run(faults, precision=precision)) - exact
    error = target.features - exact
    sizes = float(np.linalg.norm(error) * np.linalg.norm(ours))
    return float((error * ours).sum()) / sizes if sizes else 0.0


def likelier(search: Search, precision: str) -> str:
    """Return bfloat16 in place of float16 where the port's error looks more like bfloat16's."""
    if precision != "float16" or "bfloat16" not in search.target.precisions:
        return precision
    more = alike(search, "bfloat16") > max(RESEMBLING, alike(search, "float16"))
    return "bfloat16" if more else precision


def with_faults(search: Search, precision: str, clean: Judgment) -> Agreement:
    """Return an agreement with the faults that can be seen, or could hide, in the error."""
    comfortable = precision in ("float64", "float32") and clean.error <= 1.5 * clean.rounding
    if comfortable or not search.target.aligned or clean.finding.faults:
        return Agreement(precision, clean)
    found = projections(search, precision)
    seen = sorted((p for p in found if p.is_seen), key=lambda p: p.left)
    hidden = tuple(p.fault for p in found if p.is_possible)
    return Agreement(precision, clean, tuple(seen), hidden)


def projections(search: Search, precision: str) -> list[Projection]:
    """Return the port's error projected on the change of each fault that is not larger than the error."""
    target, runs = search.target, search.runs
    search.singles()
    clean_one = search.features[None]
    error = max(target.error, UNIT["float32"])
    smallest = 2 * search.rounding("float32")  # a harmless change moves the features by rounding too
    rows = short_texts(search)
    working = "float64" if precision == "float32" else "float32"
    clean = target.transform(runs.run((), rows, "float64"))
    base = clean if working == "float64" else target.transform(runs.run((), rows))
    residual = target.features[rows] - clean
    found = []
    for fault in runs.catalogue:
        one = search.features[fault.id]
        effect = relative_l2(one, clean_one).max() if one.shape == clean_one.shape else np.inf
        if not smallest < effect <= 1.5 * error or fault.needs == "batch":
            continue
        change = target.transform(runs.run((fault,), rows, working)) - base
        found.append(project(fault, residual, change, clean))
    return [projection for projection in found if projection is not None]


def project(fault: Fault, residual: Any, change: Any, clean: Any) -> Projection | None:
    """Return the projection of the error on a change, or None where the change is no number or none.

    The errors of different texts may be the same rounding of a weight, so only one text's numbers count as
    independent.
    """
    size = float((change * change).sum())
    if not np.isfinite(size) or size == 0 or not np.isfinite(residual).all():
        return None
    coefficient = float((residual * change).sum() / size)
    rest = residual - coefficient * change
    total = float(np.linalg.norm(residual))
    uncertainty = float(np.linalg.norm(rest)) / (size * residual.shape[-1]) ** 0.5
    left = float(np.linalg.norm(residual - change)) / total if total else 1.0
    effect = size**0.5 / float(np.linalg.norm(clean))
    return Projection(fault, coefficient, uncertainty, effect, left)


def short_texts(search: Search) -> Any:
    """Return the rows of a few short texts, the one that faults are tried on first."""
    length = search.target.length
    order = np.argsort(np.where(length < 5, length + 1000, length), kind="stable")
    return np.array(list(dict.fromkeys([*search.target.rows, *order]))[:TEXTS])


def is_explained(search: Search) -> bool:
    """Tell whether the error is most likely one fault or the sum of two, and so no rounding."""
    search.singles()
    error, change = search.changes()
    size = float(error @ error)
    faults = [f for f in search.catalogue if f.id in change and 0 < change[f.id] @ change[f.id] < 4 * size]
    if not faults:
        return False
    _, share, off = pair_misfits(error, np.stack([change[fault.id] for fault in faults]))
    likely = np.argwhere((share > EXPLAINED) & (off < 0.3))
    return any(i == j or not exclusive(faults[i], faults[j]) for i, j in likely)
