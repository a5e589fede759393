"""`diagnose_states`: which hidden states a port gives, and which known mistake explains them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minclip.porting.comparison import compare
from minclip.porting.rounding import allowed
from minclip.porting.runs import names
from minclip.porting.states_search import Judgment, StatesSearch, StatesTarget, text_error
from minclip.porting.verdict import ALL_ZERO, Diagnosis
from minclip.porting.which_states import Which
from minclip.tracing import trace as record_trace

NOTHING_FINITE = "No number is finite, so the port's choice of states cannot be seen."
NEAREST = 3  # bugs that nearly explain the text tried, judged on all texts


class StatesDiagnosis(Diagnosis):
    """The result of `diagnose` for hidden states."""

    subject = "hidden states"


def diagnose_states(
    params: Mapping[str, Any],
    tokens: Any,
    states: Any,
    *,
    skip: int,
    norm: bool,
    dtype: Any,
    budget: float,
    trace: Mapping[str, Any] | None,
) -> StatesDiagnosis:
    """Name the states that a port gives, and the known porting bugs that explain them.

    params, tokens   the model that was ported, and the tokens that the port was given
    states           the port's hidden states of all positions, [B, L, D] in any layout
    skip, norm       the states that the port should give, as `minclip.hidden_states` takes them
    dtype, budget    as `diagnose` takes them
    trace            the port's own stages: the first one that diverges becomes a note

    If the port gives other states than these, that is its first finding: N7 where it
    leaves out other blocks, N5 where it norms states that should not be normed, or the reverse.
    Raises ValueError where the states do not fit the tokens and the model.
    """
    wanted = Which(skip, norm)
    target = StatesTarget(params, tokens, states, wanted, dtype)
    if not target.states.any():
        return StatesDiagnosis("unknown", [], [ALL_ZERO], target.error)
    diagnosis = decide(StatesSearch(target, wanted, budget))
    if trace and diagnosis.verdict != "agrees":
        diagnosis.notes.append(f"The dump {compare(record_trace(params, tokens), trace).verdict}.")
    return diagnosis


def decide(search: StatesSearch) -> StatesDiagnosis:
    """Return the verdict: other states first, then single bugs, then a scale."""
    target = search.target
    for precision in target.precisions:
        if clean := fitting_choice(search, precision):
            return explained(search, [clean], precision)
        if found := search.explain(precision):
            return explained(search, found, precision)
    scaled = search.judge((), target.nearest, target.precisions[0], scaled=True)
    return explained(search, [scaled], target.precisions[0]) if scaled.fits else unexplained(search)


def fitting_choice(search: StatesSearch, precision: str) -> Judgment | None:
    """Return the judgment of the wanted or the nearest states, where they are the port's."""
    for which in dict.fromkeys((search.wanted, search.target.nearest)):
        judged = search.judge((), which, precision)
        finest = precision == search.target.precisions[0]
        if judged.fits and (finest or search.looks_like_rounding((), which, precision)):
            return judged
    return None


def explained(search: StatesSearch, found: Sequence[Judgment], precision: str) -> StatesDiagnosis:
    """Return the verdict where the port gives some states of the reference, with or without faults."""
    target, first = search.target, found[0]
    verdict = "known" if first.finding.faults else "agrees"
    within = f"relative error {first.error:.2g}, where {precision} rounding alone makes {first.rounding:.2g}"
    which = f"These are {first.which}: minclip.{first.which.call}."
    finite = bool(np.isfinite(target.states).any())
    notes = [which if finite else NOTHING_FINITE, *notes_on_reading(target)]
    if precision != target.precisions[0]:
        notes.append(
            f"A port that computes in {precision} inside has this error. If yours is "
            f"{target.precisions[0]} throughout, this small difference is unexplained."
        )
    if verdict == "agrees":
        return StatesDiagnosis(verdict, [], [f"{within}.", *notes], target.error)
    text = f"relative error {target.error:.2g} against {search.wanted}; with this explanation {within}"
    findings = [dataclasses.replace(first.finding, explanation=text)]
    for other in found[1:]:
        told = f"relative error {other.error:.2g}, if these are {other.which}"
        findings.append(dataclasses.replace(other.finding, explanation=told))
    return StatesDiagnosis(verdict, findings, notes, target.error)


def unexplained(search: StatesSearch) -> StatesDiagnosis:
    """Return the verdict where nothing fits: the nearest states, where they differ, the nearest fault."""
    target, finest = search.target, search.target.precisions[0]
    clean = search.judge((), target.nearest, finest)
    notes = [
        f"The nearest are {target.nearest}: minclip.{target.nearest.call}. "
        f"The relative error is {clean.error:.2g} on the worst text.",
        *whereabouts(search, allowed(clean.rounding, finest)),
        *notes_on_reading(target),
    ]
    if search.expired:
        notes.append("The search stopped at its budget; a larger budget= extends the search.")
    notes += nearest_bug(search, clean)
    return StatesDiagnosis("unknown", [], notes, target.error)


def nearest_bug(search: StatesSearch, clean: Judgment) -> Iterator[str]:
    """Return a sentence on the bug that explains most of the error, where one explains half of it."""
    finest = search.target.precisions[0]
    for _, faults, which in search.singles()[:NEAREST]:
        judged = search.judge(faults, which, finest)
        if judged.error < 0.5 * clean.error:
            yield (
                f"The nearest known bug is {names(judged.finding.faults)}. It takes the error from "
                f"{clean.error:.2g} to {judged.error:.2g}, so it may be one bug of several."
            )
            return


def whereabouts(search: StatesSearch, limit: float) -> Iterator[str]:
    """Return a sentence on which positions differ, where not all of them do."""
    target = search.target
    exact = search.run((), "float64")[target.nearest]
    if exact.shape != target.states.shape:
        yield f"The states have width {target.states.shape[-1]}, the model's {exact.shape[-1]}."
        return
    wrong = np.stack(
        [text_error(target.states[:, i : i + 1], exact[:, i : i + 1]) for i in range(exact.shape[1])]
    )
    wrong = wrong.T > limit  # (n, L)
    after = np.arange(exact.shape[1]) >= target.length[:, None]
    first = int(wrong.any(axis=0).argmax())
    if not (wrong & ~after).any():
        yield "Only positions after the end of text differ: the padding id, or a mask of the padding."
    elif first and wrong[:, first:].any(axis=0).all():
        yield f"Positions from {first} on differ, those before agree."


def notes_on_reading(target: StatesTarget) -> Iterator[str]:
    """Return sentences on how the port's array was read, and which texts were judged."""
    given, positions = target.positions[1], target.positions[0]
    if target.layout != "B L D":
        yield f"The states were read as {target.layout}."
    if positions < given:
        yield f"The port gives the first {positions} of {given} positions, and only these are compared."
    if not target.complete:
        yield f"Judged on {len(target.tokens)} of the {len(target.batch)} texts, the worst ones."


def is_states(params: Mapping[str, Any], tokens: Any, output: Any) -> bool:
    """Tell whether a port's output is hidden states, not features: it holds a row for each position."""
    texts, L = int(np.prod(tokens.shape[:-1])), tokens.shape[-1]
    widest = (
        max(params["text_projection"].shape)
        if "text_projection" in params
        else len(params["ln_final.weight"])
    )
    if output.ndim < 2 or output.size <= texts * widest:
        return False
    rows = output.size // output.shape[-1]
    return bool(output.ndim > 2 or rows == texts * L or (texts == 1 and rows <= L))
