"""Search the catalogue for the faults that turn the reference into a port.

Candidates are tried on one text, in float32. Those that come near are judged on all texts: the port may
differ from a float64 run with these faults by no more than `rounding.allowed` of that very model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minclip.porting.catalogue import CATALOGUE, NORMALIZED, SCALED, SHUFFLED
from minclip.porting.faults import Fault
from minclip.porting.rounding import UNIT, allowed, relative_l2
from minclip.porting.runs import Runs
from minclip.porting.target import Target, fitted_factor, nearest_rows, overall_error
from minclip.porting.verdict import Finding

NEAR = {"float32": 300, "float16": 20, "bfloat16": 8}  # times rounding: near enough to be judged
JUDGED = 12  # candidates judged at most, nearest first
JUDGED_LATE = 4  # the same once the time of the search is over
LIKELIEST = 600  # pairs that act in the blocks, tried at most
QUICK = 3  # pairs with a fault after the blocks that are tried for each that acts in the blocks
LIKE = 40  # pairs tried after one that fits, which share a bug with it


@dataclasses.dataclass(frozen=True)
class Trial:
    """Faults put into the reference and the error that they leave on the texts tried.

    transform   "" for features as they are, "scaled" by a fitted factor, "shuffled" in another order
    """

    error: float
    faults: tuple[Fault, ...]
    transform: str


@dataclasses.dataclass(frozen=True)
class Judgment:
    """How far the port is from the reference with faults, over all texts.

    finding    the faults with those that the transform adds, and the error that they leave
    error      the relative L2 error of the worst text
    rounding   the error of rounding alone, on the model's worst text
    allowed    the largest error of a correct port of that model
    """

    finding: Finding
    error: float
    rounding: float
    allowed: float

    @property
    def fits(self) -> bool:
        """Whether the faults explain the port to rounding."""
        return self.error <= self.allowed


class Search:
    """The faults tried on a target so far."""

    def __init__(self, target: Target, runs: Runs, budget: float = math.inf):
        self.target, self.runs = target, runs
        self.deadline = time.monotonic() + budget
        self.rows = target.rows
        self.tried: list[Trial] | None = None
        self.features: dict[str | None, Any] = {}  # fault id -> transformed features of the texts tried
        self.judgments: dict[tuple[tuple[Fault, ...], str, str], Judgment] = {}
        self.pairs_tried: list[Trial] = []
        self.next_pair = 0

    @property
    def catalogue(self) -> list[Fault]:
        """The faults that a port of this model and these texts can have."""
        return self.runs.catalogue

    @property
    def expired(self) -> bool:
        """Whether the time of the search is over."""
        return time.monotonic() > self.deadline

    @property
    def without_faults(self) -> list[Trial]:
        """The trials of the reference itself: as it is, scaled and in another order, nearest first."""
        return [trial for trial in self.singles() if not trial.faults]

    @property
    def clean_error(self) -> float:
        """The error of the reference as it is, on the text tried."""
        return next(trial.error for trial in self.without_faults if not trial.transform)

    # Judging.

    def judge(self, faults: Sequence[Fault], transform: str, precision: str) -> Judgment:
        """Compare the reference with these faults with the port, on all texts."""
        key = (tuple(faults), transform, precision)
        if key not in self.judgments:
            self.judgments[key] = self.compare_all(faults, transform, precision)
        return self.judgments[key]

    def compare_all(self, faults: Sequence[Fault], transform: str, precision: str) -> Judgment:
        """Run the reference with faults in float64 and at a precision, and compare both with the port."""
        target = self.target
        exact = target.transform(self.runs.run(faults, precision="float64"))
        rounded = target.transform(self.runs.run(faults, precision=precision))
        if not target.has_width_of(exact):
            return Judgment(Finding(tuple(faults), np.inf), np.inf, worst_rounding(rounded, exact), 0.0)
        told = [NORMALIZED] if target.unit else []
        if transform == "shuffled" or not target.aligned:
            rows = nearest_rows(target.features, exact)
            exact, rounded = exact[rows], rounded[rows]
            told += [SHUFFLED] * bool((np.diff(rows) <= 0).any())
        if transform == "scaled":
            factor = fitted_factor(target.features, exact)
            exact, rounded = factor * exact, factor * rounded
            told.append(dataclasses.replace(SCALED, summary=SCALED.summary.format(factor=f"{factor:.6g}")))
        rounding = worst_rounding(rounded, exact)
        limit = allowed(rounding, precision)
        if faults:  # a model that amplifies rounding without bound must not pass for anything
            limit = min(limit, NEAR[precision] * self.rounding(precision))
        finding = Finding((*faults, *told), overall_error(target.features, exact))
        return Judgment(finding, float(relative_l2(target.features, exact).max()), rounding, limit)

    def rounding(self, precision: str) -> float:
        """Return the reference's own rounding error, on its worst text."""
        return self.judge((), "", precision).rounding

    def is_near(self, trial: Trial, precision: str | None = None) -> bool:
        """Tell whether a trial is worth judging."""
        precision = precision or self.target.precisions[0]
        return trial.error <= NEAR[precision] * self.rounding(precision)

    def fits(self, trial: Trial) -> bool:
        """Tell whether a trial explains the port on all texts, at the finest possible precision."""
        finest = self.target.precisions[0]
        return self.is_near(trial) and self.judge(trial.faults, trial.transform, finest).fits

    def judge_nearest(self, trials: Iterable[Trial], precision: str) -> list[Finding]:
        """Return the trials that explain all texts: best first, and ties in the catalogue's order."""
        found: dict[tuple[str, ...], Finding] = {}
        near = [trial for trial in trials if self.is_near(trial, precision)]
        for judged, trial in enumerate(sorted(near[:JUDGED], key=lambda trial: trial.transform != "")):
            if judged >= JUDGED_LATE and self.expired:
                break
            ids = tuple(fault.id for fault in trial.faults)
            judgment = self.judge(trial.faults, trial.transform, precision)
            if judgment.fits and self.is_explanation(judgment, precision):
                found.setdefault(ids, judgment.finding)
        return ranked(list(found.values()))

    def is_explanation(self, judgment: Judgment, precision: str) -> bool:
        """Tell whether faults explain most of the error, as coarse rounding could hide what they leave."""
        return UNIT[precision] <= UNIT["float32"] or judgment.finding.error < 0.5 * self.target.error

    # Trying.

    def try_faults(self, faults: tuple[Fault, ...], features: Any) -> list[Trial]:
        """Return the errors of features of the texts tried: as they are, scaled and in another order."""
        target = self.target
        if not target.has_width_of(features):
            return [Trial(np.inf, faults, "")]
        found = target.transform(features)
        if not target.aligned:  # one row of the port against every text
            errors = relative_l2(target.features[:1], found)
            return [Trial(float(np.min(errors, initial=np.inf)), faults, "")]
        row = self.rows[0]
        error = float(relative_l2(target.features[row], found[0]))
        others = np.delete(target.features, row, axis=0)
        near = {"shuffled": float(relative_l2(others, found[:1]).min(initial=np.inf))}
        if not target.unit and np.isfinite(error):
            scaled = fitted_factor(target.features[row], found[0]) * found[0]
            near["scaled"] = float(relative_l2(target.features[row], scaled))
        more = [Trial(e, faults, transform) for transform, e in near.items() if e < 0.1 * error]
        return [Trial(error, faults, ""), *more]

    def singles(self) -> list[Trial]:
        """Return a trial of every fault by itself, and of none, nearest first."""
        from tqdm import tqdm  # here, because it takes time to import

        if self.tried is None:
            self.tried = []
            for fault in tqdm([None, *self.catalogue], "single bugs", disable=None, leave=False):
                faults = (fault,) if fault else ()
                features = self.runs.quick(faults, self.rows)
                self.features[fault and fault.id] = self.target.transform(features)
                self.tried += self.try_faults(faults, features)
            self.tried.sort(key=lambda trial: trial.error)
        return self.tried

    def pairs(self, most: int | None = None) -> list[Trial]:
        """Return trials of two faults together, nearest first, up to the first that fits and its like.

        most   how many pairs are tried; None tries all. A later call goes on from there
        """
        from tqdm import tqdm  # here, because it takes time to import

        self.singles()
        order = self.pair_order
        for pair in tqdm(order[self.next_pair : most], "pairs of bugs", disable=None, leave=False):
            if self.expired:
                break
            self.next_pair += 1
            if self.try_pair(pair):
                for like in sharing_a_fault(pair, order[self.next_pair :])[:LIKE]:
                    self.try_pair(like)
                self.next_pair = len(order)
                break
        else:
            if most is None:
                self.pairs_tried += self.pairs_on_another_text()
        return sorted(self.pairs_tried, key=lambda trial: trial.error)

    def try_pair(self, pair: tuple[Fault, Fault]) -> bool:
        """Try a pair, and tell whether it explains the port on all texts."""
        new = self.try_faults(pair, self.runs.quick(pair, self.rows))
        self.pairs_tried += new
        return any(self.fits(trial) for trial in new)

    def pairs_with(self, findings: Sequence[Finding]) -> list[Trial]:
        """Return trials of pairs with a bug that explains the port only to a coarser precision."""
        known = findings[0].faults[0]
        pairs = [in_order(known, fault) for fault in self.catalogue if not exclusive(known, fault)]
        trials = [
            trial for pair in pairs for trial in self.try_faults(pair, self.runs.quick(pair, self.rows))
        ]
        return sorted(trials, key=lambda trial: trial.error)

    @functools.cached_property
    def pair_order(self) -> list[tuple[Fault, Fault]]:
        """Pairs worth trying, the likeliest first. Those with a fault after the blocks are quicker to try.

        The effect of a pair is guessed from the effects of its faults: how well their sum, with fitted
        factors, gives the port's change, with some weight on factors near 1.
        """
        target, change = self.changes()
        faults = [fault for fault in self.catalogue if fault.id in change]
        effects = np.stack([change[fault.id] for fault in faults])
        visible = np.linalg.norm(effects, axis=-1) > 1e-6 * np.linalg.norm(target)
        misfit = pair_misfits(target, effects)[0]
        after = [self.runs.acts_after_blocks(fault) for fault in faults]
        of_width = [self.target.has_width_of(self.features[fault.id]) for fault in faults]
        any_width = self.target.has_width_of(self.features[None])
        quick: list[tuple[float, tuple[Fault, Fault]]] = []
        slow: list[tuple[float, tuple[Fault, Fault]]] = []
        for i, j in itertools.combinations(range(len(faults)), 2):
            if not (any_width or of_width[i] or of_width[j]):
                continue
            both = visible[i] and visible[j]
            # The effect of one fault after the end of text may become visible through the other.
            if (both or (faults[i].needs and faults[j].needs)) and not exclusive(faults[i], faults[j]):
                pairs = quick if after[i] or after[j] else slow
                pairs.append((misfit[i, j] if both else 0, (faults[i], faults[j])))
        places = [
            (place / speed, pair)
            for pairs, speed in ((quick, QUICK), (slow, 1))
            for place, (_, pair) in enumerate(sorted(pairs, key=lambda entry: entry[0]))
            if pairs is quick or place < LIKELIEST
        ]
        return [pair for _, pair in sorted(places, key=lambda entry: entry[0])]

    def changes(self) -> tuple[Any, dict[str, Any]]:
        """Return the change of the features tried that the port makes, and that each fault makes."""
        self.singles()
        row = self.rows[0] if self.target.aligned else 0
        port, base = self.target.features[row], self.features[None][0]
        fitting = self.target.has_width_of(base)
        target = np.nan_to_num(port) - base if fitting else np.zeros_like(base)
        broken = not np.isfinite(port).all()
        change = {}
        for key, features in self.features.items():
            if key and (broken or np.isfinite(features).all()):
                fitting = features.shape[-1] == base.shape[-1]
                change[key] = np.nan_to_num(features[0]) - base if fitting else np.ones_like(base)
        return target, change

    def pairs_on_another_text(self) -> list[Trial]:
        """Return pairs with a fault that explains the text tried but not all, tried on one of the others."""
        trials, home = [], self.rows
        if not self.target.aligned:
            return []
        for single in [t for t in self.singles()[:JUDGED] if t.faults and self.is_near(t)][:3]:
            exact = self.target.transform(self.runs.run(single.faults))
            self.rows = relative_l2(self.target.features, exact).argmax(keepdims=True)
            for fault in self.catalogue:
                if not exclusive(fault, single.faults[0]):
                    pair = in_order(single.faults[0], fault)
                    trials += self.try_faults(pair, self.runs.run(pair, self.rows))
        self.rows = home
        return trials


