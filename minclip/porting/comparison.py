"""`compare`: a port beside the reference, stage by stage, and the first stage that diverges."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from minclip.arrays import as_array
from minclip.params import keep
from minclip.porting import display, gradients
from minclip.porting.alignment import Alignment, align
from minclip.porting.coarseness import Coarseness, find_coarseness, tolerances, tolerances_under
from minclip.porting.faults import Fault
from minclip.porting.layouts import Match, crop
from minclip.porting.names import rename, unpack
from minclip.porting.notes import listed, notes_on, verdict_on
from minclip.porting.port import Port
from minclip.porting.port_files import read_port
from minclip.porting.probe import as_trace, read_probe
from minclip.porting.rounding import (
    PRECISIONS,
    coarser,
    distances,
    holds,
    host_params,
    ratio,
    relative_l2,
    run,
)
from minclip.porting.stages import LOOKED_UP, STREAM, axes, count_blocks, entries, part_of, text_of
from minclip.porting.which_states import Which, states_of
from minclip.tracing import Trace

WRONG = ("diverges", "shape")  # states of a stage with an error of its own


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage side by side.

    stage, name, layout    the stage, the port's name for it, and how its axes lie in the port's array
    precision        the precision of the port's numbers, which the tolerance is for, such as "float32"
    max_abs, relative_l2, cosine, norm_ratio    port against reference, over every position
    nan              the share of NaN
    error, tolerance    relative L2 error up to the end of each text, and the largest error allowed
    new, new_tolerance  the same for the error that this stage adds; None where it was not shadowed
    state            "agrees"; "padding", where only positions after the end of text differ; "diverges",
                     with an error of its own; "inherits", where an earlier stage diverged and this stage
                     is not known to add to it; "stray", where the numbers are not the stage's although
                     later stages agree; "shape", where the port's array has no layout of this stage
    """

    stage: str
    name: str
    layout: Any
    precision: str | None = None
    max_abs: Any = None
    relative_l2: Any = None
    cosine: Any = None
    norm_ratio: Any = None
    nan: Any = None
    error: Any = None
    tolerance: Any = None
    new: Any = None
    new_tolerance: Any = None
    state: str = ""

    def allowing(self, tolerance: float, new: float) -> Stage:
        """Return the stage with at least these tolerances."""
        if self.error is None:
            return self
        return dataclasses.replace(
            self, tolerance=max(self.tolerance, tolerance), new_tolerance=max(self.new_tolerance, new)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the stage as plain values."""
        return dataclasses.asdict(self)


def compare(
    reference: Mapping[str, Any],
    port: Mapping[str, Any],
    *,
    rtol: float | None = None,
    dtype: Any = None,
) -> Comparison:
    """Compare a port's stages with the reference's, and return a `Comparison`.

    reference  a `Trace`, from `minclip.trace` or from a probe's file
    port       mapping from name to array: as many stages as the port has, of a run on the same tokens.
               Arrays (NumPy's, CuPy's or torch's) are recognized by their values, in any usual layout, and
               by name where the values fit nothing: minclip's, OpenAI's, OpenCLIP's, Hugging Face's, MLX's,
               Keras's or Flax's. `minclip.porting.names.rename` is for others.
    rtol       the relative L2 error allowed at every stage, instead of the measured tolerance
    dtype      the precision that the port computes in, such as "bfloat16" or "tf32", where its numbers do
               not show it

    The tolerance of a stage is a multiple of the reference's own rounding error at the port's precision,
    see `minclip.porting.rounding`. That precision is the coarsest that the numbers of this stage and of
    earlier stages show: float32 arrays that hold only float16 numbers count as float16. A port may also
    compute in a coarser precision than it shows.

    Where the port's last stages agree, the verdict is that it agrees. An earlier array that does not fit
    is then a stray, and a note guesses its content.

    Where the reference carries its params, each stage is also *shadowed*: compared with the result of
    the reference, in float64, from the port's own earlier stages. Inherited error drops out, and `new` is
    the error of this stage itself, together with the stages before it that the port does not show.

    Positions after the end of a text never reach its features: a stage where only they differ is
    reported, but does not count as diverging.

    A reference from `minclip.backward` is compared with a port's gradients: of stages, under the stages'
    names, and of parameters, under the port's own (`trace_torch(model, tokens, grad=...)` gives both).
    `faults` then lists the known bugs of backward passes that explain every difference.

    Raises ValueError where nothing of the port can be matched, where it was run on other tokens, and where
    rtol is negative or NaN.

    >>> import minclip
    >>> params, tokens = minclip.load(), minclip.tokenize("a cat")
    >>> port = dict(minclip.trace(params, tokens))
    >>> port["ln_final"] = port["transformer.resblocks.3"]  # the last norm forgotten
    >>> port["pooled"] = port["ln_final"][:, 3]
    >>> port["text_features"] = port["pooled"] @ params["text_projection"]
    >>> compare(minclip.trace(params, tokens), port).first
    'ln_final'
    """
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol must be at least 0, not {rtol}")
    reference = reference if isinstance(reference, Trace) else as_trace(reference)
    reference = reference if reference.gradient is None else gradients.complete(reference)
    arrays = unpack(port, reference.tokens, count_blocks(reference))
    check_tokens(reference, arrays)
    alignment = (
        align_gradients(reference, arrays) if reference.gradient is not None else align(reference, arrays)
    )
    leave_out_copies(alignment, arrays)
    if not alignment.matches and not alignment.misfits:
        names = f" ({listed(list(arrays))})" if arrays else ": the port has none"
        raise ValueError(
            f"no array was recognized as a stage, by its name or by its numbers{names}: "
            "give them the stages' names with minclip.porting.names.rename"
        )
    unknown = [name for name in alignment.unknown if arrays[name].dtype.kind == "f"]
    broken = [name for name in unknown if not np.isfinite(arrays[name]).all()]
    return Comparer(reference, alignment, broken, rtol, dtype).compare()


def align_gradients(reference: Trace, arrays: dict[str, Any]) -> Alignment:
    """Return a port's gradients: of stages, aligned as stages are, and of parameters, read like a state."""
    parameters = gradients.parameters_of(reference, arrays)
    alignment = align(reference, arrays)
    for name, (theirs, array) in parameters.items():
        alignment.matches[name] = Match(array, theirs, axes(name), [])
    return alignment


def leave_out_copies(alignment: Alignment, arrays: Mapping[str, Any]) -> None:
    """Forget the arrays that were not used because another one with the same numbers was."""
    left = [name for name in (*alignment.unknown, *alignment.strays) if arrays[name].dtype.kind == "f"]
    used = {match.name for match in alignment.matches.values() if left and match.name in arrays}
    prints = {fingerprint(arrays[name]) for name in used}
    for name in left:
        if fingerprint(arrays[name]) in prints:
            alignment.strays.pop(name, None)
            alignment.unknown[:] = [other for other in alignment.unknown if other != name]


def fingerprint(array: Any) -> tuple[tuple[int, ...], int]:
    """Return what equal arrays have in common, and other arrays hardly ever."""
    return array.shape, zlib.crc32(np.ascontiguousarray(array).data)


class Comparer:
    """Measures and judges the stages of a port that was aligned with a reference.

    broken    the names of the arrays that are no stage and hold NaN or infinity
    """

    def __init__(
        self, reference: Trace, alignment: Alignment, broken: list[str], rtol: float | None, dtype: Any
    ):
        self.reference, self.alignment, self.rtol, self.dtype = reference, alignment, rtol, dtype
        self.broken = broken
        self.pairs, self.tokens = crop_alike(reference, alignment.matches)
        text = text_of(reference)
        self.text = None if text is None else text[:, : self.tokens.shape[1]]
        self.order = [name for name in reference if name in self.pairs or name in alignment.misfits]
        self.backwards = reference.gradient is not None
        self.measured: dict[str, Stage] = {}
        self.coarseness = Coarseness(agrees=False)

    def compare(self) -> Comparison:
        """Return the comparison."""
        self.measured = self.measure_all()
        self.coarseness = find_coarseness(self)
        judged = judge(self.with_coarseness(), self.final if self.coarseness.agrees else None)
        if self.coarseness.refuted and all(stage.state not in WRONG for stage in judged.values()):
            judged[self.final] = dataclasses.replace(judged[self.final], state="diverges")
        explain = self.explain_gradients if self.backwards else self.explain_states
        return Comparison(judged, self, explain(judged))

    def with_coarseness(self) -> dict[str, Stage]:
        """Return the measured stages, with tolerances that allow what the port's coarseness does."""
        stages, precision, noise = self.measured, self.coarseness.precision, self.coarseness.noise
        if precision is not None:
            stages = {name: self.with_tolerance(stage, precision) for name, stage in stages.items()}
        if noise is None:
            return dict(stages)
        limits = tolerances_under(noise, self.reference)
        return {name: stage.allowing(*limits.get(name, (0.0, 0.0))) for name, stage in stages.items()}

    def explain_gradients(self, stages: Mapping[str, Stage]) -> list[Fault]:
        """Return the known bugs of backward passes that explain every difference of a port's gradients."""
        new = [name for name, stage in stages.items() if stage.state == "diverges"]
        if not new or self.alignment.misfits:
            return []
        limits = {name: stages[name].tolerance for name in self.pairs}
        return list(gradients.explain(self.reference, self.pairs, limits, new, self.text))

    def explain_states(self, stages: Mapping[str, Stage]) -> list[Fault]:
        """Return the faults of a port whose only difference is that its last hidden states are other ones."""
        new = [name for name, stage in stages.items() if stage.state in ("diverges", "shape")]
        if new != ["ln_final"] or stages["ln_final"].state == "shape" or self.reference.params is None:
            return []
        port, stage = self.pairs["ln_final"][1], stages["ln_final"]
        for which, states in states_of(Port(host_params(self.reference.params), self.tokens)).items():
            a, b = entries("ln_final", states, port, self.text)
            if relative_l2(b, a) <= stage.tolerance:
                return list(which.faults(Which()))
        return []

    def measure_all(self) -> dict[str, Stage]:
        """Return every stage with its numbers, and the tolerance for the precision that its digits show."""
        added: dict[str, float] = {}
        if self.reference.params is not None:
            theirs = {name: port for name, (_, port) in self.pairs.items()}
            if self.backwards:
                added = gradients.distances(self.reference, theirs, self.text, shadow=True)
            else:
                added = distances(self.reference.params, self.tokens, theirs, shadow=True)
        stages: dict[str, Stage] = {}
        precision = PRECISIONS[0]
        given = list(self.reference)[:1] if self.backwards else LOOKED_UP
        for name in self.order:
            if name in self.alignment.misfits:
                stages[name] = Stage(name, *self.alignment.misfits[name])
                continue
            here = precision_of(name, *self.pairs[name])
            if name not in given:  # which says nothing of the arithmetic that follows
                here = precision = coarser(precision, here)
            match, numbers = self.alignment.matches[name], measure(name, *self.pairs[name], self.text)
            stage = Stage(name, match.name, match.layout, here, **numbers, new=added.get(name))
            stages[name] = self.with_tolerance(stage, here)
        return stages

    def with_tolerance(self, stage: Stage, precision: str) -> Stage:
        """Return a stage with the tolerance for a precision, unless its digits show a coarser one."""
        if stage.precision is None:
            return stage
        precision = coarser(precision, stage.precision)
        both = tolerances(self.reference, stage.stage, precision, self.rtol)
        return dataclasses.replace(stage, precision=precision, tolerance=both[0], new_tolerance=both[1])

    @property
    def final(self) -> Any:
        """The last stage shown that every earlier stage flows through."""
        if self.backwards:  # the first gradients are given, and the last flow through no other
            return None
        shown = (name for name in reversed(self.order) if name in self.pairs and STREAM.search(name))
        return next(shown, None)


@np.errstate(all="ignore")
def measure(name, reference, port, text):
    """Return a stage's numbers by their names in `Stage`.

    All but `error` and `nan` are of numbers that are finite in both, except that relative L2 is inf
    where one side alone is finite.
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
    return {
        "max_abs": float(abs(b - a).max(initial=0)),
        "relative_l2": whole,
        "cosine": cosine,
        "norm_ratio": ratio(sizes[1], sizes[0]),
        "nan": nan,
        "error": error,
    }


def precision_of(name: str, reference: Any, port: Any) -> str:
    """Return the precision that a stage's numbers show: the coarser of the two sides'."""
    if reference.dtype.kind != "f" or part_of(name) == "attn.weights":  # many weights are 0 or 1
        return PRECISIONS[0]
    ours, theirs = holds(reference), holds(port)
    if name in LOOKED_UP and ours == theirs != "float64":  # the parameters are so coarse; nobody rounded
        return "float32"
    return coarser(ours, theirs)


def judge(stages, final=None):
    """Return the stages with their states, in order. Stages before `final`, which agrees, do not diverge."""
    judged, diverged, before = {}, False, final is not None
    for name, stage in stages.items():
        before = before and name != final
        if stage.error is None:
            state = "shape"
        elif stage.relative_l2 <= stage.tolerance:
            state = "agrees"
        elif stage.error <= stage.tolerance:
            state = "padding"
        elif name == final:
            state = "agrees"
        elif diverged and (stage.new is None or stage.new <= stage.new_tolerance):
            state = "inherits"
        else:
            state = "diverges"
        if before and state in ("shape", "diverges", "inherits"):
            state = "stray"
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
        raise ValueError(
            f"the port's tokens have the shape {list(theirs.shape)}, the reference's {list(ours.shape)}"
        )
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

    stages     {stage: `Stage`}, in the order of computation: the stages that the port shows
    first      the name of the first stage that diverges, or None
    new        the names of all stages that diverge with an error of their own, as far as shadowing tells
    missing    the names of the stages that the port does not show
    verdict    one sentence
    notes      further sentences: where in the arrays, how they were read, which were left out
    agrees     whether the port agrees with the reference
    faults     the known bugs that explain every difference, each a `Fault`: of gradients, and of a port whose
               last hidden states are other ones

    Prints as a table whose first line is the verdict; in Jupyter it is a picture, layers x stages.
    """

    stages: dict[str, Stage]
    first: str | None
    new: list[str]
    missing: list[str]
    verdict: str
    notes: list[str]
    faults: list[Fault]

    def __init__(self, stages: dict[str, Stage], compared: Any, faults: list[Fault]):
        self.stages, self.faults = stages, faults
        self.order = list(compared.reference)
        self.pairs, self.text = compared.pairs, compared.text  # for a page of it
        self.missing = [name for name in compared.reference if name not in stages]
        self.new = [name for name, stage in stages.items() if stage.state in WRONG]
        self.first = self.new[0] if self.new else None
        self.verdict = verdict_on(self, compared)
        self.notes = list(notes_on(self, compared))

    @property
    def agrees(self) -> bool:
        """Whether the port agrees with the reference."""
        return self.first is None

    def __repr__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        stages = {name: stage.to_dict() for name, stage in self.stages.items()}
        facts = {name: getattr(self, name) for name in ("verdict", "first", "new", "missing", "notes")}
        faults = [fault.to_dict() for fault in self.faults]
        return {"agrees": self.agrees, **facts, "faults": faults, "stages": stages}


def compare_files(
    probe: str | os.PathLike[str],
    port: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    rtol: float | None = None,
    dtype: Any = None,
) -> Comparison:
    """Compare two files: a probe that `minclip probe` wrote, and a port's dump or ONNX graph.

    names    {"theirs": "ours"}, for names that minclip does not know; {i} stands for any number
    params   the probe's own model, to tell new error from inherited, and bugs from coarse rounding
    rtol, dtype   as `compare` takes them

    Raises OSError or ValueError where a file cannot be read or params are another model's.
    """
    reference = read_probe(probe)
    reference.params = params
    if params is not None:
        features = as_array(run(params, reference.tokens, keep))
        expected = reference.get("text_features", reference["pooled"])
        if features.shape != expected.shape or relative_l2(features, expected, axis=None) > 1e-2:
            raise ValueError(f"{probe} was written with another model than the one given")
    arrays = read_port(port, reference.tokens)
    if "known" in arrays:  # a probe, too
        if not reference.roundings:
            raise ValueError(f"{port} is a probe: give it first, and then the port")
        arrays = {**read_probe(port), "tokens": arrays["tokens"]}
    return compare(reference, rename(arrays, names or {}), rtol=rtol, dtype=dtype)
