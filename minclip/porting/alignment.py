"""Recognize another implementation's arrays as stages: by their values, their names, and their shapes.

Every array is compared with every stage that it can be by shape and layout, on a sample of the numbers up to
the end of each text. Values decide. A name helps where the values fit no stage. After a divergence, arrays
are recognized by how they follow from each other, see `continuation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minclip.arrays import as_array
from minclip.porting.continuation import EXACT, Continuation, hides
from minclip.porting.layouts import Match, Reading, readings, reversed_axes, same
from minclip.porting.names import stages_of
from minclip.porting.stages import (
    AXES,
    PACKED,
    axes,
    count_blocks,
    is_parameter,
    packed_stages,
    part_of,
    parts,
    text_of,
)
from minclip.tracing import Trace

FITS = 0.05  # the largest relative error at which an array counts as a stage by its values
CLEARLY = 3  # how many times nearer to that stage than to any other
SAMPLE = 2000  # numbers of an array that are compared
SILENT = (".masked", "eot")  # recognized by name only: integers, and scores with any large negative number


@dataclasses.dataclass
class Alignment:
    """A dump read as stages.

    matches   {stage: `Match`}
    misfits   {stage: (name, shape)}: arrays with a stage's name whose shape is none of its layouts
    moved     {name: (the stage that it names, the stage that it holds)}
    strays    {name: stage}: arrays that name a stage which another array holds
    unknown   the names of arrays that are no stage
    """

    matches: dict[str, Match]
    misfits: dict[str, tuple[str, list[int]]]
    moved: dict[str, tuple[str, str]]
    strays: dict[str, str]
    unknown: list[str]


class Candidate(NamedTuple):
    """A stage that an array may be: the relative error on the sample, and how the array is read."""

    error: float
    stage: str
    reading: Reading


class StageKind:
    """The stages of the same axes and shape, with a sample of each.

    names    the stages; a block's packed q, k, v are one
    index    the sampled places in minclip's layout
    rows     [stages, n], the reference's numbers there, in float64
    """

    def __init__(self, goal: str, names: list[str], arrays: list[Any], text: Any):
        self.goal, self.names = goal, names
        self.sizes = dict(zip(goal.split(), arrays[0].shape, strict=True))
        self.index = sampled_places(goal, arrays[0].shape, text)
        with np.errstate(all="ignore"):
            self.rows = np.stack([array[self.index] for array in arrays]).astype(np.float64)

    def candidates(self, array: Any, batch: int) -> Iterator[Candidate]:
        """Return the stages that an array can be by its shape, each with its best reading."""
        best: dict[str, Candidate] = {}
        for reading in readings(array, self.goal, {"B": batch, **self.sizes}):
            inside = self.inside(reading.length)
            numbers = reading.array[tuple(axis[inside] for axis in self.index)].astype(np.float64)
            for stage, error in zip(self.names, relative_errors(numbers, self.rows[:, inside]), strict=True):
                if stage not in best or error < best[stage].error:
                    best[stage] = Candidate(float(error), stage, reading)
        yield from best.values()

    def inside(self, length: int) -> Any:
        """Return which sampled places are among the first positions."""
        limits = [
            axis < length
            for axis, letter in zip(self.index, self.goal.split(), strict=True)
            if letter in "LM"
        ]
        return np.logical_and.reduce(limits) if limits else np.full(self.rows.shape[1], True)


def sampled_places(goal: str, shape: tuple[int, ...], text: Any) -> tuple[Any, ...]:
    """Return an index of at most SAMPLE places, up to the end of each text and visible to the mask."""
    rng = np.random.default_rng(0)
    letters = goal.split()
    size = math.prod(shape)
    flat = np.arange(size) if size <= 4 * SAMPLE else np.unique(rng.integers(size, size=40 * SAMPLE))
    index = dict(zip(letters, np.unravel_index(flat, shape), strict=True))
    good = np.full(len(flat), True)
    if "M" in index:
        good &= index["M"] <= index["L"]
    if text is not None and "B" in index and "L" in index:
        good &= text[index["B"], index["L"]]
    chosen = np.flatnonzero(good)
    chosen = np.sort(rng.permutation(chosen)[:SAMPLE])
    return tuple(index[letter][chosen] for letter in letters)


def relative_errors(numbers: Any, rows: Any) -> Any:
    """Return the relative L2 distance of numbers from each row; inf where a number is not finite."""
    with np.errstate(all="ignore"):
        errors = np.linalg.norm(rows - numbers, axis=1) / np.linalg.norm(rows, axis=1)
    return np.where(np.isfinite(errors), errors, np.inf)


class Recognizer:
    """Tells which stages of a reference an array can be."""

    def __init__(self, reference: Any):
        text = text_of(reference)
        self.backwards = getattr(reference, "gradient", None) is not None
        self.arrays = {
            name: as_array(array)
            for name, array in reference.items()
            if name in AXES or not is_parameter(name)  # a trace of gradients holds those of parameters too
        }
        self.kinds = [StageKind(*kind, text) for kind in stage_kinds(self.arrays)]
        self.batch = next((array.shape[0] for name, array in self.arrays.items() if axes(name)[0] == "B"), 1)

    def candidates(self, array: Any) -> list[Candidate]:
        """Return the stages that an array can be by its shape, nearest first."""
        if array.dtype.kind != "f":
            return []
        found = [c for kind in self.kinds for c in kind.candidates(array, self.batch)]
        if not any(candidate.error <= FITS for candidate in found):
            for other in reversed_axes(array):
                found += [
                    c._replace(reading=c.reading._replace(layout=f"{c.reading.layout} in reverse"))
                    for kind in self.kinds
                    for c in kind.candidates(other, self.batch)
                    if c.error <= FITS
                ]
        return sorted(map(masked_if_hidden, found), key=lambda candidate: candidate.error)

    def kind_of(self, stage: str) -> StageKind:
        """Return the kind of a stage."""
        stage = stage.replace(".masked", ".scores")
        return next(kind for kind in self.kinds if stage in kind.names)


def masked_if_hidden(candidate: Candidate) -> Candidate:
    """Return scores as masked scores if the first query's score of a later key is very low."""
    if not candidate.stage.endswith("attn.scores"):
        return candidate
    masked = candidate.stage.replace(".scores", ".masked")
    return candidate._replace(stage=masked) if hides(candidate.reading.array) else candidate


