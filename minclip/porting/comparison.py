"""`compare`: a port beside the reference, stage by stage, and the first stage that diverges."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.params import keep
from minclip.porting import display, gradients
from minclip.porting.alignment import Match, align, crop, rename, unpack
from minclip.porting.faults import Fault
from minclip.porting.probe import as_trace, read_dump, read_probe
from minclip.porting.rounding import (
    PRECISIONS,
    UNIT,
    UNMEASURED,
    allowed,
    coarser,
    distances,
    holds,
    ratio,
    relative_l2,
    rounding_of,
    run,
)
from minclip.porting.stages import LOOKED_UP, axes, entries, part_of, text_of
from minclip.tracing import Trace


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage side by side.

    name, layout     the port's name for the stage, and how its axes lie in the port's array
    precision        the precision of the port's numbers, which the tolerance is for, such as "float32"
    max_abs, relative_l2, cosine, norm_ratio    port against reference, over every position
    nan              the share of NaN
    error, tolerance    relative L2 error up to the end of each text, and the largest error allowed
    new, new_tolerance  the same for the error that this stage adds; None where it was not shadowed
    state            "agrees"; "padding", where only positions after the end of text differ; "diverges",
                     with an error of its own; "inherits", where an earlier stage diverged and this stage
                     is not known to add to it; "shape", where the port's array has no layout of this stage
    """

    name: str
    layout: Any
    precision: str | None = None
    max_abs: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    nan: float | None = None
    error: float | None = None
    tolerance: float | None = None
    new: float | None = None
    new_tolerance: float | None = None
    state: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as plain values."""
        return dataclasses.asdict(self)


def compare(
    reference: Mapping[str, Any], port: Mapping[str, Any], *, rtol: float | None = None
) -> Comparison:
    """Compare a port's stages with the reference's, and return a `Comparison`.

    reference  a `Trace`, from `minclip.trace` or from a probe's file
    port       mapping from name to array: as many stages as the port has, of a run on the same tokens.
               Names may be minclip's, OpenAI's, OpenCLIP's or Hugging Face's (`alignment.rename` is for
               others), arrays NumPy's, CuPy's or torch's. The layout of each array is recognized.
    rtol       the relative L2 error allowed at every stage, instead of the measured tolerance

    The tolerance of a stage is a multiple of what rounding does to the reference at the port's precision,
    see `minclip.porting.rounding`. That precision is the coarsest that the numbers of this stage and of
    earlier stages show: float32 arrays that hold only float16 numbers count as float16.

    Where the reference carries its params, each stage is also *shadowed*: compared with the result of
    the reference, in float64, from the port's own earlier stages. Inherited error drops out, and `new` is
    the error of this stage itself, together with the stages before it that the port does not show.

    Positions after the end of a text never reach its features: a stage where only they differ is
    reported, but does not count as diverging.

    A reference from `minclip.backward` is compared with a port's gradients: of stages, under the stages'
    names, and of parameters, under the port's own (`trace_torch(model, tokens, grad=...)` gives both).
    `faults` then lists the known bugs of backward passes that explain every difference.

    Raises ValueError where nothing of the port can be matched, or where it was run on other tokens.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize("a cat")
    >>> port = dict(minclip.trace(params, tokens))
    >>> port["ln_final"] = port["transformer.resblocks.3"]  # the last norm forgotten
    >>> compare(minclip.trace(params, tokens), port).first
    'ln_final'
    """
    reference = reference if isinstance(reference, Trace) else as_trace(reference)
    backwards = reference.gradient is not None
    reference = gradients.complete(reference) if backwards else reference
    arrays = unpack(port)
    check_tokens(reference, arrays)
    parameters = gradients.parameters_of(reference, arrays) if backwards else {}
    matches, misfits, unknown = align(reference, arrays)
    matches |= {name: Match(array, theirs, axes(name), []) for name, (theirs, array) in parameters.items()}
    if not matches and not misfits:
        raise ValueError(
            f"no stage is called {listed(unknown)}: minclip.porting.alignment.rename gives stages their names"
        )
    pairs, tokens = crop_alike(reference, matches)
    text = text_of(reference)
    text = None if text is None else text[:, : tokens.shape[1]]
    added = {}
    if reference.params is not None:
        theirs = {name: port for name, (_, port) in pairs.items()}
        added = (
            gradients.distances(reference, theirs, text, shadow=True)
            if backwards
            else distances(reference.params, tokens, theirs, shadow=True)
        )
    stages, precision = {}, PRECISIONS[0]
    given = list(reference)[:1] if backwards else LOOKED_UP
    for name in (name for name in reference if name in pairs or name in misfits):
        if name in misfits:
            stages[name] = Stage(*misfits[name])
            continue
        here = precision_of(name, *pairs[name])
        if name not in given:  # says nothing of the arithmetic that follows
            here = precision = coarser(precision, here)
        tolerance, new_tolerance = tolerances(reference, name, here, rtol)
        stages[name] = Stage(
            matches[name].name,
            matches[name].layout,
            here,
            *measure(name, *pairs[name], text),
            tolerance,
            added.get(name),
            new_tolerance,
        )
    judged = judge(stages)
    new = [name for name, stage in judged.items() if stage.state == "diverges"]
    faults = []
    if backwards and new and not misfits:
        limits = {name: stages[name].tolerance for name in pairs}
        faults = list(gradients.explain(reference, pairs, limits, new, text))
    return Comparison(judged, reference, pairs, matches, unknown, text, rtol, faults)


@np.errstate(all="ignore")
def measure(name: str, reference: Any, port: Any, text: Any) -> tuple[float, ...]:
    """Return max abs, relative L2, cosine, norm ratio, share of NaN; and relative L2 up to each text's end.

    The first four are of numbers that are finite in both, except that relative L2 is inf where one
    side alone is finite.
    """
    a, b = entries(name, reference, port)
    nan = float(np.isnan(b).mean()) if b.size else 0.0
    whole = error = float(relative_l2(b, a))
    if text is not None:
        a_text, b_text = entries(name, reference, port, text)
        error = float(relative_l2(b_text, a_text))
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    sizes = np.linalg.norm(a), np.linalg.norm(b)
    cosine = float(a @ b / (sizes[0] * sizes[1])) if all(sizes) else math.nan
    return float(abs(b - a).max(initial=0)), whole, cosine, ratio(sizes[1], sizes[0]), nan, error


def tolerances(reference: Trace, name: str, precision: str, rtol: float | None) -> tuple[float, float]:
    """Return the relative L2 errors allowed at a stage: with all earlier rounding, and by itself."""
    if name == "eot":
        return 0.0, 0.0
    if rtol is not None:
        return rtol, rtol
    measuring = rounding_of if reference.gradient is None else gradients.rounding_of
    measured = measuring(reference, precision)
    if measured is None or name not in measured:
        return UNMEASURED * UNIT[precision], UNMEASURED * UNIT[precision]
    inherited, own = measured[name]
    return allowed(inherited, precision), allowed(own, precision)


def precision_of(name: str, reference: Any, port: Any) -> str:
    """Return the precision that a stage's numbers show: the coarser of the two sides'."""
    if reference.dtype.kind != "f" or part_of(name) == "attn.weights":  # many weights are 0 or 1
        return PRECISIONS[0]
    ours, theirs = holds(reference), holds(port)
    if name in LOOKED_UP and ours == theirs != "float64":  # the parameters are so coarse; nobody rounded
        return "float32"
    return coarser(ours, theirs)


def judge(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """Return the stages with their states, in order."""
    judged, diverged = {}, False
    for name, stage in stages.items():
        if stage.error is None:
            state = "shape"
        elif stage.relative_l2 <= stage.tolerance:
            state = "agrees"
        elif stage.error <= stage.tolerance:
            state = "padding"
        elif diverged and (stage.new is None or stage.new <= stage.new_tolerance):
            state = "inherits"
        else:
            state = "diverges"
        diverged = diverged or state in ("diverges", "shape")
        judged[name] = dataclasses.replace(stage, state=state)
    return judged


def check_tokens(reference: Trace, arrays: dict[str, Any]) -> None:
    """Take the port's tokens out of its arrays.

    Raises ValueError unless they are the reference's, up to the end of each text.
    """
    given = [arrays.pop(name) for name in ("tokens", "input_ids") if name in arrays]
    if not given or reference.tokens is None:
        return
    ours, theirs = reference.tokens, given[0]
    if ours.shape != theirs.shape:
        raise ValueError(f"the port's tokens are {list(theirs.shape)}, the reference's {list(ours.shape)}")
    other = (ours != theirs) & text_of(reference)
    if other.any():
        row, position = map(int, np.argwhere(other)[0])
        found, expected = theirs[row, position], ours[row, position]
        raise ValueError(f"the port was run on other tokens: {found} at [{row}, {position}], not {expected}")


def crop_alike(reference: Trace, matches: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """Return {stage: (reference, port)} and tokens, cut to the fewest positions of the port's stages."""
    lengths = [
        match.array.shape[axes(name).split().index("L")]
        for name, match in matches.items()
        if "L" in axes(name)
    ]
    kept = min(lengths, default=None)
    pairs = {
        name: (crop(axes(name), as_array(reference[name]), kept), crop(axes(name), match.array, kept))
        for name, match in matches.items()
    }
    return pairs, None if reference.tokens is None else reference.tokens[:, :kept]


