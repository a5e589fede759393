"""`Finding` and `Diagnosis`: the result of `diagnose`, and its text."""

from __future__ import annotations

import dataclasses
import html
from typing import Any, ClassVar

from minclip.porting.faults import Fault

HEADLINES = {
    "agrees": "agrees: the port gives the reference's {subject}",
    "known": "known: this explains the port's {subject}",
    "noise": "noise: quantization explains the port's {subject}",
    "unknown": "unknown: no known bug explains the port's {subject}",
}
ALL_ZERO = (
    "Every number is 0: the port never wrote its output, or all its weights are 0. minclip.compare shows the "
    "first stage that is 0."
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """An explanation that fits: the reference with these faults gives the port's features.

    faults        one `Fault`, or several that act together
    error         relative L2 between the port and the reference with these faults
    explanation   a sentence: the error without and with the faults, and how near any other comes
    """

    faults: tuple[Fault, ...]
    error: float
    explanation: str = ""

    def __str__(self) -> str:
        lines = []
        for fault in self.faults:
            lines += [
                f"{fault.id}: {fault.summary}",
                f"    fix: {fault.remedy}",
                f"    reported in: {fault.source}",
            ]
        return "\n".join([*lines, f"    evidence: {self.explanation}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        faults = [fault.to_dict() for fault in self.faults]
        return {"faults": faults, "error": self.error, "explanation": self.explanation}


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of `diagnose`. Prints as text, and shows as a list in Jupyter.

    verdict    "agrees", "known" (known bugs explain the port), "noise" (quantization does) or "unknown"
    findings   the explanations that fit, best first; empty unless the verdict is "known"
    notes      further sentences
    error      relative L2 between the port and the reference as it is
    """

    verdict: str
    findings: list[Finding]
    notes: list[str]
    error: float

    subject: ClassVar[str] = "features"

    @property
    def headline(self) -> str:
        """The verdict as a line."""
        return HEADLINES[self.verdict].format(subject=self.subject)

    def __repr__(self) -> str:
        lines = [self.headline, *map(str, self.findings[:1])]
        if len(self.findings) > 1:
            lines.append("or, as these texts cannot tell:")
        lines += map(one_line, self.findings[1:])
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """Return the same for Jupyter."""
        head = f"<div><b>{html.escape(self.headline)}</b></div>"
        found = "".join(f"<div style='white-space: pre-wrap'>{escape(f)}</div>" for f in self.findings[:1])
        tied = "".join(f"<li>{html.escape(one_line(finding))}</li>" for finding in self.findings[1:])
        tied = tied and f"<div>or, as these texts cannot tell:</div><ul>{tied}</ul>"
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return head + found + tied + (notes and f"<ul>{notes}</ul>")

    def to_dict(self) -> dict[str, Any]:
        """Return verdict, error, findings and notes as plain values."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"verdict": self.verdict, "error": self.error, "findings": findings, "notes": [*self.notes]}


def escape(finding: Finding) -> str:
    """Return a finding as escaped text."""
    return html.escape(str(finding))


def one_line(finding: Finding) -> str:
    """Return a finding as a line: ids, summaries and explanation."""
    ids = " + ".join(fault.id for fault in finding.faults)
    return f"{ids}: {' and '.join(fault.summary for fault in finding.faults)} ({finding.explanation})"