def stage_kinds(arrays: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[Any]]]:
    """Return (axes, stages, arrays) of stages that have the same axes and shape, and of packed q, k, v."""
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, array in arrays.items():
        if not name.endswith(SILENT) and array.dtype.kind == "f":
            kinds.setdefault((axes(name), array.shape), []).append(name)
    for (goal, _), names in kinds.items():
        yield goal, names, [arrays[name] for name in names]
    if packed := packed_stages(arrays):
        yield axes(PACKED), packed, [np.stack([arrays[part] for part in parts(name)]) for name in packed]


def align(reference: Trace, port: Mapping[str, Any]) -> Alignment:
    """Read a port's arrays as stages of a reference."""
    recognizer = Recognizer(reference)
    layers = count_blocks(reference)
    named = stages_of(list(port), layers)
    candidates = {name: recognizer.candidates(array) for name, array in port.items()}
    aligner = Aligner(recognizer, dict(port), named, candidates)
    result = aligner.align()
    if aligner.diverges and reference.params is not None:
        after = Continuation(reference, port, result.matches)
        after.extend()
        result.strays.update(after.replaced)
        used = {match.name for match in result.matches.values()}
        result.unknown[:] = [name for name in result.unknown if name not in used]
    return result


class Aligner:
    """Decides which array is which stage.

    named        name -> the stage that it means, or None
    candidates   name -> the stages that its array can be, nearest first
    held         name -> the stage that its array clearly is by its values, or None
    """

    def __init__(self, recognizer: Recognizer, port: dict[str, Any], named: Any, candidates: Any):
        self.recognizer, self.port, self.named, self.candidates = recognizer, port, named, candidates
        self.known = {*recognizer.arrays, *(s for kind in recognizer.kinds for s in kind.names)}
        self.held: dict[str, Any] = {
            name: clear_stage(found, named[name]) for name, found in candidates.items()
        }
        self.result = Alignment({}, {}, {}, {}, [])
        # Where there is no bug, values alone decide, and names that disagree mislead.
        self.trusting = not recognizer.backwards and (self.features_agree or self.names_are_mixed_up)

    @property
    def features_agree(self) -> bool:
        """Whether there are features near the reference's."""
        return any(s == "text_features" and self.named[n] in (s, None) for n, s in self.held.items())

    @property
    def names_are_mixed_up(self) -> bool:
        """Whether the arrays clearly are the stages that they name, but in another order.

        A bug leaves an array that is no stage, or a name whose stage is nowhere, or the q, k and v of a block
        in each other's places.
        """
        floats = [name for name, array in self.port.items() if array.dtype.kind == "f"]
        held, named = [self.held[name] for name in floats], [self.named[name] for name in floats]
        if None in held or len(set(held)) < len(held) or set(held) != set(named):
            return False
        moved = {part_of(stage) for stage, name in zip(held, named, strict=True) if stage != name}
        return not moved <= {"attn.q", "attn.k", "attn.v"}

    @property
    def diverges(self) -> bool:
        """Whether the features, if there are any, are off by more than float32 rounding."""
        found = (c.error for name in self.port for c in self.candidates[name] if c.stage == "text_features")
        return not self.recognizer.backwards and min(found, default=np.inf) > EXACT

    def align(self) -> Alignment:
        """Return the alignment: arrays whose values and name agree come first, then values, then names."""
        agreeing = [name for name in self.port if self.held[name] and self.held[name] == self.named[name]]
        agreeing.sort(key=lambda name: name != self.named[name])  # minclip's own names come first
        for name in agreeing:
            self.assign(name, self.held[name])
        for name in self.port:
            if name not in agreeing and self.held[name] and self.may_move(name):
                self.assign(name, self.held[name])
        for name in sorted(self.port, key=lambda name: name != self.named[name]):
            if not self.is_done(name):
                self.assign_by_name(name)
        for stage in [stage for stage in self.result.misfits if stage in self.result.matches]:
            name, _ = self.result.misfits.pop(stage)
            self.result.strays[name] = stage
        return self.result

    def may_move(self, name: str) -> bool:
        """Tell whether an array may be taken for the stage that it holds rather than the one it names.

        A port with a bug may well have one stage's numbers in another's place, such as q's in k. The name is
        given up only where another array, without a name of its own, holds the stage that it names.
        """
        stage = self.named[name]
        return stage not in self.known or self.trusting or self.is_held_elsewhere(name, stage)

    def is_held_elsewhere(self, name: str, stage: str) -> bool:
        """Tell whether another array holds a stage, and names that stage or none."""
        return any(
            held == stage
            and other != name
            and (self.named[other] == stage or self.named[other] not in self.known)
            for other, held in self.held.items()
        )

    def is_done(self, name: str) -> bool:
        """Tell whether an array has been assigned."""
        return any(match.name == name for match in self.result.matches.values()) or name in self.result.moved

    def assign(self, name: str, stage: str) -> None:
        """Take an array for the stage that it holds, unless another array has been."""
        candidate = next(c for c in self.candidates[name] if c.stage == stage)
        if self.take(name, stage, candidate, by_value=True) and self.named[name] in self.known - {stage}:
            self.result.moved[name] = self.named[name], stage

    def assign_by_name(self, name: str) -> None:
        """Take an array for the stage that it names, unless another array holds that stage."""
        stage = self.named[name]
        if stage not in self.known:
            if not self.held[name]:
                self.result.unknown.append(name)
            return
        candidate = next((c for c in self.candidates[name] if c.stage == stage), None)
        if stage.endswith(SILENT):
            self.assign_silent(name, stage)
        elif candidate is None:
            self.result.misfits.setdefault(parts(stage)[0], (name, list(self.port[name].shape)))
        elif not self.take(name, stage, candidate, by_value=candidate.error <= FITS):
            if candidate.error > FITS:  # not just another copy of the stage
                self.result.strays[name] = stage

    def assign_silent(self, name: str, stage: str) -> None:
        """Take an array for a stage that is recognized by name only."""
        expected, array = self.recognizer.arrays[stage], self.port[name]
        sizes = {"B": self.recognizer.batch, **dict(zip(axes(stage).split(), expected.shape, strict=True))}
        found = readings(array, axes(stage), sizes)
        if not found:
            self.result.misfits.setdefault(stage, (name, list(array.shape)))
        elif stage not in self.result.matches:
            best = min(found, key=lambda reading: distance(reading, expected))
            self.result.matches[stage] = Match(best.array, name, best.layout, [])

    def take(self, name: str, stage: str, candidate: Candidate, by_value: bool) -> bool:
        """Record an array as a stage, or as q, k and v; tell whether the stage was free."""
        reading, free = candidate.reading, [part for part in parts(stage) if part not in self.result.matches]
        kind = self.recognizer.kind_of(stage)
        others = readings(self.port[name], kind.goal, {"B": self.recognizer.batch, **kind.sizes})
        if not by_value:
            reading = self.usual_reading(kind.goal, others, reading)
        rivals = [r.layout for r in others if r.layout != reading.layout and not same(r.array, reading.array)]
        arrays = dict(
            zip(parts(stage), reading.array if stage.endswith(PACKED) else [reading.array], strict=True)
        )
        for part in free:
            self.result.matches[part] = Match(arrays[part], name, reading.layout, rivals, by_value)
        return bool(free)

    def usual_reading(self, goal: str, others: list[Reading], nearest: Reading) -> Reading:
        """Return the reading in the layout that most recognized arrays of such axes have, or the nearest.

        Wrong numbers tell no layout. With two texts and two heads, say, several have the same shape.
        """
        layouts = [m.layout for s, m in self.result.matches.items() if m.by_value and axes(s) == goal]
        count = max((layouts.count(reading.layout) for reading in others), default=0)
        usual = [reading for reading in others if layouts.count(reading.layout) == count > 0]
        return usual[0] if usual else nearest


def clear_stage(candidates: list[Candidate], named: str | None) -> str | None:
    """Return the stage that an array clearly is by its values, or None. A name decides between equals."""
    if not candidates or candidates[0].error > FITS:
        return None
    best = candidates[0]
    near = {c.stage for c in candidates if c.error <= CLEARLY * best.error}
    if named in near:
        return named
    ties = {c.stage for c in candidates if c.error <= best.error}
    return best.stage if near == ties else None


def distance(reading: Reading, expected: Any) -> float:
    """Return the distance of an array from the reference, over the numbers that are finite in both."""
    a = reading.array
    b = expected[tuple(slice(n) for n in a.shape)]
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.linalg.norm(a[both].astype(np.float64) - b[both].astype(np.float64)))