class Comparison:
    """A port beside the reference, stage by stage.

    stages    {stage: `Stage`}, in the order of computation: the stages that the port shows
    first     the name of the first stage that diverges, or None
    new       the names of all stages that diverge with an error of their own, as far as shadowing tells
    missing   the names of the stages that the port does not show
    verdict   one sentence
    notes     further sentences: where in the arrays, how they were read, what was left out
    faults    of gradients, the known bugs that explain every difference, each a `Fault`

    Prints as a table whose first line is the verdict; in Jupyter it is a picture, layers x stages.
    """

    stages: dict[str, Stage]
    first: str | None
    new: list[str]
    missing: list[str]
    verdict: str
    notes: list[str]
    faults: list[Fault]

    def __init__(
        self,
        stages: dict[str, Stage],
        reference: Trace,
        pairs: Mapping[str, tuple[Any, Any]],
        matches: Mapping[str, Any],
        unknown: list[str],
        text: Any,
        rtol: float | None,
        faults: Iterable[Fault] = (),
    ):
        self.stages = stages
        self.faults = list(faults)
        self.order = list(reference)
        self.pairs, self.text = pairs, text  # for a page of it
        self.missing = [name for name in reference if name not in stages]
        self.new = [name for name, stage in stages.items() if stage.state in ("diverges", "shape")]
        self.first = self.new[0] if self.new else None
        self.verdict = verdict(stages, self.first, reference, rtol)
        self.notes = [
            *(f"{f.id} explains every difference: {f.summary}. Remedy: {f.remedy}" for f in self.faults),
            *(notes_on_first(self, reference, pairs, text) if self.first else ()),
            *notes_on_reading(self, reference, matches, text),
            *notes_on_gaps(self, reference, unknown, rtol),
        ]

    def __repr__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        stages = {name: stage.to_dict() for name, stage in self.stages.items()}
        facts = {name: getattr(self, name) for name in ("verdict", "first", "new", "missing", "notes")}
        return {**facts, "faults": [fault.to_dict() for fault in self.faults], "stages": stages}