def worst_rounding(rounded: Any, exact: Any) -> float:
    """Return the largest finite relative L2 distance between rows of two runs."""
    moved = relative_l2(rounded, exact)
    return float(moved[np.isfinite(moved)].max(initial=0))


def ranked(findings: list[Finding]) -> list[Finding]:
    """Return the findings of fewest faults: best first, and ties in the catalogue's order."""
    fewest = min((len(finding.faults) for finding in findings), default=0)
    best = min((finding.error for finding in findings), default=0)
    place = {fault.id: i for i, fault in enumerate((*CATALOGUE, SCALED, SHUFFLED))}

    def rank(finding: Finding) -> tuple[float, list[int]]:
        worse = finding.error if finding.error > 1.3 * best else 0
        return worse, [place[fault.id] for fault in finding.faults]

    return sorted((finding for finding in findings if len(finding.faults) == fewest), key=rank)


def exclusive(a: Fault, b: Fault) -> bool:
    """Tell whether a port can hardly have both faults: two ways of doing the same thing."""
    stem_a, stem_b = a.id.split("-")[0], b.id.split("-")[0]
    if stem_a[0] == stem_b[0] and stem_a[0] in "AMP":
        return True
    if {stem_a, stem_b} <= {"N7", "N12", "N15"}:
        return True
    return stem_a == stem_b and stem_a not in ("T6", "T7", "N4")


