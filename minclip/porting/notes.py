"""Sentences on a comparison: the verdict, where a stage diverges, and how the arrays were read."""

from __future__ import annotations

import numpy as np

from minclip.porting.rounding import PRECISIONS, UNMEASURED
from minclip.porting.stages import axes

LAST = ("ln_final", "pooled", "text_features")  # where one of them agrees, so does the port


def verdict_on(comparison, compared):
    """Return the verdict, which is the first line of the text."""
    stages, first, rtol = comparison.stages, comparison.first, compared.rtol
    compared_with, at = ("gradients", "the gradient of ") if compared.backwards else ("stages", "")
    if first is None:
        shown = [stage for stage in stages.values() if stage.state != "stray"]
        coarsest = max((stage.precision or PRECISIONS[0] for stage in shown), key=PRECISIONS.index)
        noise = compared.coarseness.noise
        rounding = noise.candidate.format.summary if noise else coarsest
        within = f"rtol {rtol:g}" if rtol is not None else f"the rounding of {rounding}"
        count = (
            f"{len(shown)} of {len(comparison.order)} {compared_with} were compared, all are within {within}"
        )
        ends = not compared.alignment.unknown or compared.backwards or set(LAST) & set(stages)
        return f"agrees: {count}" if ends else f"agrees as far as recognized: {count}"
    if stages[first].state == "shape":
        return f"diverges first at {at}{first}, which has another shape"
    error, limit = stages[first].error, stages[first].tolerance
    times = f", {error / limit:.2g} times the error allowed" if limit else ""
    return f"diverges first at {at}{first}: relative error {error:.2g}{times}"


def notes_on(comparison, compared):
    """Return the notes of a comparison."""
    for fault in comparison.faults:
        yield f"{fault.id} explains every difference: {fault.summary}. Remedy: {fault.remedy}"
    if comparison.first:
        yield from notes_on_first(comparison, compared)
    yield from notes_on_coarseness(comparison, compared)
    yield from notes_on_names(comparison, compared)
    yield from notes_on_reading(comparison, compared)
    yield from notes_on_gaps(comparison, compared)


def notes_on_first(comparison, compared):
    """Return sentences on the first divergence: where in the array, of what kind, which others are new."""
    first, stage = comparison.first, comparison.stages[comparison.first]
    yield from notes_on_bracket(comparison)
    if stage.state == "shape":
        shape = list(compared.reference[first].shape)
        yield f"the port's {stage.name} is {stage.layout}, no layout of {shape}"
        return
    yield from whereabouts(first, *compared.pairs[first], compared.text, stage.tolerance)
    if stage.cosine > 0.99999 and abs(stage.norm_ratio - 1) > 1e-3:
        yield f"it is {stage.norm_ratio:.5g} times the reference's: right but for its scale"
    if stage.new is not None and stage.new <= stage.new_tolerance:
        yield "no stage up to there adds more than rounding: the errors add up over the stages"
    if compared.reference.params is None and compared.alignment.unknown and not compared.backwards:
        yield "with the reference's params (compare --model), arrays after it need no names to be recognized"
    if len(comparison.new) > 1:
        yield f"errors of their own are also in {listed(comparison.new[1:])}"


def notes_on_bracket(comparison):
    """Return a sentence on the stages around the first divergence, where the port does not show them all."""
    before = comparison.order[: comparison.order.index(comparison.first)]
    hidden = []
    while before and before[-1] in comparison.missing:
        hidden.insert(0, before.pop())
    if not hidden:
        return
    after = f"after {before[-1]}, which agrees, " if before else ""
    first = comparison.first
    yield f"the port does not show {listed(hidden)}, just before: the error is {after}there or in {first}"


def whereabouts(name, reference, port, text, limit):
    """Return sentences on which texts and which positions differ, where not all of them do."""
    letters = axes(name).split()
    a, b = np.float64(reference), np.float64(port)
    a, b = np.where(np.isnan(a), 0, a), np.where(np.isnan(a), 0, b)  # a probe's file leaves positions out
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
            plural = "s" * (len(wrong) > 1)
            yield f"in {word}{plural} {listed(ranges(wrong), most=8)} of 0 to {len(sizes) - 1} only"


def ranges(numbers):
    """Return ascending numbers as words, with three or more in a row as a range: ["0", "2", "5 to 9"]."""
    runs = np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) > 1) + 1)
    words = ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(i) for i in run] for run in runs)
    return [word for run in words for word in run]