def verdict(stages: Mapping[str, Stage], first: str | None, reference: Trace, rtol: float | None) -> str:
    """Return the verdict, which is the first line of the text."""
    precision = max((stage.precision or PRECISIONS[0] for stage in stages.values()), key=PRECISIONS.index)
    within = f"rtol {rtol:g}" if rtol is not None else f"the rounding of {precision}"
    compared, at = ("stages", "") if reference.gradient is None else ("gradients", "the gradient of ")
    if first is None:
        return f"agrees: {len(stages)} of {len(reference)} {compared} were compared, all are within {within}"
    if stages[first].state == "shape":
        return f"diverges first at {at}{first}, which has another shape"
    error, limit = stages[first].error, stages[first].tolerance
    times = f", {error / limit:.2g} times the error allowed" if limit else ""
    return f"diverges first at {at}{first}: relative error {error:.2g}{times}"


def notes_on_first(comparison: Comparison, reference: Trace, pairs: Any, text: Any) -> Iterator[str]:
    """Return sentences on the first divergence: where in the array, of what kind, which others are new."""
    first, stage = comparison.first, comparison.stages[comparison.first]
    before = comparison.order[: comparison.order.index(first)]
    hidden: list[str] = []
    while before and before[-1] in comparison.missing:
        hidden.insert(0, before.pop())
    if hidden:
        yield f"the port does not show {listed(hidden)}, just before: the error is there or in {first}"
    if stage.state == "shape":
        yield f"the port's {stage.name} is {stage.layout}, no layout of {list(reference[first].shape)}"
        return
    yield from whereabouts(first, *pairs[first], text, stage.tolerance)
    if stage.cosine > 0.99999 and abs(stage.norm_ratio - 1) > 1e-3:
        yield f"it is {stage.norm_ratio:.5g} times the reference's: right but for its scale"
    if stage.new is not None and stage.new <= stage.new_tolerance:
        yield "no stage up to there adds more than rounding: the errors add up over the stages"
    if len(comparison.new) > 1:
        yield f"errors of their own are also in {listed(comparison.new[1:])}"
    if only_coarser(comparison, reference):
        yield "no error is larger than float16 rounding: does the port compute in float16 or TF32?"


