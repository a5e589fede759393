"""Turn the results of a search into a `Diagnosis`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from minclip.porting.agreement import Agreement
from minclip.porting.describe import describe, tell_apart
from minclip.porting.rounding import allowed
from minclip.porting.runs import names
from minclip.porting.search import Search, Trial
from minclip.porting.target import Target
from minclip.porting.verdict import Diagnosis, Finding


def agrees(search: Search, agreement: Agreement) -> Diagnosis:
    """Return the verdict where the port gives the reference's features, or differs in how it shows them."""
    target, clean, precision = search.target, agreement.judgment, agreement.precision
    within = f"relative error {clean.error:.2g}, where {precision} rounding alone makes {clean.rounding:.2g}"
    if clean.finding.faults:
        finding = dataclasses.replace(clean.finding, explanation=f"apart from this the port agrees: {within}")
        return Diagnosis("known", [finding], notes_on_rows(target), target.error)
    notes = [*notes_on_rows(target), f"{within[0].upper()}{within[1:]}."]
    told = {"float16": "float16 or TF32"}.get(precision, precision)
    if precision != target.precisions[0]:
        notes.append(
            f"A port that computes in {told}, or stores its weights in it, has this error. If yours is "
            f"{target.precisions[0]} throughout, this difference is unexplained."
        )
    return Diagnosis("agrees", [], notes + notes_on_faults(agreement), target.error)


def notes_on_faults(agreement: Agreement) -> list[str]:
    """Return sentences on the faults that the error fits, and on those that are too small to see."""
    notes = []
    if agreement.seen:
        fault = agreement.seen[0].fault
        notes.append(
            f"Within this rounding, the error fits {fault.id} ({fault.summary}): it is "
            f"{agreement.seen[0].coefficient:.2f} times the change that this makes. {fault.remedy}."
        )
    return notes + notes_on_hidden(agreement)


def notes_on_hidden(agreement: Agreement) -> list[str]:
    """Return a sentence on the faults that are too small to see."""
    ids = ", ".join(fault.id for fault in agreement.hidden)
    return [f"Too small to see at {agreement.precision}: {ids}."] if ids else []


def seen_through(search: Search, agreement: Agreement) -> Diagnosis:
    """Return the verdict where the port is within rounding, but its error shows a fault."""
    best = min(projection.left for projection in agreement.seen)
    place = {fault.id: i for i, fault in enumerate(search.catalogue)}
    equal = [projection for projection in agreement.seen if projection.left <= 1.1 * best]
    findings = []
    for projection in sorted(equal, key=lambda projection: place[projection.fault.id]):
        judgment = search.judge((projection.fault,), "", agreement.precision)
        told = (
            f"the error is {projection.coefficient:.2f} times the change that this bug makes; relative error "
            f"{search.target.error:.2g} against the reference, {judgment.finding.error:.2g} with this bug, "
            f"where {agreement.precision} rounding alone makes {judgment.rounding:.2g}"
        )
        findings.append(dataclasses.replace(judgment.finding, explanation=told))
    notes = notes_on_rows(search.target) + notes_on_hidden(agreement)
    return Diagnosis("known", findings, notes, search.target.error)


def known(
    search: Search, findings: Sequence[Finding], trials: Sequence[Trial], precision: str = "float32"
) -> Diagnosis:
    """Return the verdict with findings that fit: evidence for the first, and texts that tell the others."""
    first, *tied = findings
    explained = [dataclasses.replace(first, explanation=evidence(search, findings, trials))]
    for other in tied:
        told = f"relative error {other.error:.2g}; {tell_apart(search, first, other)}"
        explained.append(dataclasses.replace(other, explanation=told))
    notes = notes_on_rows(search.target)
    if precision != search.target.precisions[0]:
        notes.append(
            f"The remaining error, {first.error:.2g}, is that of {precision} rounding. If the port "
            f"computes in {search.target.precisions[0]} throughout, another bug remains."
        )
    return Diagnosis("known", explained, notes, search.target.error)


def evidence(search: Search, findings: Sequence[Finding], trials: Sequence[Trial]) -> str:
    """Return a sentence on the errors without faults, with the first finding's, and with the next best."""
    first = findings[0]
    fitting = {fault.id for finding in findings for fault in finding.faults}
    bugs = "this bug" if len(first.faults) == 1 else "these bugs"
    text = f"relative error {search.target.error:.2g} against the reference, {first.error:.2g} with {bugs}"
    for trial in trials:
        others = trial.faults and not fitting & {fault.id for fault in trial.faults}
        if others and not search.is_near(trial):
            return f"{text}; the next best, {names(trial.faults)}, leaves {trial.error:.2g}"
    return text


def unknown(search: Search) -> Diagnosis:
    """Return the verdict where nothing fits, with what can be said of the difference."""
    target, trials = search.target, search.singles()
    notes = []
    if target.has_width_of(target.reference):
        notes.append(f"The relative error against the reference is {target.error:.2g}.")
    finest = target.precisions[0]
    notes += describe(target, allowed(search.rounding(finest), finest)) + notes_on_rows(target)
    nearest = next((t for t in trials if t.faults and not t.transform), None)
    clean = search.clean_error
    if nearest and nearest.error < 0.5 * clean:
        notes.append(
            f"The nearest known bug is {names(nearest.faults)} ({nearest.faults[0].summary}). It takes the "
            f"error on one text from {clean:.2g} to {nearest.error:.2g}, so it may be one bug of several."
        )
    return Diagnosis("unknown", [], notes, target.error)


def notes_on_rows(target: Target) -> list[str]:
    """Return sentences where the port's rows and the texts were not simply paired."""
    notes = []
    if not target.aligned:
        notes.append(
            f"Rows of features: {len(target.features)}; texts: {len(target.batch)}. "
            "Each row was compared with every text."
        )
    if not target.complete:
        notes.append(
            f"Judged on {len(target.tokens)} of the {len(target.batch)} texts, most of them the worst ones."
        )
    return notes