def pair_misfits(target: Any, effects: Any) -> tuple[Any, Any, Any]:
    """Return how badly the sum of two effects gives target, for each pair of effects [n, E].

    The first [n, n] is the squared residual with fitted factors, with some weight on factors near 1; the
    second the share of target that the pair explains; the third the largest distance of a factor from 1.
    """
    gram, dots, size = effects @ effects.T, effects @ target, float(target @ target)
    own = np.diag(gram)
    determinant = own[:, None] * own[None, :] - gram**2
    single = determinant <= 1e-9 * own[:, None] * own[None, :]  # one effect twice, or two of one direction
    with np.errstate(all="ignore"):
        a = (dots[:, None] * own[None, :] - dots[None, :] * gram) / np.where(single, 1, determinant)
        alone = np.nan_to_num(dots / own)
    a = np.where(single, alone[:, None], a)
    b = np.where(single, 1, a.T)
    explained = a * dots[:, None] + np.where(single, 0, b * dots[None, :])
    off = (a - 1) ** 2 + (b - 1) ** 2
    share = explained / size if size else np.zeros_like(explained)
    return size - explained + 0.05 * size * off, share, np.maximum(abs(a - 1), abs(b - 1))


def in_order(a: Fault, b: Fault) -> tuple[Fault, ...]:
    """Return two faults in the catalogue's order, in which they are applied."""
    return tuple(fault for fault in CATALOGUE if fault in (a, b))


def sharing_a_fault(
    pair: tuple[Fault, Fault], pairs: Sequence[tuple[Fault, Fault]]
) -> list[tuple[Fault, Fault]]:
    """Return the pairs that share a fault with this one."""
    return [other for other in pairs if other != pair and set(other) & set(pair)]