def notes_on_coarseness(comparison, compared):
    """Return sentences on arithmetic or weights coarser than the port's numbers show, and what they hide."""
    coarse, found = compared.coarseness, compared.coarseness.agreement
    name = {"float16": "float16 or TF32"}.get(coarse.precision, coarse.precision)
    shown = compared.final and compared.measured[compared.final].precision
    if coarse.precision in ("float16", "bfloat16") and coarse.precision != shown:
        errors = "the errors" if coarse.agrees else "most stages' own errors"
        yield f"{errors} are those of {name}: does the port compute, or store its weights, in {name}?"
    if coarse.noise:
        yield from notes_on_noise(coarse.noise)
    if found and found.seen:
        seen = found.seen[0]
        yield (
            f"within the rounding, the error fits {seen.fault.id} ({seen.fault.summary}): "
            f"{seen.coefficient:.2f} times its change"
        )
    if found and found.hidden:
        yield f"too small to see at {found.precision}: {listed([fault.id for fault in found.hidden], 12)}"


def notes_on_noise(noise):
    """Return sentences on quantized weights, a bug beside them, and bugs too small to see under them."""
    summary = noise.candidate.summary
    yield f"{summary} explain {noise.size:.2g} of the features' error; the error allowed follows them"
    for fault in noise.faults:
        yield f"the rest of the features' error is {fault.id} ({fault.summary})"
    if noise.hidden:
        yield f"too small to be excluded under it: {listed([fault.id for fault in noise.hidden], 12)}"


def notes_on_names(comparison, compared):
    """Return sentences on arrays that hold another stage than they name."""
    for name, (named, held) in list(compared.alignment.moved.items())[:6]:
        yield f"the dump's {name} is not {named}: it holds {held}"
    for name, stage in list(compared.alignment.strays.items())[:6]:
        yield f"the dump's {name} was left out: {compared.alignment.matches[stage].name} is {stage}"
    for stage in [stage for stage in comparison.stages.values() if stage.state == "stray"][:6]:
        yield (
            f"the dump's {stage.name} does not hold {stage.stage}, although {compared.final} agrees: "
            "it is probably another array of that shape"
        )


def notes_on_reading(comparison, compared):
    """Return sentences on how the port's arrays were read."""
    text, tokens, matches = compared.text, compared.reference.tokens, compared.alignment.matches
    if text is not None and text.shape[1] < tokens.shape[1]:
        L = tokens.shape[1]
        yield f"the port has the first {text.shape[1]} of {L} positions, and only those are compared"
    padding = [name for name, stage in comparison.stages.items() if stage.state == "padding"]
    if padding:
        where = listed(padding, 2)
        yield f"only positions after the end of text, which reach no feature, differ in {where}"
        if "ln_final" in padding:
            yield "as hidden states they count: minclip.diagnose names the cause, given the port's ln_final"
    layouts = {}
    for name in comparison.stages:
        if name in matches and matches[name].layout not in (axes(name), f"P {axes(name)}"):
            layouts.setdefault((matches[name].layout, axes(name)), []).append(name)
    for (layout, ours), names in layouts.items():
        rivals = {rival for name in names for rival in matches[name].rivals}
        fits = f"; the same shape as {listed(sorted(rivals))}, but only this fits" if rivals else ""
        yield f"read {layout} as {ours}: {listed(names, 2)}{fits}"


def notes_on_gaps(comparison, compared):
    """Return sentences on arrays and stages that were not compared."""
    reference, unknown = compared.reference, compared.alignment.unknown
    for name, stage in comparison.stages.items():
        if stage.state == "shape" and name != comparison.first:
            yield f"not compared: {stage.name} is {stage.layout}, no layout of {list(reference[name].shape)}"
    if unknown:
        are = "is not a stage" if len(unknown) == 1 else "are not stages"
        yield f"{len(unknown)} of the port's arrays {are} of the encoder: {listed(unknown)}"
    if compared.broken:
        yield f"{compared.broken[0]}, which is none of the stages, holds NaN or infinity"
    if comparison.missing:
        are = "is" if len(comparison.missing) == 1 else "are"
        yield f"{len(comparison.missing)} of {len(reference)} stages {are} not shown by the port"
    if compared.rtol is None and reference.params is None and not reference.roundings:
        yield f"the reference has no params to measure a tolerance with: {UNMEASURED} roundings are allowed"


def listed(names, most=4):
    """Return names as words: the first few, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
