"""The result of `verify`: every source with its figures, and one sentence that sums them up."""

from __future__ import annotations

import dataclasses
import html
import math
from typing import Any

from minclip.tables import html_table, text_table


@dataclasses.dataclass(frozen=True)
class SourceCheck:
    """One source's figures beside those that the weights give.

    id         short name of the source
    origin     repository, path, commit and license
    strong     whether a disagreement counts against the weights
    vectors    how many vectors (or printed rows) were compared
    agreeing   how many of them are within `allowed`
    measure    the error of a vector: "relative L2", or "absolute", the largest of printed digits
    largest    the largest error of a vector
    worst      the text with that error
    allowed    the largest error that is accepted
    basis      why that much is accepted
    """

    id: str
    origin: str
    strong: bool
    vectors: int
    agreeing: int
    measure: str
    largest: float
    worst: str
    allowed: float
    basis: str

    @property
    def agrees(self) -> bool:
        return self.agreeing == self.vectors


TITLES = ("  source", "agree", "largest error", "allowed", "measure", "largest at")
LEGEND = "= agrees   ! disagrees   ~ a weak source disagrees"


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate:
    """The published figures of a model beside those that some weights give.

    verdict    "agrees" (every strong source does), "differs", or "unknown" (nothing is published for a
               model of these shapes)
    model      the model's name, None where no model fits
    sentence   the verdict in one line
    sources    a `SourceCheck` for each source
    cosine     mean cosine between a source's figures and those of the weights, of the strong source where
               it is lowest. None without sources
    cause      a sentence about why figures disagree, "" where none do
    notes      more sentences

    Prints as a table whose first line is the verdict, in a terminal and in Jupyter.
    """

    verdict: str
    model: str | None
    sentence: str
    sources: list[SourceCheck]
    cosine: float | None = None
    cause: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        lines = [f"{self.verdict}: {self.sentence}"]
        if self.cause:
            lines.append(f"cause: {self.cause}")
        if self.sources:
            lines += ["", text_table(TITLES, self.rows()), LEGEND, ""]
            lines += [f"{check.id}: {about(check)}" for check in self.sources]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        lines = [f"<b>{html.escape(f'{self.verdict}: {self.sentence}')}</b>"]
        lines += [html.escape(f"cause: {self.cause}")] if self.cause else []
        lines += [html.escape(note) for note in self.notes]
        about_sources = "".join(
            f"<li>{html.escape(f'{check.id}: {about(check)}')}</li>" for check in self.sources
        )
        table = f"{html_table(TITLES, self.rows())}<ul>{about_sources}</ul>" if self.sources else ""
        return "".join(f"<div>{line}</div>" for line in lines) + table

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, one row per source."""
        return [
            (
                f"{'=' if check.agrees else '!' if check.strong else '~'} {check.id}",
                f"{check.agreeing}/{check.vectors}",
                f"{check.largest:.1e}",
                f"{check.allowed:.0e}",
                check.measure,
                f"{check.worst:.40}",
            )
            for check in self.sources
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the same facts as plain dicts, lists, numbers and strings. An infinite error is None."""
        facts = dataclasses.asdict(self)
        for check in facts["sources"]:
            check["largest"] = check["largest"] if math.isfinite(check["largest"]) else None
        return facts


def about(check):
    weak = "" if check.strong else "weak: "
    return f"{weak}{check.basis} ({check.origin})"