def whereabouts(name: str, reference: Any, port: Any, text: Any, limit: float) -> Iterator[str]:
    """Return sentences on which texts and which positions differ, where not all of them do."""
    letters = axes(name).split()
    a, b = np.float64(reference), np.float64(port)
    if "M" in letters:  # a masked key has no difference
        a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(a), b, 0)
    for axis, word in (("B", "text"), ("L", "position")):
        if axis not in letters:
            continue
        others = tuple(n for n, letter in enumerate(letters) if letter != axis)
        square = np.where(np.isnan(b), np.inf, b - a) ** 2
        if text is not None and letters[0] == "B" and "L" in letters:
            shape = [size if letter in "BL" else 1 for letter, size in zip(letters, a.shape, strict=True)]
            square = np.where(text.reshape(shape), square, 0)
        sizes = (a**2).sum(axis=others)
        wrong = np.flatnonzero(square.sum(axis=others) > limit**2 * sizes)
        compared = text.any(axis=0).sum() if axis == "L" and text is not None else len(sizes)
        if 0 < len(wrong) < compared:
            yield f"in {word} {listed([str(i) for i in wrong], most=8)} of 0 to {len(sizes) - 1} only"


def only_coarser(comparison: Comparison, reference: Trace) -> bool:
    """Tell whether a port of finer numbers than float16 is within float16's rounding everywhere."""
    stages = comparison.stages
    if any(stage.error is None for stage in stages.values()):
        return False
    if coarser(list(stages.values())[-1].precision, "float32") != "float32":
        return False
    return all(
        stage.error <= tolerances(reference, name, "float16", None)[0] for name, stage in stages.items()
    )


def notes_on_reading(comparison: Comparison, reference: Trace, matches: Any, text: Any) -> Iterator[str]:
    """Return sentences on how the port's arrays were read."""
    if text is not None and text.shape[1] < reference.tokens.shape[1]:
        L = reference.tokens.shape[1]
        yield f"the port has the first {text.shape[1]} of {L} positions, and only those are compared"
    padding = [name for name, stage in comparison.stages.items() if stage.state == "padding"]
    if padding:
        yield f"only positions after the end of text, which reach no feature, differ in {listed(padding, 2)}"
    layouts: dict[tuple[str, str], list[str]] = {}
    for name, match in matches.items():
        if match.layout not in (axes(name), f"P {axes(name)}"):
            layouts.setdefault((match.layout, axes(name)), []).append(name)
    for (layout, ours), names in layouts.items():
        rivals = {rival for name in names for rival in matches[name].rivals}
        fits = f"; the same shape as {listed(sorted(rivals))}, but only this fits" if rivals else ""
        yield f"read {layout} as {ours}: {listed(names, 2)}{fits}"


def notes_on_gaps(
    comparison: Comparison, reference: Trace, unknown: list[str], rtol: float | None
) -> Iterator[str]:
    """Return sentences on what was not compared."""
    for name, stage in comparison.stages.items():
        if stage.state == "shape" and name != comparison.first:
            yield f"not compared: {stage.name} is {stage.layout}, no layout of {list(reference[name].shape)}"
    if unknown:
        yield f"{len(unknown)} of the port's arrays are no stage of ours: {listed(unknown)}"
    if comparison.missing:
        yield f"{len(comparison.missing)} of {len(reference)} stages are not shown by the port"
    if rtol is None and reference.params is None and not reference.roundings:
        yield f"the reference has no params to measure a tolerance with: {UNMEASURED} roundings are allowed"


def listed(names: list[str], most: int = 4) -> str:
    """Return names as words: the first few, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def compare_files(
    probe: str | os.PathLike[str],
    port: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    rtol: float | None = None,
) -> Comparison:
    """Compare two files: a probe that `minclip probe` wrote, and a port's .npz or .safetensors.

    names    {"theirs": "ours"}, for names that minclip does not know
    params   the probe's own model, to tell new error from inherited
    Raises OSError or ValueError where a file cannot be read or params are another model's.
    """
    reference = read_probe(probe)
    reference.params = params
    if params is not None:
        features, expected = as_array(run(params, reference.tokens, keep)), reference["text_features"]
        if features.shape != expected.shape or relative_l2(features, expected, axis=None) > 1e-2:
            raise ValueError(f"{probe} was written with another model than the one given")
    return compare(reference, rename(read_dump(port), names or {}), rtol=rtol)
